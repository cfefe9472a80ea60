"""Reading a foreign config: typed look-ups that name the key, and the refusal of fields that nobody handled.

A config field that changes the function but is ignored makes a model that is almost right. So each reader says
which keys it used, which are harmless, and everything else must be absent, null or false.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from ..errors import ConfigError
from .base import GPTConfig


class Fields:
    """A foreign config while it is being read; remembers which keys were looked at.

    Args:
        values: the parsed config.
        where: file name or the like, for errors.
        ignore: keys that the caller knows to be harmless.
    """

    def __init__(self, values: Mapping[str, Any], where: str, ignore: Iterable[str] = ()) -> None:
        self.values, self.where, self.ignore = values, where, frozenset(ignore)
        self.seen: set[str] = set()

    def _get(self, key: str, default: Any, kinds: tuple[type, ...], kind_name: str) -> Any:
        self.seen.add(key)
        value = self.values.get(key)
        if value is None:
            if default is ...:
                raise ConfigError(f"{self.where}: the field {key!r} is missing.")
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ConfigError(f"{self.where}: {key!r} should be {kind_name}, found {value!r}.")
        return value

    def integer(self, key: str, default: Any = ...) -> Any:
        value = self._get(key, default, (int, float), "a whole number")
        if isinstance(value, float):
            if not value.is_integer():  # NaN and infinity are none either
                raise ConfigError(f"{self.where}: {key!r} should be a whole number, found {value!r}.")
            value = int(value)
        return value

    def count(self, key: str, default: Any = ...) -> int:
        """A whole number of at least 1."""
        value = self.integer(key, default)
        if value < 1:
            raise ConfigError(f"{self.where}: {key!r} should be 1 or more, found {value!r}.")
        return int(value)

    def number(self, key: str, default: Any = ...) -> float:
        value = self._get(key, default, (int, float), "a number")
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{self.where}: {key!r} is too large a number.") from None

    def flag(self, key: str, default: Any = ...) -> bool:
        return bool(self._get(key, default, (bool,), "true or false"))

    def text(self, key: str, default: Any = ...) -> str:
        return str(self._get(key, default, (str,), "a text"))

    def table(self, key: str) -> Mapping[str, Any]:
        value: Mapping[str, Any] = self._get(key, {}, (Mapping,), "a table")
        return value

    def ids(self, key: str) -> tuple[int, ...]:
        """A token id or a list of them; absent or null is none."""
        self.seen.add(key)
        value = self.values.get(key)
        found = () if value is None else value if isinstance(value, (list, tuple)) else (value,)
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in found):
            raise ConfigError(f"{self.where}: {key!r} should be a token id or a list of them, found {value!r}.")
        return tuple(item for item in found if item >= 0)

    def must_be(self, key: str, *allowed: Any) -> None:
        """Refuse a known field whose other values ask for something that the model does not do."""
        self.seen.add(key)
        if key in self.values and self.values[key] not in allowed:
            wanted = " or ".join(repr(value) for value in allowed)
            raise ConfigError(
                f"{self.where}: {key!r} is {self.values[key]!r}; this model only does {wanted}, "
                "so its answers would be wrong. Refused."
            )

    def build(self, **values: Any) -> GPTConfig:
        """The config; what it finds contradictory is told with the name of the file."""
        try:
            return GPTConfig(**values)
        except ConfigError as error:
            raise ConfigError(f"{self.where}: {error}") from None

    def replace(self, config: GPTConfig, **values: Any) -> GPTConfig:
        """The config with other values, and the same word on what is contradictory."""
        return self.build(**{field.name: getattr(config, field.name) for field in fields(config)} | values)

    def refuse_others(self, harmless: Iterable[str] = ()) -> None:
        """Raise ConfigError for fields that nobody looked at, unless empty, false, harmless, or named by the caller."""
        known = self.seen | set(harmless) | self.ignore
        unknown = [key for key, value in self.values.items() if key not in known and not _is_off(value)]
        if unknown:
            listed = ", ".join(f"{key} = {str(self.values[key])[:60]}" for key in unknown)
            raise ConfigError(
                f"{self.where}: {listed}: not known here, and a field that changes the function must not be dropped "
                "silently. If you know it to be harmless, name it: "
                + " ".join(f"--ignore-config {key}" for key in unknown)
            )


def _is_off(value: Any) -> bool:
    """A feature that is not there; 0 is a value like any other."""
    return value is None or value is False or value in ("", [], {})
