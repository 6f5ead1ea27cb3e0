"""The bytes of an ONNX file as plain messages: the part of protobuf that our models use, and nothing else."""

import struct
from collections.abc import Iterator, Mapping
from typing import Any

MOST_PARTS = 200_000  # messages and numbers of the file; the networks' have 3,000
Message = dict[str, Any]


class NotOurs(ValueError):
    """The file has something in it that `asc-ray export` does not write; the message says what."""


# The fields of each message: number -> (name, kind, repeated). The kinds: "int" (varint), "float" (4 bytes), "bytes",
# "text", "ints" (varints, packed or not), or another message.
_SCHEMA: Mapping[str, Mapping[int, tuple[str, str, bool]]] = {
    "model": {
        1: ("ir_version", "int", False),
        2: ("producer_name", "text", False),
        3: ("producer_version", "text", False),
        7: ("graph", "graph", False),
        8: ("opset", "opset", True),
        14: ("metadata", "entry", True),
    },
    "opset": {1: ("domain", "text", False), 2: ("version", "int", False)},
    "entry": {1: ("key", "text", False), 2: ("value", "text", False)},
    "graph": {
        1: ("node", "node", True),
        2: ("name", "text", False),
        5: ("weight", "tensor", True),
        11: ("input", "value", True),
        12: ("output", "value", True),
    },
    "node": {
        1: ("input", "text", True),
        2: ("output", "text", True),
        3: ("name", "text", False),
        4: ("kind", "text", False),
        5: ("attribute", "attribute", True),
        7: ("domain", "text", False),
    },
    "attribute": {
        1: ("name", "text", False),
        2: ("f", "float", False),
        3: ("i", "int", False),
        4: ("s", "bytes", False),
        8: ("ints", "ints", True),
        20: ("type", "int", False),
    },
    "tensor": {
        1: ("dims", "ints", True),
        2: ("type", "int", False),
        8: ("name", "text", False),
        9: ("raw", "bytes", False),
    },
    "value": {1: ("name", "text", False), 2: ("type", "type", False), 4: ("metadata", "entry", True)},
    "type": {1: ("tensor", "tensor type", False)},
    "tensor type": {1: ("element", "int", False), 2: ("shape", "shape", False)},
    "shape": {1: ("dim", "dimension", True)},
    "dimension": {1: ("size", "int", False), 2: ("parameter", "text", False)},
}
_WIRES = {"int": 0, "float": 5}  # all other kinds: 2, a length and as many bytes


def parse(kind: str, data: memoryview, left: list[int]) -> Message:
    """Parse a message; `left` counts the parts that the file may still have. Raises NotOurs."""
    schema = _SCHEMA[kind]
    found: Message = {name: [] for name, _, repeated in schema.values() if repeated}
    for number, wire, value in _fields(data):
        left[0] -= 1
        if left[0] < 0:
            raise NotOurs(f"more than {MOST_PARTS:,} parts")
        if number not in schema:
            raise NotOurs(f"field {number} of a {kind}")
        name, of, repeated = schema[number]
        if of == "ints" and wire == 2:
            found[name] += _packed(value, left)
            continue
        if wire != (0 if of == "ints" else _WIRES.get(of, 2)):
            raise NotOurs(f"field {number} of a {kind} in another encoding")
        read = _value(of, value, left)
        if repeated:
            found[name].append(read)
        elif name in found:
            raise NotOurs(f"field {number} of a {kind} twice")
        else:
            found[name] = read
    return found


def _value(kind: str, value: Any, left: list[int]) -> Any:
    if kind in ("int", "ints"):
        return value
    if kind == "float":
        return struct.unpack("<f", value)[0]
    if kind == "bytes":
        return bytes(value)
    if kind == "text":
        try:
            return str(value, "utf-8")
        except UnicodeDecodeError:
            raise NotOurs("a name that is no text") from None
    return parse(kind, value, left)


def _fields(data: memoryview) -> Iterator[tuple[int, int, Any]]:
    """Yield (number, wire type, value) of each field of a message; numbers are signed, all else is bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        value: Any
        if wire == 0:
            value, at = _varint(data, at)
            value -= (value >> 63) << 64
        elif wire in (1, 2, 5):
            size = {1: 8, 5: 4}.get(wire, 0)
            if wire == 2:
                size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
            if at > len(data):
                raise NotOurs("cut short")
        else:
            raise NotOurs("no ONNX")
        yield number, wire, value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise NotOurs("cut short")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                break
            return value, at
    raise NotOurs("a number of more than 64 bits")


def _packed(data: memoryview, left: list[int]) -> list[int]:
    numbers, at = [], 0
    left[0] -= len(data)
    if left[0] < 0:
        raise NotOurs(f"more than {MOST_PARTS:,} parts")
    while at < len(data):
        value, at = _varint(data, at)
        numbers.append(value - ((value >> 63) << 64))
    return numbers
