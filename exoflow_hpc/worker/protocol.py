"""What a rank and its worker processes say to each other, as dataclasses with a msgpack form."""

from __future__ import annotations

import pickle
import signal
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from hoplite_mpi.ids import ObjectID
from hoplite_mpi.meta import Meta

__all__ = [
    "LETTER_LIMIT",
    "ArenaInput",
    "Began",
    "Given",
    "InlineInput",
    "Input",
    "Progress",
    "Put",
    "Reply",
    "TaskCancelled",
    "TaskCrashed",
    "TaskDone",
    "TaskFailed",
    "TaskIdentity",
    "TaskRequest",
    "TaskResult",
    "describe_exit",
]


#: bytes of a request that fits into a letter box, several of them at a time
LETTER_LIMIT = 16 << 10


@dataclass(frozen=True, slots=True)
class InlineInput:
    """An input whose bytes travel with the request: what `serialize.unpack(meta, data)` takes."""

    meta: Meta
    data: bytes
    #: what it refers to, in the order in which its bytes count them: positions in `TaskRequest.references`
    refers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ArenaInput:
    """An input that is a sealed object in the node's shared-memory arena; its bytes are mapped, never sent."""

    oid: ObjectID
    version: int = 0
    #: as in `InlineInput`
    refers: tuple[int, ...] = ()


Input = InlineInput | ArenaInput


@dataclass(frozen=True, slots=True)
class Given:
    """An object that some input refers to, directly or not: the *index*-th that an attempt of a task has put."""

    task: str
    attempt: int
    index: int
    input: Input


@dataclass(frozen=True, slots=True)
class Put:
    """An object that the task has put: sealed in the arena under `naming.reference_id`, whatever its size."""

    index: int
    meta: Meta
    #: (task, attempt, index) of what it refers to, in the order in which its bytes count them
    refers: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class TaskIdentity:
    """Which attempt of which task this is: what `exoflow_hpc.context()` says inside of the task."""

    workflow_id: str
    task_id: str
    incarnation: int = 0
    attempt: int = 0
    epoch: int = 0

    def to_wire(self) -> list[Any]:
        return [self.workflow_id, self.task_id, self.incarnation, self.attempt, self.epoch]

    @classmethod
    def from_wire(cls, wire: list[Any]) -> TaskIdentity:
        return cls(*wire)


@dataclass(frozen=True, slots=True)
class TaskRequest:
    """One attempt of a task, with all that a worker process needs to run it.

    `function`, `retry`, `args` and `blobs` are those of `TaskSpec`, by key of `WorkflowSpec.blobs`.
    """

    identity: TaskIdentity
    #: key of the function's blob
    function: str
    #: pickle of (args, kwargs) with placeholders ("t", index of a task) and ("b", key of a blob)
    args: bytes
    #: key → pickle, all that is needed; each goes to each worker once
    blobs: Mapping[str, bytes]
    #: outputs of other tasks, by index of the task
    inputs: Mapping[int, Input]
    #: name of the output, in the arena if it is larger than `inline_limit`; contains incarnation and attempt
    output: ObjectID
    #: key of the blob with the exception types to retry; empty: none
    retry: str = ""
    #: bytes; an output up to this size comes back in the reply
    inline_limit: int = 64 * 1024
    #: directories for the begin of `sys.path`, where the task's modules are imported from
    sys_path: tuple[str, ...] = ()
    #: key of the blob with the function that undoes the task's effect, to be called instead; empty: run the task
    rollback: str = ""
    #: which of the inputs is the output that the task had, for its rollback; -1: it isn't known
    result: int = -1
    #: seconds after which the worker is killed, from when it begins; None: never
    timeout: float | None = None
    #: bytes that the task and what it starts may allocate; None: no limit
    memory: int | None = None
    #: the output is (value, None): what is caught is made by the controller as (None, error)
    catch: bool = False
    #: name of the run, part of the ids of what is put
    run: str = ""
    #: all that the inputs refer to
    references: tuple[Given, ...] = ()

    def to_wire(self, leave_out: Container[str] = ()) -> list[Any]:
        """Return the msgpack-able form, without the blobs *leave_out*, which the worker has already."""
        return [
            self.identity.to_wire(),
            self.function,
            self.args,
            {key: data for key, data in self.blobs.items() if key not in leave_out},
            {index: _input_to_wire(one) for index, one in self.inputs.items()},
            bytes(self.output),
            self.retry,
            self.inline_limit,
            list(self.sys_path),
            self.rollback,
            self.result,
            self.timeout,
            self.memory,
            self.catch,
            self.run,
            [[one.task, one.attempt, one.index, _input_to_wire(one.input)] for one in self.references],
        ]

    @classmethod
    def from_wire(cls, wire: list[Any]) -> TaskRequest:
        """Inverse of `to_wire`."""
        identity, function, args, blobs, inputs, output, retry, inline_limit, sys_path, *rest = wire
        given = tuple(Given(task, attempt, index, _input_from_wire(one)) for task, attempt, index, one in rest.pop())
        return cls(
            TaskIdentity.from_wire(identity),
            function,
            args,
            blobs,
            {index: _input_from_wire(one) for index, one in inputs.items()},
            ObjectID(output),
            retry,
            inline_limit,
            tuple(sys_path),
            *[*rest, given],
        )


def _input_to_wire(one: Input) -> list[Any]:
    if isinstance(one, InlineInput):
        return [0, one.meta.to_wire(), one.data, one.refers]
    return [1, bytes(one.oid), one.version, one.refers]


def _input_from_wire(wire: list[Any]) -> Input:
    if wire[0] == 0:
        return InlineInput(Meta.from_wire(wire[1]), wire[2], tuple(wire[3]))
    return ArenaInput(ObjectID(wire[1]), wire[2], tuple(wire[3]))


@dataclass(frozen=True, slots=True)
class Began:
    """The worker has read a request with a limit: the clock runs, and memory counts from what it has now, in bytes."""

    memory: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a running task is: fraction from 0 to 1, and whatever text it gave."""

    fraction: float
    text: str = ""


@dataclass(frozen=True, slots=True)
class TaskDone:
    """The task returned. Its output is `inline`, or, where that is None, sealed in the arena as `output`."""

    meta: Meta
    nbytes: int
    inline: bytes | None
    #: seconds that the user's function took
    seconds: float = 0.0
    #: (task, attempt, index) of what it refers to, in the order in which its bytes count them
    refers: tuple[tuple[str, int, int], ...] = ()
    #: those of them, or of what they refer to, that the task has put itself
    puts: tuple[Put, ...] = ()
    #: not empty: it is a `WorkflowSpec`, to be continued with; the fingerprint of that
    continued: str = ""


@dataclass(frozen=True, slots=True)
class TaskFailed:
    """The task raised, or couldn't be given its inputs, or its output couldn't be kept. Its worker lives on."""

    #: "load": function or arguments couldn't be unpickled; "inputs": an input couldn't be had, see `lost_inputs`;
    #: "call": the user's function raised; "output": what it returned couldn't be pickled or stored (a full /dev/shm)
    stage: str
    #: full names of the exception's classes in order of the MRO: "builtins.ValueError" and so on
    type_names: tuple[str, ...]
    #: str() of the exception
    message: str
    #: formatted traceback, the user's frames only
    traceback: str
    #: the exception, pickled; None where that can't be done
    pickled: bytes | None = None
    #: whether the exception is of the types of the request's `retry`
    retryable: bool = False
    #: tasks, by index, whose outputs were not in the arena
    lost_inputs: tuple[int, ...] = ()
    seconds: float = 0.0

    def load_exception(self) -> BaseException | None:
        """Return the exception, None where it can't be rebuilt here. Runs user code (its unpickling); never raises."""
        if self.pickled is None:
            return None
        try:
            error = pickle.loads(self.pickled)
        except Exception:  # whatever a user's __setstate__ or a missing module raises: text and names say it all
            return None
        return error if isinstance(error, BaseException) else None


@dataclass(frozen=True, slots=True)
class TaskCrashed:
    """The task's worker process died under it, or no worker could be started."""

    #: for people: "worker pid 123 was killed by SIGKILL"
    reason: str
    pid: int | None = None
    #: exit status as in `subprocess.Popen.returncode`: −n is signal n; None where it isn't known
    exitcode: int | None = None
    #: whether the task may have begun; False: no worker ever had it
    started: bool = True
    #: ``"timeout"`` or ``"memory"`` if it was killed for a limit of the task's, else ``"crash"``
    kind: str = "crash"


@dataclass(frozen=True, slots=True)
class TaskCancelled:
    """The task was cancelled, or the pool closed. If it had begun, its worker process is gone."""

    started: bool = False


#: each task that is submitted gets exactly one of these
TaskResult = TaskDone | TaskFailed | TaskCrashed | TaskCancelled


def describe_exit(exitcode: int) -> str:
    """Return "was killed by SIGKILL" or "exited with status 3" for an exit status as `subprocess` gives it."""
    if exitcode >= 0:
        return f"exited with status {exitcode}"
    try:
        return f"was killed by {signal.Signals(-exitcode).name}"
    except ValueError:  # real-time signals have no names
        return f"was killed by signal {-exitcode}"


@dataclass(frozen=True, slots=True)
class Reply:
    """A worker's frame: what it says about the request with the number `seq` (0: about itself)."""

    seq: int
    body: TaskDone | TaskFailed | Progress | Began | None = field(default=None)
    #: with a result: the worker ends now, and is not to be given anything
    last: bool = False

    def to_wire(self) -> list[Any]:
        body = self.body
        if body is None:
            return [0, self.seq]
        if isinstance(body, TaskDone):
            wire = [1, self.seq, self.last, body.meta.to_wire(), body.nbytes, body.inline, body.seconds]
            if body.refers or body.continued:
                puts = [[one.index, one.meta.to_wire(), one.refers] for one in body.puts]
                wire += [body.refers, puts, body.continued]
            return wire
        if isinstance(body, TaskFailed):
            names = list(body.type_names)
            tail = [body.pickled, body.retryable, list(body.lost_inputs), body.seconds]
            return [2, self.seq, self.last, body.stage, names, body.message, body.traceback, *tail]
        if isinstance(body, Began):
            return [4, self.seq, body.memory]
        return [3, self.seq, body.fraction, body.text]

    @classmethod
    def from_wire(cls, wire: list[Any]) -> Reply:
        if wire[0] == 1:
            _, seq, last, meta, nbytes, inline, seconds, *more = wire
            return cls(seq, TaskDone(Meta.from_wire(meta), nbytes, inline, seconds, *_references(more)), last)
        kind, seq, *rest = wire
        if kind == 0:
            return cls(seq)
        if kind == 2:
            last, stage, names, message, traceback, pickled, retryable, lost, seconds = rest
            failed = TaskFailed(stage, tuple(names), message, traceback, pickled, retryable, tuple(lost), seconds)
            return cls(seq, failed, last)
        if kind == 3:
            return cls(seq, Progress(*rest))
        if kind == 4:
            return cls(seq, Began(*rest))
        raise ValueError(f"unknown kind of reply {kind!r}")


def _references(wire: list[Any]) -> tuple[tuple[tuple[str, int, int], ...], tuple[Put, ...], str]:
    if not wire:
        return (), (), ""
    refers, puts, continued = wire
    found = tuple(Put(index, Meta.from_wire(meta), _keys(inner)) for index, meta, inner in puts)
    return _keys(refers), found, continued


def _keys(wire: list[Any]) -> tuple[tuple[str, int, int], ...]:
    return tuple((task, attempt, index) for task, attempt, index in wire)
