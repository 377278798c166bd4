"""Where outputs are that the controller knows, as an agent is told."""

from __future__ import annotations

from dataclasses import dataclass

from exoflow_hpc import records
from exoflow_hpc.rank.messages import InputPlace
from hoplite_mpi.meta import Meta

__all__ = ["Output", "place_of"]


@dataclass(frozen=True, slots=True)
class Output:
    """An output that is in memory. data: the bytes of a small one; else it is an object of the store."""

    attempt: int
    meta: Meta
    data: bytes | None
    rank: int
    #: of a small one, once it is known
    checksum: str = ""

    def place(self, task: int) -> InputPlace:
        """Return where consumers find it."""
        if self.data is None:
            return InputPlace(task, "memory", self.attempt)
        return InputPlace(task, "inline", self.attempt, self.meta.to_wire(), self.data)


def place_of(task: int, record: records.TaskCommitted) -> InputPlace:
    """Return where consumers find a committed output."""
    place = record.location
    if isinstance(place, records.Inline):
        return InputPlace(task, "inline", record.attempt, record.meta, place.data)
    return InputPlace(task, "checkpoint", record.attempt, file=place.file, entry=place.entry, checksum=record.checksum)
