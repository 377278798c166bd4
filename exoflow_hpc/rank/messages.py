"""What the controller and the agents of a workflow say to each other.

Each message carries the controller's epoch (R10), and is sent with the number of the run it is about: all ranks count their runs alike.
"""

from __future__ import annotations

import dataclasses
import pickle
from dataclasses import dataclass
from typing import Any, get_args

import msgpack

from exoflow_hpc.errors import ExoFlowError
from exoflow_hpc.outcome import Ended

__all__ = [
    "Begin",
    "Cancel",
    "Corrupt",
    "End",
    "Failed",
    "Finished",
    "Hello",
    "InputPlace",
    "Message",
    "Over",
    "Progress",
    "Ready",
    "Recall",
    "Renew",
    "Renewed",
    "Report",
    "Run",
    "Shared",
    "Survey",
    "Write",
    "WriteFailed",
    "Written",
    "decode",
    "encode",
    "pack_error",
]


@dataclass(frozen=True, slots=True)
class InputPlace:
    """Where an input is: in ``"memory"`` (attempt), ``"inline"`` (meta, data) or a ``"checkpoint"`` (file, entry, checksum).

    ``"kept"``: in a checkpoint too, but perhaps void by now: for a rollback only. So is what it refers to, which is never ``"inline"``.
    """

    task: int
    kind: str
    attempt: int = 0
    meta: list[Any] | None = None
    data: bytes = b""
    file: str = ""
    entry: str = ""
    checksum: str = ""
    #: not an output, but the index-th object that the attempt has put; -1: an output
    index: int = -1
    #: what it refers to, in the order in which its bytes count them: positions in `Run.references`
    refers: list[int] = dataclasses.field(default_factory=list)


# -- controller to agent -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Begin:
    """Take part in a workflow: its spec is in *workflow_dir*. Answered by `Ready`."""

    epoch: int
    workflow_id: str
    workflow_dir: str
    #: name of this run of the workflow, which no other has: a workflow that was deleted can be made anew with id and epoch.
    #: Until the first dot it is the name of the job (`bootstrap.Place.run`)
    run: str
    #: seconds of the lease that the rank has to hold while it runs tasks; 0: none, since there are no external ones
    lease: float = 0.0
    #: (name of the task, attempt) of what the rank has reported (`Report`) that counts: it goes on with that only; None: with nothing
    kept: list[list[Any]] | None = None
    #: [task, location, meta, checksum] of what tasks have continued with: the spec is expanded by it
    continued: list[list[Any]] = dataclasses.field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Survey:
    """A controller takes over (E16): say what there is of the run, and take nothing of an older one any more. Answered by `Report`."""

    epoch: int
    workflow_dir: str
    run: str


@dataclass(frozen=True, slots=True)
class Renewed:
    """The rank may go on for as long as a lease is, from *sent* on."""

    epoch: int
    #: as in `Renew`
    sent: float


@dataclass(frozen=True, slots=True)
class Run:
    """Run an attempt of a task; answered by `Finished` or `Failed`. Inputs are in the order of `TaskSpec.data`."""

    epoch: int
    task: int
    attempt: int
    incarnation: int
    #: undo its effect instead: the inputs are what it was given, and after them its output, if it is known
    rollback: bool
    #: its lineage (`succession.Lineage`): [name of the task, attempt, committed] each; None: not known
    stand: list[Any] | None
    inputs: list[InputPlace]
    #: all that they refer to, directly or not
    references: list[InputPlace] = dataclasses.field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Recall:
    """Return an attempt that waits for a worker; no answer if it has begun."""

    epoch: int
    task: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop an attempt; answered by what became of it."""

    epoch: int
    task: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Write:
    """Write an output to a checkpoint; answered by `Written` or `WriteFailed`. index: as in `InputPlace`."""

    epoch: int
    task: int
    attempt: int
    index: int = -1


@dataclass(frozen=True, slots=True)
class End:
    """The run of the workflow is over; answered by `Over`. Epoch 0: whatever the epoch that a rank knows, it may know none."""

    epoch: int
    #: a final status, or RESUMABLE
    status: str
    #: pickled error, empty if there is none
    error: bytes = b""
    #: of the workflow, empty if it was not begun
    workflow_id: str = ""
    workflow_dir: str = ""

    def to_error(self) -> ExoFlowError | None:
        """Return the error."""
        return pickle.loads(self.error) if self.error else None

    def to_ended(self) -> Ended:
        """Return what a rank knows that was told."""
        return Ended(self.workflow_id, self.status, self.to_error(), directory=self.workflow_dir)


# -- agent to controller -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ready:
    """The agent has the spec and *slots* workers. Asks for a lease as well, as `Renew` does."""

    epoch: int
    slots: int
    sent: float = 0.0
    #: `heartbeat.identity` of the rank
    process: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Shared:
    """As `scheduler_events.RankShared`."""

    epoch: int
    others: int
    sharing: int
    #: [task, attempt] each
    waiting: list[list[int]] = dataclasses.field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Report:
    """What the rank has of a run: outputs that it has made, and attempts that go on; without workers it takes no part, or not yet.

    By names of the tasks: indices may be others now.

    What it has to say of them otherwise comes after the next `Begin`.
    """

    epoch: int
    slots: int
    #: [task, attempt, meta, nbytes, data, stand] each, as in `Finished` and `Run`
    made: list[list[Any]]
    #: [task, attempt, stand] each
    running: list[list[Any]]


@dataclass(frozen=True, slots=True)
class Renew:
    """The agent asks for its lease to be renewed; *sent*: when it asked, by its own clock. Answered by `Renewed`."""

    epoch: int
    sent: float


@dataclass(frozen=True, slots=True)
class Finished:
    """The output of an attempt is in *data*, or else an object of the store."""

    epoch: int
    task: int
    attempt: int
    meta: list[Any]
    nbytes: int
    data: bytes | None
    seconds: float
    #: [task, attempt, index] of what it refers to, in the order in which its bytes count them
    refers: list[list[int]] = dataclasses.field(default_factory=list)
    #: [index, meta, what it refers to itself] of each object that the attempt has put and that the output leads to
    puts: list[list[Any]] = dataclasses.field(default_factory=list)
    #: as in `worker.protocol.TaskDone`
    continued: str = ""


@dataclass(frozen=True, slots=True)
class Failed:
    """An attempt ended without an output; kind as in `scheduler_events.TaskFailed`, error as `failure.Failure.to_wire`."""

    epoch: int
    task: int
    attempt: int
    kind: str
    error: list[Any]
    retryable: bool
    #: [task, attempt] of inputs that can't be had, or [task, attempt, index] of what they refer to
    missing: list[list[int]]


@dataclass(frozen=True, slots=True)
class Written:
    """An output is durable in *file*, but not committed."""

    epoch: int
    task: int
    attempt: int
    file: str
    entry: str
    checksum: str
    nbytes: int
    meta: list[Any]
    #: as in `Write`
    index: int = -1


@dataclass(frozen=True, slots=True)
class WriteFailed:
    """An output could not be made durable. lost: it was not to be had any more."""

    epoch: int
    task: int
    attempt: int
    text: str
    errno: int
    lost: bool
    #: as in `Write`
    index: int = -1


@dataclass(frozen=True, slots=True)
class Progress:
    """A running task says how far it is."""

    epoch: int
    task: int
    attempt: int
    fraction: float
    text: str


@dataclass(frozen=True, slots=True)
class Corrupt:
    """The committed output of *attempt*, or an object that it has put, is not what was written (R11): *text* names the file."""

    epoch: int
    task: int
    attempt: int
    text: str
    #: as in `InputPlace`
    index: int = -1


@dataclass(frozen=True, slots=True)
class Hello:
    """The rank takes part in the run: what was sent to it before may not have been heard. Epoch 0.

    asks: to be answered by what is known of the run: `End`, or another one of these.
    """

    epoch: int = 0
    asks: bool = False
    #: id, directory and run (`Begin`) if the rank was told to begin; else empty
    begun: list[str] = dataclasses.field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Over:
    """`End` has come, or a `Begin` after it: the controller's rank may leave, and need not wait for this one."""

    epoch: int


_ToAgent = Begin | Survey | Renewed | Run | Cancel | Recall | Write | End
_ToController = (
    Ready | Shared | Report | Renew | Finished | Failed | Written | WriteFailed | Progress | Corrupt | Hello | Over
)
Message = _ToAgent | _ToController

_KINDS: tuple[type[Any], ...] = (*get_args(_ToAgent), *get_args(_ToController))
_NUMBERS = {kind: number for number, kind in enumerate(_KINDS)}
_FIELDS = {kind: tuple(field.name for field in dataclasses.fields(kind)) for kind in (*_KINDS, InputPlace)}


def pack_error(error: ExoFlowError | None) -> bytes:
    """Return what `End.error` holds; errors of this package pickle."""
    return b"" if error is None else pickle.dumps(error)


def encode(run: int, message: Message) -> bytes:
    """Return the bytes of a message about a run."""
    kind = type(message)
    values = [getattr(message, name) for name in _FIELDS[kind]]
    if kind is Run:
        values[-2:] = [
            [[getattr(one, name) for name in _FIELDS[InputPlace]] for one in places] for places in values[-2:]
        ]
    packed: bytes = msgpack.packb([run, _NUMBERS[kind], *values])
    return packed


def decode(data: bytes) -> tuple[int, Message]:
    """Return the number of the run and the message of its bytes."""
    run, number, *values = msgpack.unpackb(data)
    kind = _KINDS[number]
    if kind is Run:
        values[-2:] = [[InputPlace(*one) for one in places] for places in values[-2:]]
    return run, kind(*values)
