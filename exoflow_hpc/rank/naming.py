"""Names of what a run has in the object store."""

from __future__ import annotations

from hoplite_mpi import ObjectID

__all__ = ["output_id"]


def output_id(run: str, task: str, attempt: int) -> ObjectID:
    """Return the id of the output of an attempt in a run (`messages.Begin.run`). No two attempts share one (R10c)."""
    return ObjectID.from_name(f"exoflow/{run}/{task}/{attempt}")
