"""Attributes of modules that are others for a while: how kernels are hung on a model and taken off again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_UNSET: Any = object()


@contextmanager
def replaced(settings: Iterable[tuple[nn.Module, str, Any]]) -> Iterator[None]:
    """Meanwhile each named attribute of a module has the given value; afterwards all are as before.

    It is for attributes that are no parameters and no modules, for which nn.Module's own way of setting them costs as
    much as a product of a small model.
    """
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module, name, value in settings:
            own = vars(module)
            before.append((own, name, own.get(name, _UNSET)))
            own[name] = value
        yield
    finally:
        for own, name, value in reversed(before):
            if value is _UNSET:
                own.pop(name, None)
            else:
                own[name] = value
