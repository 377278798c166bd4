"""Ids of the objects that attempts of tasks leave in the store. No two attempts share one (R10c)."""

from __future__ import annotations

import hashlib

from hoplite_mpi.ids import ObjectID

__all__ = ["is_reference", "output_id", "reference_id"]

#: bytes by which what was put in a run is told from all else
_MARK = 6


def output_id(run: str, task: str, attempt: int) -> ObjectID:
    """Return the id of the output of an attempt in a run (`Begin.run`)."""
    return ObjectID.from_name(f"exoflow/{run}/{task}/{attempt}")


def reference_id(run: str, output: ObjectID, index: int) -> ObjectID:
    """Return the id of the index-th object that was put by the attempt with that output."""
    name = ObjectID.from_name(f"exoflow/{output.hex()}/{index}")
    return ObjectID(_mark(run) + bytes(name)[_MARK:])


def is_reference(oid: ObjectID, run: str) -> bool:
    """Whether an attempt of that run has put the object."""
    return bytes(oid).startswith(_mark(run))


def _mark(run: str) -> bytes:
    return b"\xfdR" + hashlib.blake2b(run.encode(), digest_size=_MARK - 2).digest()
