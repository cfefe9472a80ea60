"""Symbolic links: which are followed.

A path that the user types is followed wherever it leads, and so is a link that lies in the user's own folder: people
keep weights on another disk. A name that comes out of a file is another matter: an index, a `checkpoint` file or the
name of a split GGUF's part must not make Loadstone read (and convert, and publish) somebody's private file, although a
repository or an archive from the network may hold links. So the file of such a name must really lie in the folder of
the file that names it, or where that one really lies: HuggingFace's cache consists of links into one folder of blobs.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import FormatError


def named_by(path: Path, name: str) -> Path:
    """The file `name` in the folder of `path`, which names it; it need not exist.

    Raises FormatError if it is a link out of there, or lies behind one.
    """
    file = path.parent / name
    try:
        real, homes = _real(file), (_real(path.parent), _real(path).parent)
    except ValueError:  # half a surrogate pair, say: no file is called that
        return file
    if not any(home in real.parents for home in homes):
        raise FormatError(
            path,
            f"it names {name!r}, which is a link out of its folder, to {real}, and Loadstone does not follow it there.",
            f"If that is yours, copy it here; or have {path.name} lie beside it, and a link to it here.",
        )
    return file


def leads_out(path: Path) -> Path | None:
    """Where a file of the user's folder really lies, if that is elsewhere; None within HuggingFace's cache."""
    real = _real(path)
    homes = (_real(path.parent), _real(path.parent.parent.parent / "blobs"))
    return None if any(home in real.parents for home in homes) else real


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # unlike Path.resolve, it takes loops of links
