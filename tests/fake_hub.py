"""A hub on loopback, true enough for huggingface_hub's real client: repositories, revisions, gates, and file storage.

The calls that the client (2.4) makes: GET /api/models/REPO/revision/REV, GET /api/models/REPO/tree/COMMIT, then for
each file HEAD and GET /REPO/resolve/COMMIT/FILE.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import loadstone
from loopback import Handler, Loopback, Reply, Seen, served


@dataclass
class Repo:
    """`commits`: commit hash -> files; `refs`: branch or tag -> commit. A gated one tells its files, and keeps them."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    gated: bool = False
    listed_sizes: dict[str, int] = field(default_factory=dict)


def repo(files: dict[str, bytes]) -> Repo:
    """A repository with one commit on `main`."""
    commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
    return Repo({commit: files}, {"main": commit})


def refused(status: int, code: str, message: str = "") -> Reply:
    return Reply(status, b"{}", {"X-Error-Code": code, "X-Error-Message": message or code})


class FakeHub(Loopback):
    """`repos` by name. `down` makes every answer that status."""

    def __init__(self) -> None:
        super().__init__()
        self.repos: dict[str, Repo] = {}
        self.down = 0
        self.fallback = self.handle

    def handle(self, seen: Seen) -> Reply:
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/(.+)", seen.path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", seen.path)
        match = api or file
        if self.down or not match:
            return Reply(self.down or 404)
        if match[1] not in self.repos:  # the real hub tells strangers no more than this
            return refused(401, "RepoNotFound", "Repository not found")
        found = self.repos[match[1]]
        revision = match[3] if api else match[2]
        commit = found.refs.get(revision, revision)
        if commit not in found.commits:
            return refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = found.commits[commit]
        if file:
            return self.file(found, commit, files, file[3])(seen)
        return self.info(match[1], found, commit, files) if match[2] == "revision" else self.tree(files)

    def info(self, name: str, found: Repo, commit: str, files: dict[str, bytes]) -> Reply:
        sizes = {file: len(body) for file, body in files.items()} | found.listed_sizes
        siblings = [{"rfilename": file, "size": size} for file, size in sizes.items()]
        about = {"id": name, "modelId": name, "sha": commit, "siblings": siblings}
        return Reply(200, json.dumps(about).encode(), {"Content-Type": "application/json"})

    def tree(self, files: dict[str, bytes]) -> Reply:
        entries = [
            {"type": "file", "path": file, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
            for file, body in files.items()
        ]
        return Reply(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})

    def file(self, found: Repo, commit: str, files: dict[str, bytes], name: str) -> Handler:
        if found.gated:
            return lambda seen: refused(403, "GatedRepo", "Access to model is restricted")
        if name not in files:
            return lambda seen: refused(404, "EntryNotFound")
        return served(files[name], etag=f'"{hashlib.sha256(files[name]).hexdigest()}"', X_Repo_Commit=commit)

    def got(self) -> list[str]:
        """Names of the files whose bytes were sent."""
        return sorted(
            seen.path.split("/resolve/")[1].partition("/")[2]
            for seen in self.seen
            if seen.method == "GET" and "/resolve/" in seen.path
        )


@dataclass
class Outcome:
    """What a call of `loadstone.checkpoint.hub.pull` in a process of its own came to."""

    path: Path | None
    error: str
    told: str


CHILD = """
import contextlib, io, json, sys
home, sources, revision, offline, before = json.loads(sys.argv[1])
sys.path.insert(0, home)
from loadstone.checkpoint.hub import pull
from loadstone.errors import SourceError
exec(before)
for source in sources:
    path, problem = "", ""
    with contextlib.redirect_stderr(io.StringIO()) as told:
        try:
            path = str(pull(source, revision=revision, offline=offline))
        except SourceError as error:
            problem = str(error)
    print(json.dumps([path, problem, told.getvalue()]))
"""


def pull_each(
    endpoint: str,
    home: Path,
    sources: list[str],
    *,
    revision: str | None = None,
    offline: bool | None = None,
    before: str = "",
) -> list[Outcome]:
    """`pull` each source in one fresh interpreter, in `home`: the hub's client reads its settings at import.

    `before` is code to run first.
    """
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))} | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home / "hf"),
        "LOADSTONE_CACHE": str(home / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    task = json.dumps([str(Path(loadstone.__file__).parents[1]), sources, revision, offline, before])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CHILD, task],
        env=env, cwd=home, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    return [Outcome(Path(path) if path else None, error, told) for path, error, told in answers]


def pull(
    endpoint: str,
    home: Path,
    source: str,
    *,
    revision: str | None = None,
    offline: bool | None = None,
    before: str = "",
) -> Outcome:
    """As `pull_each`, for one source."""
    return pull_each(endpoint, home, [source], revision=revision, offline=offline, before=before)[0]
