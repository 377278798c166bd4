"""Names of objects."""

from __future__ import annotations

import hashlib
import os
from functools import total_ordering

__all__ = ["ObjectID"]


@total_ordering
class ObjectID:
    """Immutable 16-byte name of an object: hashable, ordered, picklable, equal on every rank.

    Make one with `ObjectID.from_name` (the same on every rank) or `ObjectID.random`.
    """

    SIZE = 16
    __slots__ = ("_bytes", "_hash")

    def __init__(self, raw: bytes) -> None:
        raw = bytes(raw)
        if len(raw) != self.SIZE:
            raise ValueError(f"an ObjectID has {self.SIZE} bytes, not {len(raw)}: use from_name() for names")
        self._bytes = raw
        self._hash = hash(raw)

    @classmethod
    def from_name(cls, name: str) -> ObjectID:
        """Return the id of that name: the BLAKE2b hash of it, so the same on every rank."""
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, not {type(name).__name__}")
        return cls(hashlib.blake2b(name.encode(), digest_size=cls.SIZE).digest())

    @classmethod
    def random(cls) -> ObjectID:
        """Return an id that nobody else has."""
        return cls(os.urandom(cls.SIZE))

    @classmethod
    def from_hex(cls, text: str) -> ObjectID:
        """Return the id whose `hex()` is *text*."""
        return cls(bytes.fromhex(text))

    def hex(self) -> str:
        """Return the id as 32 hexadecimal digits."""
        return self._bytes.hex()

    def __bytes__(self) -> bytes:
        return self._bytes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectID) and self._bytes == other._bytes

    def __lt__(self, other: ObjectID) -> bool:
        return self._bytes < other._bytes

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"ObjectID({self.hex()[:12]}…)"

    def __reduce__(self) -> tuple[type[ObjectID], tuple[bytes]]:
        return ObjectID, (self._bytes,)
