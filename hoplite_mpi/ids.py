"""Names of objects."""

from __future__ import annotations

import hashlib
import os
import struct
from functools import total_ordering

__all__ = ["ObjectID"]


@total_ordering
class ObjectID:
    """Immutable 16-byte name of an object: hashable, ordered, picklable, equal on every rank.

    Make one with `ObjectID.from_name` (the same on every rank) or `ObjectID.random`.
    """

    SIZE = 16
    #: an id that says which process alone puts under it: mark, rank, incarnation, a hash or random bytes
    _MARK = b"\xfeHM"
    _ORIGIN = struct.Struct(">3s3s3s7s")
    __slots__ = ("_bytes", "_hash")

    def __init__(self, raw: bytes) -> None:
        raw = bytes(raw)
        if len(raw) != self.SIZE:
            raise ValueError(f"an ObjectID has {self.SIZE} bytes, not {len(raw)}: use from_name() for names")
        self._bytes = raw
        self._hash = hash(raw)

    @classmethod
    def from_name(cls, name: str, origin: tuple[int, int] | None = None) -> ObjectID:
        """Return the id of that name: the BLAKE2b hash of it, so the same on every rank.

        origin: (rank, incarnation), each below 2^24, of the only process that will put under it: then whoever waits for the object
        knows that it can't come any more once this process and every copy are gone.
        """
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, not {type(name).__name__}")
        digest = hashlib.blake2b(name.encode(), digest_size=cls.SIZE).digest()
        return cls(_unmarked(digest) if origin is None else cls._owned(origin, digest))

    @classmethod
    def random(cls, origin: tuple[int, int] | None = None) -> ObjectID:
        """Return an id that nobody else has. origin: as in `from_name`."""
        raw = os.urandom(cls.SIZE)
        return cls(_unmarked(raw) if origin is None else cls._owned(origin, raw))

    @classmethod
    def _owned(cls, origin: tuple[int, int], raw: bytes) -> bytes:
        rank, incarnation = origin
        if not (0 <= rank < 1 << 24 and 0 <= incarnation < 1 << 24):
            raise ValueError(f"rank {rank}, incarnation {incarnation}: an id can say only those below {1 << 24}")
        return cls._ORIGIN.pack(cls._MARK, rank.to_bytes(3, "big"), incarnation.to_bytes(3, "big"), raw[:7])

    @property
    def origin(self) -> tuple[int, int] | None:
        """(rank, incarnation) of the only process that puts under this id; None: anybody may."""
        mark, rank, incarnation, _ = self._ORIGIN.unpack(self._bytes)
        return (int.from_bytes(rank, "big"), int.from_bytes(incarnation, "big")) if mark == self._MARK else None

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
        shown = self._bytes[-6:] if self.origin is not None else self._bytes[:6]
        return f"ObjectID({shown.hex()}…)"

    def __reduce__(self) -> tuple[type[ObjectID], tuple[bytes]]:
        return ObjectID, (self._bytes,)


def _unmarked(raw: bytes) -> bytes:
    return raw if not raw.startswith(ObjectID._MARK) else bytes(1) + raw[1:]
