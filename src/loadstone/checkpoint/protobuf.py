"""The protocol buffer wire format: just enough to read TensorFlow's checkpoint headers, without its schema compiler.

Source: protobuf.dev, "Encoding". A message is a row of fields, each a tag (field number and wire type) and a value.
"""

from __future__ import annotations

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types; 3 and 4 (groups) are not used by TensorFlow


class CorruptError(ValueError):
    """Bytes that break their format. Whoever knows the file's name turns this into a FormatError."""


def varint(data: bytes | memoryview, pos: int) -> tuple[int, int]:
    """Unsigned 64-bit integer in groups of 7 bits, lowest first; returns (value, position after it)."""
    value = 0
    for shift in range(0, 70, 7):
        if pos >= len(data):
            raise CorruptError("a variable-length integer runs past the end of its data.")
        byte = data[pos]
        pos += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80 and value < 1 << 64:
            return value, pos
    raise CorruptError("a variable-length integer is longer than 64 bits.")


class Message:
    """The fields of one message by number. Unknown fields are kept and ignored, as protobuf demands."""

    def __init__(self, data: bytes) -> None:
        self._fields: dict[int, list[int | bytes]] = {}
        pos = 0
        while pos < len(data):
            tag, pos = varint(data, pos)
            value, pos = _value(data, pos, wire=tag & 7)
            self._fields.setdefault(tag >> 3, []).append(value)

    def integer(self, number: int, default: int = 0) -> int:
        """Signed 64-bit value of a field (the last one wins); `default` where the field is absent."""
        value = self._fields.get(number, [default])[-1]
        if isinstance(value, bytes):
            raise CorruptError(f"field {number} of a protobuf message should be a number and is not.")
        return value - (1 << 64) if value >= 1 << 63 else value

    def messages(self, number: int) -> list[Message]:
        """Every embedded message of a (repeated) field."""
        values = self._fields.get(number, [])
        if not self.has_bytes(number) and values:
            raise CorruptError(f"field {number} of a protobuf message should be a message and is not.")
        return [Message(value) for value in values if isinstance(value, bytes)]

    def has_bytes(self, number: int) -> bool:
        """Whether the field is there, and length-delimited (a string, bytes or a message)."""
        values = self._fields.get(number, [])
        return bool(values) and all(isinstance(value, bytes) for value in values)


def _value(data: bytes, pos: int, wire: int) -> tuple[int | bytes, int]:
    if wire == VARINT:
        return varint(data, pos)
    size, start = varint(data, pos) if wire == BYTES else ({FIXED32: 4, FIXED64: 8}.get(wire, -1), pos)
    if size < 0:
        raise CorruptError(f"a protobuf field has the unknown wire type {wire}.")
    end = start + size
    if end > len(data):
        raise CorruptError("a protobuf field runs past the end of its message.")
    content = data[start:end]
    return (content if wire == BYTES else int.from_bytes(content, "little")), end
