"""Files of a HuggingFace hub repository: only those that are needed, and from the local cache if they are all there.

The library `huggingface_hub` moves the bytes, keeps its own cache, and honours HF_ENDPOINT, HF_TOKEN, HF_HOME and
HF_HUB_OFFLINE. Here is what it leaves open: which files, whether they fit, and what its errors mean for the user.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import SourceError

# Weight formats, best first, with the stem that `transformers` gives them; a folder of such files opens as a whole.
WEIGHTS = {".safetensors": "model", ".bin": "pytorch_model", ".pth": "", ".pt": "", ".gguf": ""}
TRAINER_STATE = frozenset({"training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth"})
TOKENIZERS = frozenset({"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.bpe", "vocab.txt"})
BESIDE = TOKENIZERS | {
    *("config.json", "generation_config.json", "params.json", "hparams.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "encoder.json"),
    *("chat_template.jinja", "chat_template.json"),
}
SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})(?P<suffix>\.\w+)")

# What the library's errors mean, by the name of the error or of its nearest base: its HTTP errors are requests',
# httpx's or httpx2's, depending on its version, and share no class.
MEANING = {
    "GatedRepoError": "is gated. Ask for access at {page}, then log in with `hf auth login` (or set HF_TOKEN).",
    "RepositoryNotFoundError": "does not exist on {endpoint}, or is private. Check the spelling; for a private one log "
    "in with `hf auth login` (or set HF_TOKEN).",
    "DisabledRepoError": "has been disabled by its author or by the hub.",
    "RevisionNotFoundError": "has no revision {revision!r}. Its branches, tags and commits are at {page}/tree/main; "
    "without @revision you get `main`.",
    "HFValidationError": "is no name that the hub accepts: {text}",
    "OfflineModeIsEnabled": "is not in the cache, and HF_HUB_OFFLINE forbids to ask {endpoint}.",
    "LocalEntryNotFoundError": "could not be reached: {text} Try again; what has arrived is kept.",
    "ConnectError": "could not be reached at {endpoint} ({text}). Check the network, the proxy and HF_ENDPOINT.",
    "ConnectionError": "could not be reached at {endpoint} ({text}). Check the network, the proxy and HF_ENDPOINT.",
    "TimeoutException": "could not be reached at {endpoint}: no answer in time. Try again later.",
    "Exception": "could not be downloaded from {endpoint} ({kind}: {text}). Try again; what has arrived is kept.",
}


class UnavailableError(SourceError):
    """A hub repository, revision or file that could not be had: absent, forbidden, out of reach, or offline."""


@dataclass(frozen=True)
class HubName:
    """`owner/name`, `owner/name@revision`, `owner/name:file`, `owner/name@revision:file`."""

    repo: str
    revision: str = "main"
    file: str = ""

    @staticmethod
    def parse(text: str) -> HubName | None:
        """Read a name as typed; None if it is not of that form."""
        found = re.fullmatch(r"(\w[\w.-]*/[\w.-]+)(?:@([^:@\s]+))?(?::([^:]+))?", text, re.ASCII)
        return HubName(found[1], found[2] or "main", found[3] or "") if found else None

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return self.repo + revision + (f":{self.file}" if self.file else "")


@dataclass(frozen=True)
class Choice:
    """The files that are needed, and which of them is to be opened (empty: the folder that holds them)."""

    files: tuple[str, ...]
    opens: str


def choose(listing: Mapping[str, int], name: HubName) -> Choice:
    """Choose among a repository's files (path -> bytes): weights in the best one format, with all their shards, and
    beside them configuration, tokenizer and chat template.

    Raises:
        SourceError: no weights, several to choose from (all are listed), a missing shard, or no file `name.file`.
    """
    if name.file and name.file not in listing:
        near = get_close_matches(name.file, listing, n=3, cutoff=0.3) or sorted(listing)[:8]
        raise UnavailableError(f"{name.repo} has no file {name.file!r}; the nearest are: {', '.join(near)}.")
    groups = _groups(listing)
    plain = next((key for key, group in groups.items() if name.file in group), name.file) or _best(
        groups, listing, name
    )
    weights = groups.get(plain, [plain])
    shard = SHARD.fullmatch(weights[0])
    if shard and len(weights) != int(shard["count"]):
        raise SourceError(f"{name}: {len(weights)} of the {int(shard['count'])} shards of {plain} are there.")
    path = PurePosixPath(plain)
    wanted = BESIDE | {f"{path.name}.index.json"}
    beside = [
        file for file in listing if PurePosixPath(file).parent == path.parent and PurePosixPath(file).name in wanted
    ]
    as_folder = not name.file and path.suffix != ".gguf" and (shard or path.stem == WEIGHTS[path.suffix])
    return Choice((*weights, *beside), "" if as_folder else name.file or weights[0])


def _groups(listing: Mapping[str, int]) -> dict[str, list[str]]:
    """Weight files by name, shards under the name that the whole would have: `model.safetensors` -> its files."""
    groups: dict[str, list[str]] = {}
    for file in sorted(listing):
        shard = SHARD.fullmatch(file)
        key = shard["stem"] + shard["suffix"] if shard else file
        if PurePosixPath(key).suffix in WEIGHTS and (key not in listing or key == file):
            groups.setdefault(key, []).append(file)
    return groups


def _best(groups: Mapping[str, list[str]], listing: Mapping[str, int], name: HubName) -> str:
    """The key of the one group to download: the best format, there the usual name, or the only one."""
    from .wording import size_text

    for suffix, stem in WEIGHTS.items():
        found = [key for key in groups if key.endswith(suffix) and "/" not in key and key not in TRAINER_STATE]
        if stem + suffix in found or len(found) == 1:
            return stem + suffix if stem + suffix in found else found[0]
        if found:
            sizes = {key: sum(listing[file] for file in groups[key]) for key in found}
            found.sort(key=sizes.__getitem__)
            offered = ", ".join(f"{groups[key][0]} ({size_text(sizes[key])})" for key in found)
            example = f"{HubName(name.repo, name.revision, groups[found[0]][0])}"
            raise SourceError(f"{name}: holds several models: {offered}. Name one, as in {example}")
    files = ", ".join(sorted(listing)[:12]) or "nothing"
    raise SourceError(f"{name}: has no weights of a kind that can be read ({', '.join(WEIGHTS)}). It holds: {files}.")


def hub_path(name: HubName, *, offline: bool, progress: bool, tell: Callable[[str], None]) -> Path:
    """The local folder (or the one file) of a hub repository; downloads only what the cache lacks.

    Raises:
        SourceError: see `choose` and `MEANING`; or the files do not fit on the disk.
    """
    from .download import say

    cached = _cached(name, lenient=offline)
    if cached:
        tell(f"{name}: all files are in the hub's cache; nothing to download")
        return cached
    if offline:
        raise UnavailableError(f"{name} is not (or not wholly) in the hub's cache, and offline mode is on.")
    try:
        return _download(name, progress)
    except UnavailableError as error:
        cached = _cached(name, lenient=True)
        if cached is None:
            raise
        say(f"{error} Using the files in the cache.")
        return cached


def _cached(name: HubName, *, lenient: bool) -> Path | None:
    """What the cache answers without any network; None if something is missing.

    The library records the listing of what it downloaded; then completeness is certain. Of files that another
    program left there is no listing: they count if model, configuration and tokenizer are there, or if `lenient`.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name.repo, revision=name.revision, local_files_only=True, allow_patterns=[]))
    except (OSError, ValueError):  # not there; a name that is no name is explained by `_download`
        return None
    listing = _recorded_listing(name)
    present = {path.relative_to(folder).as_posix(): 0 for path in folder.rglob("*") if path.is_file()}
    try:
        choice = choose(present if listing is None else listing, name)
    except SourceError:
        if lenient and listing is not None:
            raise
        return None
    certain = listing is not None or lenient
    if choice.opens.endswith(".gguf"):
        certain |= bool(name.file)
    else:
        certain |= "config.json" in present and not TOKENIZERS.isdisjoint(present)
    return folder / choice.opens if certain and present.keys() >= set(choice.files) else None


def _recorded_listing(name: HubName) -> dict[str, int] | None:
    try:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
    except ImportError:  # a library that keeps no listing
        return None
    try:
        return {file.path: file.size for file in get_cached_repo_tree(name.repo, revision=name.revision)}
    except CachedRepoTreeNotFoundError:
        return None


def _download(name: HubName, progress: bool) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
    from huggingface_hub.utils.tqdm import tqdm

    from .download import announce

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

    with _explained(name):
        info = HfApi().model_info(name.repo, revision=name.revision, files_metadata=True)
    listing = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    files = choose(listing, name).files
    absent = [file for file in files if not isinstance(try_to_load_from_cache(name.repo, file, revision=info.sha), str)]
    if absent:
        announce(sum(listing[file] for file in absent), len(absent), Path(constants.HF_HUB_CACHE))
    with _explained(name):
        folder = Path(
            snapshot_download(
                name.repo,
                revision=name.revision,
                allow_patterns=[glob.escape(file) for file in files],
                tqdm_class=None if progress else Silent,
            )
        )
    absent = [file for file in files if not (folder / file).is_file()]
    if absent:  # the library falls back to what it has when the connection goes
        raise UnavailableError(f"{name} came without {', '.join(absent)}. Try again; what has arrived is kept.")
    return folder / choose(listing, name).opens


@contextmanager
def _explained(name: HubName) -> Iterator[None]:
    """Turn whatever the library raises into one paragraph with the next step."""
    from huggingface_hub import constants

    try:
        yield
    except Exception as error:
        meaning = next(MEANING[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in MEANING)
        text = meaning.format(
            page=f"{constants.ENDPOINT}/{name.repo}",
            endpoint=constants.ENDPOINT,
            revision=name.revision,
            kind=type(error).__name__,
            text=" ".join(str(error).split()),
        )
        raise UnavailableError(f"hub repository {name} {text}") from None
