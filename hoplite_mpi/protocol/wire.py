"""Messages of the object protocol as bytes (msgpack)."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgpack

from hoplite_mpi.ids import ObjectID
from hoplite_mpi.meta import Meta
from hoplite_mpi.protocol import messages

__all__ = ["decode", "encode"]

#: classes that travel as records; a class's place in this list is its tag, so ranks of one run must run one release
_CLASSES: list[type[Any]] = [getattr(messages, name) for name in messages.__all__ if name != "Message"]
_TAGS: dict[type[Any], int] = {cls: tag for tag, cls in enumerate(_CLASSES)}
_FIELDS: dict[type[Any], tuple[str, ...]] = {cls: tuple(f.name for f in dataclasses.fields(cls)) for cls in _CLASSES}

_OBJECT_ID, _META, _SET, _RECORD = 1, 2, 3, 4


def encode(message: messages.Message) -> bytes:
    """Return *message* as bytes; inverse of `decode`."""
    return _pack(message)


def decode(data: bytes | bytearray | memoryview) -> messages.Message:
    """Return the message that *data* is; ValueError if it isn't one."""
    message = _unpack(data)
    if not isinstance(message, messages.Message):
        raise ValueError(f"{len(data)} bytes decode to a {type(message).__name__}, which is not a message")
    return message


def _pack(value: Any) -> bytes:
    return msgpack.packb(value, default=_default, strict_types=True)


def _unpack(data: bytes | bytearray | memoryview) -> Any:
    return msgpack.unpackb(data, ext_hook=_hook, use_list=False, strict_map_key=False)


def _default(value: Any) -> Any:
    if isinstance(value, ObjectID):
        return msgpack.ExtType(_OBJECT_ID, bytes(value))
    if isinstance(value, tuple):  # strict_types leaves tuples to us
        return list(value)
    if isinstance(value, Meta):
        return msgpack.ExtType(_META, _pack(value.to_wire()))
    if isinstance(value, frozenset):
        return msgpack.ExtType(_SET, b"".join(sorted(map(bytes, value))))
    tag = _TAGS.get(type(value))
    if tag is None:
        raise TypeError(f"a {type(value).__name__} can't be sent")
    return msgpack.ExtType(_RECORD, _pack([tag, *(getattr(value, name) for name in _FIELDS[type(value)])]))


def _hook(code: int, data: bytes) -> Any:
    if code == _OBJECT_ID:
        return ObjectID(data)
    if code == _META:
        return Meta.from_wire(msgpack.unpackb(data, use_list=True))
    if code == _SET:
        return frozenset(ObjectID(data[i : i + ObjectID.SIZE]) for i in range(0, len(data), ObjectID.SIZE))
    if code == _RECORD:
        tag, *values = _unpack(data)
        return _CLASSES[tag](*values)
    raise ValueError(f"unknown extension code {code} in a message: do all ranks run the same release?")
