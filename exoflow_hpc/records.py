"""What the journal of a workflow says: one frozen dataclass for each type of record."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from exoflow_hpc import checksums
from exoflow_hpc.errors import UnknownRecordError

__all__ = [
    "INLINE_LIMIT",
    "InCheckpoint",
    "Inline",
    "Location",
    "Record",
    "Reference",
    "RollbackStarted",
    "TaskCommitted",
    "TaskDeviated",
    "TaskExpired",
    "TaskFailed",
    "TaskRolledBack",
    "TaskStarted",
    "TaskVoided",
    "WorkflowFinished",
    "WorkflowStarted",
    "decode",
    "encode",
    "kept_input",
    "location_of",
    "seen_as",
]

#: outputs up to this many bytes are kept in the journal itself
INLINE_LIMIT = 4096


@dataclass(frozen=True, slots=True)
class Inline:
    """The output's bytes are in the record itself."""

    data: bytes

    def to_wire(self) -> dict[str, Any]:
        return {"inline": self.data}


@dataclass(frozen=True, slots=True)
class InCheckpoint:
    """The output's bytes are entry *entry* of file *file* in the workflow's checkpoints directory."""

    file: str
    entry: str

    def to_wire(self) -> dict[str, Any]:
        return {"file": self.file, "entry": self.entry}


Location = Inline | InCheckpoint


def location_of(wire: dict[str, Any]) -> Location:
    """Return the location of its plain form, as `to_wire` gives it."""
    return Inline(wire["inline"]) if "inline" in wire else InCheckpoint(wire["file"], wire["entry"])


@dataclass(frozen=True, slots=True)
class Reference:
    """An object that an output refers to, put by an *attempt* of a task as its *index*-th (R7), durable at *location*."""

    task: str
    attempt: int
    index: int
    location: InCheckpoint
    checksum: str
    nbytes: int
    meta: list[Any]
    #: what it refers to itself: positions in the same list
    refers: list[int] = dataclasses.field(default_factory=list)

    def to_wire(self) -> list[Any]:
        where = [self.location.file, self.location.entry, self.checksum, self.nbytes, self.meta, self.refers]
        return [self.task, self.attempt, self.index, *where]

    @classmethod
    def from_wire(cls, wire: list[Any]) -> Reference:
        task, attempt, index, file, entry, *rest = wire
        return cls(task, attempt, index, InCheckpoint(file, entry), *rest)


def seen_as(checksum: str, references: Sequence[Reference], continued: str = "") -> str:
    """Return what tells an output from others together with all that it refers to: its own checksum if that is nothing (R12).

    For what a task continues with, that is the *fingerprint*: pickles of the same functions may differ.
    """
    if continued:
        return checksums.CONTINUED + continued
    if not references:
        return checksum
    digest = hashlib.blake2b(digest_size=16)
    for one in (checksum, *(reference.checksum for reference in references)):
        digest.update(one.encode() + b"\n")
    return f"with-{digest.hexdigest()}"


def kept_input(wire: list[Any]) -> tuple[Location, list[Any], str, list[Reference]]:
    """Return location, meta, checksum and references of one of `TaskStarted.inputs`."""
    place, meta, checksum, *references = wire
    return location_of(place), meta, checksum, [Reference.from_wire(one) for one in (references or [[]])[0]]


@dataclass(frozen=True, slots=True)
class WorkflowStarted:
    """A controller began to run the workflow, in the epoch of the file that this stands in."""

    type: ClassVar[str] = "workflow_started"
    host: str
    pid: int
    #: seconds since 1970 on the controller's clock; for display only, nothing is decided by it
    time: float
    #: as in `messages.Begin`: the same for controllers of which one has taken over from the other
    run: str = ""


@dataclass(frozen=True, slots=True)
class TaskStarted:
    """An external task is about to be dispatched (R10a)."""

    type: ClassVar[str] = "task_started"
    task_id: str
    attempt: int
    incarnation: int
    rank: int = -1
    #: `heartbeat.identity` of the rank's process; empty: unknown
    process: dict[str, Any] = dataclasses.field(default_factory=dict)
    #: where the outputs are that it takes, in the order of `TaskSpec.data`, for its rollback: [location, meta, checksum] each, and the
    #: wire form of what it refers to, if that is anything; empty for a task without one
    inputs: list[Any] = dataclasses.field(default_factory=list)
    #: as in `TaskCommitted`
    consumed: list[Any] = dataclasses.field(default_factory=list)
    stand: list[Any] | None = dataclasses.field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RollbackStarted:
    """A rollback is about to be dispatched: from here on somebody may be at it."""

    type: ClassVar[str] = "rollback_started"
    task_id: str
    attempt: int
    #: as in `TaskStarted`
    process: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TaskRolledBack:
    """The effect of a task was undone (R5, R10a): it may begin anew, in *incarnation*, with another idempotency key (R9)."""

    type: ClassVar[str] = "task_rolled_back"
    task_id: str
    #: the new one
    incarnation: int


@dataclass(frozen=True, slots=True)
class TaskDeviated:
    """A task that is taken to be deterministic gave another output than before: from here on it counts as one that varies (R12)."""

    type: ClassVar[str] = "task_deviated"
    task_id: str
    message: str


@dataclass(frozen=True, slots=True)
class TaskCommitted:
    """K(t) (R1): every byte of the output is durable at *location*, and of all that it refers to, before this record is written."""

    type: ClassVar[str] = "task_committed"
    task_id: str
    attempt: int
    incarnation: int
    location: Location
    #: `serialize.checksum` of meta and bytes, in hex
    checksum: str
    nbytes: int
    #: `Meta.to_wire()` of the output
    meta: list[Any]
    #: [task, checksum] of outputs that went in and were not committed then, as far as they are known: made again, they have to be the same
    #: (R12)
    consumed: list[Any] = dataclasses.field(default_factory=list)
    #: all that the output refers to, directly (in the order in which its bytes count them) or not. Some may have been written for another
    #: output, in this epoch, or in an older one if it stood when this one began: files that were never without a name since
    references: list[Reference] = dataclasses.field(default_factory=list)
    #: lineage of the attempt (`succession.Lineage`): [task, attempt, committed] each; None: not known
    stand: list[Any] | None = dataclasses.field(default_factory=list)
    #: not empty: the output is the `WorkflowSpec` that the task continues with (see `expansion`); the fingerprint of that
    continued: str = ""

    @property
    def seen_as(self) -> str:
        """What tells the output, with all that it refers to, from another one."""
        return seen_as(self.checksum, self.references, self.continued)

    @property
    def places(self) -> list[Location]:
        """Where all of its bytes are."""
        return [self.location, *(one.location for one in self.references)]

    @property
    def files(self) -> set[str]:
        """The checkpoint files that its bytes are in."""
        return {place.file for place in self.places if isinstance(place, InCheckpoint)}


@dataclass(frozen=True, slots=True)
class TaskVoided:
    """The committed output of *attempt* counts as absent from here on, until the task is committed anew.

    Its checkpoint is not what was written (R11), or it was computed from a value that is lost (R5).
    """

    type: ClassVar[str] = "task_voided"
    task_id: str
    attempt: int
    #: why, for people: it names the file
    message: str
    #: the second reason: what comes anew may be another value, as may all that it was computed from
    lost: bool = False


@dataclass(frozen=True, slots=True)
class TaskExpired:
    """The committed output of *attempt* was removed by retention: nobody needs it, and it can be computed again."""

    type: ClassVar[str] = "task_expired"
    task_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class TaskFailed:
    """A task failed for good. *error* is the pickled exception, *message* its text."""

    type: ClassVar[str] = "task_failed"
    task_id: str
    attempt: int
    incarnation: int
    message: str
    error: bytes = b""


@dataclass(frozen=True, slots=True)
class WorkflowFinished:
    """The workflow ended: status is SUCCESSFUL, FAILED or CANCELED; *error* is a pickled exception or empty."""

    type: ClassVar[str] = "workflow_finished"
    status: str
    message: str = ""
    error: bytes = b""


Record = (
    WorkflowStarted
    | TaskStarted
    | RollbackStarted
    | TaskRolledBack
    | TaskDeviated
    | TaskCommitted
    | TaskVoided
    | TaskExpired
    | TaskFailed
    | WorkflowFinished
)

_TYPES: dict[str, Any] = {kind.type: kind for kind in get_args(Record)}
_FIELDS = {kind: tuple(field.name for field in dataclasses.fields(kind)) for kind in get_args(Record)}


def encode(record: Record) -> dict[str, Any]:
    """Return the plain dict to append to the journal; inverse of `decode`."""
    wire: dict[str, Any] = {"type": record.type}
    for name in _FIELDS[type(record)]:
        wire[name] = getattr(record, name)
    if "location" in wire:
        wire["location"] = wire["location"].to_wire()
    if not wire.get("continued", True):
        del wire["continued"]
    references = wire.pop("references", None)
    if references:  # without any, older versions can read it
        wire["references"] = [one.to_wire() for one in references]
    return wire


def decode(wire: dict[str, Any]) -> Record:
    """Return the record of a plain dict. UnknownRecordError if a newer version wrote it."""
    kind = _TYPES.get(wire.get("type", ""))
    if kind is None:
        raise UnknownRecordError(
            f"the journal has a record of type {wire.get('type')!r}: a newer exoflow_hpc wrote it, use that version"
        )
    values = {name: value for name, value in wire.items() if name != "type"}
    if "location" in values:
        values["location"] = location_of(values["location"])
    if "references" in values:
        values["references"] = [Reference.from_wire(one) for one in values["references"]]
    try:
        record: Record = kind(**values)
    except TypeError as error:
        raise UnknownRecordError(
            f"a record of type {wire['type']!r} has other fields than this exoflow_hpc knows: {error}"
        ) from error
    return record
