"""Where outputs are that the controller knows, as an agent is told."""

from __future__ import annotations

from dataclasses import dataclass

from exoflow_hpc import records, serialize
from exoflow_hpc.rank.messages import InputPlace
from hoplite_mpi.meta import Meta

__all__ = ["NOTHING", "Output", "place_of"]

#: what is given for the output of a task that has continued
NOTHING = serialize.pack(None)


@dataclass(frozen=True, slots=True)
class Output:
    """An output that is in memory. data: the bytes of a small one; else it is an object of the store."""

    attempt: int
    meta: Meta
    data: bytes | None
    rank: int
    #: of a small one, once it is known
    checksum: str = ""
    #: as in `worker.protocol.TaskDone`
    continued: str = ""

    def place(self, task: int) -> InputPlace:
        """Return where consumers find it."""
        if self.data is None:
            return InputPlace(task, "memory", self.attempt)
        return InputPlace(task, "inline", self.attempt, self.meta.to_wire(), self.data)


def place_of(task: int, record: records.TaskCommitted) -> InputPlace:
    """Return where consumers find a committed output."""
    place = record.location
    if record.continued:  # who continues is computed from it, and needs nothing of it
        return InputPlace(task, "inline", record.attempt, NOTHING.meta.to_wire(), NOTHING.to_bytes())
    if isinstance(place, records.Inline):
        return InputPlace(task, "inline", record.attempt, record.meta, place.data)
    return InputPlace(task, "checkpoint", record.attempt, file=place.file, entry=place.entry, checksum=record.checksum)
