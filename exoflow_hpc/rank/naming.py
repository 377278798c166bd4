"""Ids of the objects that attempts of tasks leave in the store. No two attempts share one (R10c)."""

from __future__ import annotations

import hashlib

from hoplite_mpi.ids import ObjectID

__all__ = ["is_of_run", "output_id", "reference_id"]

#: bytes by which what was made in a run is told from all else
_MARK = 6


def output_id(run: str, task: str, attempt: int) -> ObjectID:
    """Return the id of the output of an attempt in a run (`Begin.run`)."""
    return _marked(run, f"exoflow/{run}/{task}/{attempt}")


def reference_id(run: str, output: ObjectID, index: int) -> ObjectID:
    """Return the id of the index-th object that was put by the attempt with that output."""
    return _marked(run, f"exoflow/{output.hex()}/{index}")


def is_of_run(oid: ObjectID, run: str) -> bool:
    """Whether an attempt of that run has made the object."""
    return bytes(oid).startswith(_mark(run))


def _marked(run: str, name: str) -> ObjectID:
    return ObjectID(_mark(run) + bytes(ObjectID.from_name(name))[_MARK:])


def _mark(run: str) -> bytes:
    return b"\xfdR" + hashlib.blake2b(run.encode(), digest_size=_MARK - 2).digest()
