"""The downloader for plain URLs: resumes after drops, believes no server, and stores a file only when it is whole.

Bytes go to `NAME.part`; `NAME.part.json` beside it remembers what the server said of the file (RFC 9110: validator,
length; RFC 1864: Content-MD5), so that a later call, or a later process, asks for the rest with Range and If-Range.
`NAME` itself appears by one rename, after every check.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

import requests
from urllib3.exceptions import HTTPError as TransportError

from ..errors import SourceError
from .part_file import Origin, description_of, discard, part_of, recall, received
from .wording import size_text

ATTEMPTS = 5  # per mirror; each next one resumes where the last one stopped
CHUNK = 64 * 1024  # bytes; a drop loses at most one chunk
TIMEOUT = (10, 60)  # seconds to connect, seconds of silence while reading
SLOWEST = (60_000, 60)  # bytes in so many seconds; a server that drips less holds the user up, whatever it says
LONGEST_WAIT = 120  # seconds that a server may ask for (Retry-After) before the next attempt
WORTH_A_LINE = 10_000_000  # bytes; smaller downloads are not announced

# What servers send, with status 200, instead of the file that was asked for.
IMPOSTORS = {
    b"<!doctype html": "a web page",
    b"<html": "a web page",
    b"<?xml": "an XML message",
    b"version https://git-lfs": "a Git LFS pointer instead of the file that it points to",
}


class _AttemptFailedError(Exception):
    """One attempt failed; the same mirror may do better, after so many seconds if it asks for them."""

    def __init__(self, problem: str, wait: float = 0) -> None:
        super().__init__(problem)
        self.wait = wait


class _MirrorFailedError(Exception):
    """A mirror will not serve the file; another one may."""


def fetch(
    urls: Sequence[str],
    target: Path,
    *,
    sha256: str = "",
    progress: bool = False,
    sleep: Callable[[float], None] | None = None,
) -> Path:
    """Download one file, from the first of several mirrors that serves it whole. The caller holds `locked(target)`.

    Args:
        urls: http(s) addresses of the same file, best first.
        target: the final path; its folder is made.
        sha256: hex digest of the file, where known.
        progress: show a bar on standard error.
        sleep: waits between attempts, in seconds; `time.sleep` if not given.

    Raises:
        SourceError: no mirror served it (each is listed with its reason), or it does not fit on the disk.
    """
    failures = []
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for url in urls:
            problem = _from_mirror(url, target, sha256, progress, sleep or time.sleep, patient=url == urls[-1])
            if problem is None:
                return target
            failures.append(f"{shown(url)}: {problem}")
    except OSError as error:
        raise SourceError(
            f"{target}: cannot be written ({error.strerror or error}). Free some space, or set LOADSTONE_CACHE to a "
            "folder on another disk; what has arrived is kept."
        ) from None
    origin = recall(target)
    kept = " What has arrived is kept: the same command resumes." if origin and origin.validator else ""
    raise SourceError(f"{target.name}: could not be downloaded. " + "; ".join(failures) + f".{kept}")


def _from_mirror(
    url: str, target: Path, sha256: str, progress: bool, sleep: Callable[[float], None], *, patient: bool
) -> str | None:
    """Try one mirror a bounded number of times; None if `target` is there, else what happened.

    One that is not `patient` is left for the next mirror as soon as an attempt brings nothing.
    """
    problem, asked = "", 0.0
    for attempt in range(ATTEMPTS):
        if attempt:
            wait = max(0.5 * 2**attempt, asked)
            say(f"{target.name}: {problem}; trying again in {wait:.0f} s")
            sleep(wait)
        before = received(target)
        try:
            _attempt(url, target, sha256, progress)
            return None
        except (_MirrorFailedError, requests.exceptions.SSLError, requests.exceptions.TooManyRedirects) as error:
            return _reason(error)
        except (_AttemptFailedError, requests.RequestException, TransportError) as error:
            problem, asked = _reason(error), getattr(error, "wait", 0.0)
            if isinstance(error, ValueError):  # how requests marks an address that is no address
                return problem
            if not patient and received(target) <= before:
                return problem
    return f"{problem} ({ATTEMPTS} attempts)"


def _attempt(url: str, target: Path, sha256: str, progress: bool) -> None:
    """One request: the whole file, or the rest of it if a part can be resumed."""
    mirror, origin, have = hashlib.sha256(url.encode()).hexdigest(), recall(target), received(target)
    if origin is None or origin.mirror != mirror or not origin.validator:
        have = 0
    headers = {"Accept-Encoding": "identity"}  # offsets and lengths must count the file's own bytes
    if origin is not None and have:
        headers |= {"Range": f"bytes={have}-", "If-Range": origin.validator}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        resumed = bool(have) and response.status_code in (206, 416)
        if origin is not None and resumed:
            origin = _continue(response, target, origin, have)
        else:
            origin = _begin(response, target, mirror)
        if response.status_code != 416:
            _receive(response, target, origin, progress)
    _finish(target, origin, sha256, resumed)


def _begin(response: requests.Response, target: Path, mirror: str) -> Origin:
    """Start over: forget what was there, and remember what the server says of the file."""
    status = response.status_code
    if status in (408, 429) or status >= 500:
        wait = _retry_after(response.headers.get("Retry-After", ""))
        if wait > LONGEST_WAIT:
            raise _MirrorFailedError(f"the server answered {status} {response.reason}, and asks to wait {wait:.0f} s")
        raise _AttemptFailedError(f"the server answered {status} {response.reason}", wait)
    if status != 200:
        raise _MirrorFailedError(f"the server answered {status} {response.reason}")
    discard(target)  # in this order: a part file never lies beside another file's description
    length = response.headers.get("Content-Length", "")
    known = int(length) if re.fullmatch(r"\d{1,18}", length) else None
    origin = Origin(mirror, _validator(response), known, response.headers.get("Content-MD5", ""))
    description_of(target).write_text(json.dumps(asdict(origin)))
    return origin


def _retry_after(text: str) -> float:
    """Seconds to wait: a number of them, or a date (RFC 9110, 10.2.3); 0 for anything else."""
    if re.fullmatch(r"\d{1,9}", text.strip()):
        return float(text)
    try:
        return max(parsedate_to_datetime(text).timestamp() - time.time(), 0)
    except (TypeError, ValueError, OverflowError):
        return 0


def _continue(response: requests.Response, target: Path, origin: Origin, have: int) -> Origin:
    """Check that the answer to a Range request is the rest of the very same file, or that nothing is left (416)."""
    pattern = rf"bytes {have}-\d+/(\d{{1,18}}|\*)" if response.status_code == 206 else r"bytes \*/(\d{1,18})"
    found = re.fullmatch(pattern, response.headers.get("Content-Range", "").strip())
    total = int(found[1]) if found and found[1] != "*" else origin.length
    complete = response.status_code == 416 and total == have  # a length that was promised too long ends here
    same_file = _validator(response) in ("", origin.validator) and origin.length in (None, total)
    if complete or (found and same_file and response.status_code == 206):
        return replace(origin, length=total)
    discard(target)
    raise _AttemptFailedError("the file changed on the server while it was being downloaded")


def _receive(response: requests.Response, target: Path, origin: Origin, progress: bool) -> None:
    """Append the body to the part file."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        discard(target)
        raise _MirrorFailedError(f"the server insists on {encoding} compression")
    have = received(target)
    need = max((origin.length or 0) - have, 0)
    if need < WORTH_A_LINE:
        check_space(need, target.parent)
    else:
        announce(need, 1, target.parent)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not progress)
    with part_of(target).open("ab") as file, bar:
        task = bar.add_task(target.name, total=origin.length, completed=have)
        for chunk in _chunks(response):
            if file.tell() == 0:
                _refuse_impostor(chunk, target)
            file.write(chunk)
            bar.advance(task, len(chunk))
        file.flush()
        os.fsync(file.fileno())


def _chunks(response: requests.Response) -> Iterator[bytes]:
    """The body as it arrives. Reading whole chunks would wait for ever on a server that sends a byte now and then."""
    read = getattr(response.raw, "read1", response.raw.read)  # urllib3 1 has no read1
    arrived, since = 0, time.monotonic()
    while chunk := read(CHUNK):
        yield chunk
        arrived += len(chunk)
        if (seconds := time.monotonic() - since) >= SLOWEST[1]:
            if arrived < SLOWEST[0]:
                raise _AttemptFailedError(f"the server sent only {arrived} bytes in {seconds:.0f} s")
            arrived, since = 0, time.monotonic()


def _refuse_impostor(start: bytes, target: Path) -> None:
    start = start[:512].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for signature, what in IMPOSTORS.items():
        if start.startswith(signature):
            discard(target)
            raise _MirrorFailedError(f"the server sent {what}")


def _finish(target: Path, origin: Origin, sha256: str, resumed: bool) -> None:
    """Check length and digests, then give the file its name."""
    part, have = part_of(target), received(target)
    if origin.length is not None and have < origin.length:
        raise _AttemptFailedError(f"the connection ended after {have} of {origin.length} bytes")
    problem = "the server sent an empty file" if have == 0 else ""
    if origin.length is not None and have > origin.length:
        problem = f"the server sent {have} bytes and had promised {origin.length}"
    elif origin.md5 and (found := base64.b64encode(_digest(part, "md5")).decode()) != origin.md5.strip():
        problem = f"its Content-MD5 is {found}, and the server had promised {origin.md5}"
    elif sha256 and (found := _digest(part, "sha256").hex()) != sha256:
        problem = f"its SHA-256 is {found}, and not the known {sha256}"
    if not problem:
        part.replace(target)
    discard(target)
    if problem:  # two halves of different files look like this too: then a whole download is worth one more try
        raise _AttemptFailedError(problem) if resumed else _MirrorFailedError(problem)


def _digest(path: Path, algorithm: str) -> bytes:
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.digest()


def _validator(response: requests.Response) -> str:
    """What If-Range accepts: a strong ETag, else Last-Modified (RFC 9110, 13.1.5), else nothing."""
    etag = response.headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")


def _reason(error: Exception) -> str:
    """The innermost cause in one line: requests wraps urllib3's errors, which wrap the socket's."""
    for _ in range(8):
        inner = [e for e in (getattr(error, "reason", None), *error.args) if isinstance(e, Exception)]
        if not inner:
            break
        error = inner[0]
    return " ".join(str(error).split()) or type(error).__name__


def shown(url: str) -> str:
    """A URL without user, password and query, which may hold secrets, for messages."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise SourceError(f"{url}: is no valid address ({error}).") from None
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def safe_name(url: str) -> str:
    """A file name for what a URL serves: its last segment, and nothing that a file system or a shell could misread."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", unquote(urlsplit(url).path).rpartition("/")[2]).lstrip(".-")
    return name[-120:] or "download"


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def check_space(need: int, folder: Path) -> int:
    """Free bytes on the disk of `folder` (which need not exist yet). Raises SourceError if `need` bytes do not fit."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if need > free:
        raise SourceError(
            f"{folder}: {size_text(need)} are to be downloaded and the disk has {size_text(free)} free. Free some "
            "space, or move the cache (LOADSTONE_CACHE for URLs and OpenAI's files, HF_HOME for the hub's)."
        )
    return free


def announce(need: int, count: int, folder: Path) -> None:
    """Say what will be downloaded and where to: `need` bytes in `count` files. Raises as `check_space`."""
    free = check_space(need, folder)
    files = "1 file" if count == 1 else f"{count} files"
    say(f"will download {size_text(need)} ({files}) to {folder}; {size_text(free)} free")


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock file beside `target`: one process downloads, the others wait and then find the file."""
    from filelock import FileLock, Timeout

    lock = FileLock(f"{target}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"{target}: another process is downloading it; waiting")
            lock.acquire()
    except OSError as error:
        raise SourceError(
            f"{target.parent}: cannot be written ({error}). Set LOADSTONE_CACHE to another folder."
        ) from None
    try:
        yield
    finally:
        lock.release()
