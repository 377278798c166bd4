"""Frames of a journal file: what one group commit wrote, and how much of a file can be believed.

A frame is all records of one fsync::

    magic (4) | length (4, little-endian) | blake2b-8 of epoch, offset, length, payload | payload: msgpack array of
    records

So a torn group is one invalid frame. The next frame is only ever written after the fsync of the one before, so a valid
frame after an invalid one proves that durable bytes were altered.
"""

from __future__ import annotations

import hashlib
import re
import struct
from dataclasses import dataclass, field
from typing import Any

import msgpack

__all__ = ["MAX_PAYLOAD", "Scan", "frame", "prefix_digest", "scan"]

_MAGIC = b"\xf7XJ\x01"
_HEAD = struct.Struct("<4sI8s")
_ZEROS = re.compile(rb"\0*\Z")
MAX_PAYLOAD = 1 << 30


def _check(epoch: int, offset: int, payload: bytes | memoryview) -> bytes:
    # bound to its place, so that a block of another file or offset is never taken for this one
    seed = struct.pack("<QQI", epoch, offset, len(payload))
    return hashlib.blake2b(payload, digest_size=8, key=seed).digest()


def frame(epoch: int, offset: int, packed: list[bytes]) -> bytes:
    """Return the frame of already packed records that is to stand at *offset* of the file of *epoch*."""
    payload = msgpack.Packer().pack_array_header(len(packed)) + b"".join(packed)
    return _HEAD.pack(_MAGIC, len(payload), _check(epoch, offset, payload)) + payload


def prefix_digest(data: bytes | memoryview) -> str:
    """Return the checksum of an accepted prefix, as it stands in a seal: blake2b-16 in hex."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


@dataclass(slots=True)
class Scan:
    """How much of a journal file is valid."""

    records: list[dict[str, Any]] = field(default_factory=list)
    #: bytes of valid frames from the beginning
    accepted: int = 0
    #: bytes after them that are neither valid nor preallocated zeros: a torn tail, or corruption
    torn: int = 0
    #: offset of the next valid frame after torn bytes; None: there is none, so they are a torn tail
    valid_after: int | None = None


def scan(epoch: int, data: bytes) -> Scan:
    """Parse the file of *epoch*. Never raises for bad bytes: the result says what they are."""
    result = Scan()
    while True:
        payload = _valid(epoch, data, result.accepted)
        if payload is None:
            break
        result.records.extend(msgpack.unpackb(payload, strict_map_key=False))
        result.accepted += _HEAD.size + len(payload)
    if _ZEROS.match(data, result.accepted):
        return result
    result.torn = len(data) - result.accepted
    place = data.find(_MAGIC, result.accepted + 1)
    while place >= 0:
        if _valid(epoch, data, place) is not None:
            result.valid_after = place
            break
        place = data.find(_MAGIC, place + 1)
    return result


def _valid(epoch: int, data: bytes, offset: int) -> bytes | None:
    start = offset + _HEAD.size
    if start > len(data):
        return None
    magic, length, check = _HEAD.unpack_from(data, offset)
    if magic != _MAGIC or length > len(data) - start:
        return None
    payload = data[start : start + length]
    return payload if _check(epoch, offset, payload) == check else None
