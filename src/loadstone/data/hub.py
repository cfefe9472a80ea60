"""Hub data sets as documents, through the library `datasets` (extra `data`), streamed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ..errors import SourceError

_NAME = re.compile(r"hub:(?P<name>[^/:]+/[^/:]+)(?:/(?P<config>[^/:]+))?(?::(?P<split>[^/:]+))?")


def hub_rows(source: str) -> Iterator[dict[str, Any]]:
    """The rows of `hub:owner/name[/config][:split]`; split `train` by default.

    Raises SourceError if the library is not installed, or cannot reach or read the data set.
    """
    found = _NAME.fullmatch(source)
    if not found:
        raise SourceError(f"{source}: a data set of the hub is written hub:owner/name[/config][:split].")
    try:
        import datasets
    except ImportError:
        raise SourceError(
            f'{source}: reading data sets of the hub needs the library `datasets`: pip install "loadstone[data]".'
        ) from None
    try:
        split = found["split"] or "train"
        rows = iter(datasets.load_dataset(found["name"], found["config"], split=split, streaming=True))
    except Exception as error:
        raise SourceError(f"{source}: the data set cannot be opened ({error}).") from None
    number = 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise SourceError(f"{source}: row {number} cannot be read ({error}).") from None
        yield row
        number += 1
