"""Errors of hoplite_mpi. One root; told apart by whose fault it is."""

from __future__ import annotations

__all__ = [
    "ClosedError",
    "CorruptObjectError",
    "EvictedError",
    "GetTimeoutError",
    "HopliteError",
    "ObjectDeletedError",
    "ObjectExistsError",
    "ObjectLostError",
    "PeerLostError",
    "ReduceError",
    "StoreFullError",
]


class HopliteError(Exception):
    """Root of all errors of hoplite_mpi."""


class GetTimeoutError(HopliteError, TimeoutError):
    """A wait ended before what it waited for came. The object may still come: ask again."""


class ObjectDeletedError(HopliteError):
    """The object was deleted; its id can't be used again."""


class ObjectExistsError(HopliteError):
    """Other bytes were put under a known id. Objects are immutable: use a new id."""


class ObjectLostError(HopliteError):
    """Every copy of the object is gone and none is coming. Put it again to wake those who wait."""


class CorruptObjectError(HopliteError):
    """Bytes of the object came with a wrong checksum again and again, from every rank that was asked. A later get asks again."""


class ReduceError(HopliteError):
    """A reduce can't be carried out: sources differ in dtype or shape, or the operation failed."""


class StoreFullError(HopliteError, MemoryError):
    """Neither /dev/shm nor `memory_limit` has room for the object. Nothing was stored."""


class ClosedError(HopliteError):
    """The store was used after *you* closed it. See `EvictedError` for when the others closed it."""


class EvictedError(HopliteError):
    """The others went on without this rank, so its store is closed. See `ClosedError`, `PeerLostError`."""


class PeerLostError(HopliteError):
    """A peer that this call can't do without is gone: *the world's* fault, not yours. See `ClosedError`."""
