"""What goes into the scheduler (events) and what comes out of it (instructions).

Tasks are indices in `WorkflowSpec.tasks`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = [
    "AttemptsOver",
    "Cancel",
    "CancelAttempt",
    "Catch",
    "Commit",
    "CommitFailed",
    "Counters",
    "Dispatch",
    "Event",
    "Finish",
    "Input",
    "Instruction",
    "ObjectsLost",
    "RankJoined",
    "RankLost",
    "RankShared",
    "Recall",
    "Release",
    "RetryAfter",
    "RetryDue",
    "Rollback",
    "RollbackEnded",
    "RollbackFailed",
    "RolledBack",
    "Start",
    "TaskCaught",
    "TaskCommitted",
    "TaskFailed",
    "TaskFinished",
    "Void",
    "Voided",
]


# ------------------------------------------------------------------------------------------------------------ events
@dataclass(frozen=True, slots=True)
class Start:
    """Begin. Ranks may join before and after."""


@dataclass(frozen=True, slots=True)
class RankJoined:
    """A rank with *slots* worker processes is there. A newer incarnation takes the place of an older one."""

    rank: int
    incarnation: int
    slots: int


@dataclass(frozen=True, slots=True)
class RankLost:
    """A rank is out of the view. Which outputs are gone with it is told apart, by `ObjectsLost`.

    certain: its workers are dead. If not, external tasks that ran there may still have their effects, until `AttemptsOver` (R10b).
    """

    rank: int
    incarnation: int
    certain: bool = True


@dataclass(frozen=True, slots=True)
class RankShared:
    """What other workflows have on a rank: so many tasks; *sharing*: workflows that have any, this one included.

    waiting: (task, attempt) of those of this workflow that have waited there for a worker for long.
    """

    rank: int
    others: int
    sharing: int
    waiting: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class AttemptsOver:
    """Attempts (task, attempt) that were lost from sight are certainly over: the lease of whoever ran them has ended (R10b)."""

    attempts: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Voided:
    """The journal durably says that the output of a task is void, or never said anything else (see `Void`)."""

    task: int


@dataclass(frozen=True, slots=True)
class RollbackEnded:
    """A rollback has done its work; the record that says so is on its way into the journal."""

    task: int
    attempt: int


@dataclass(frozen=True, slots=True)
class RolledBack:
    """The journal durably says that the effect of a task is undone (see `Rollback`)."""

    task: int
    attempt: int


@dataclass(frozen=True, slots=True)
class RollbackFailed:
    """A rollback ended without that. lost: its rank did, or its worker; else the function raised."""

    task: int
    attempt: int
    error: Any = None
    lost: bool = False


@dataclass(frozen=True, slots=True)
class TaskFinished:
    """An attempt has put its output, of *nbytes* bytes, in the memory of *rank*.

    quick: it took so little time that a worker had better have the next task already, see `Dispatch`. continued: what it
    has put is a DAG to be continued with: it is committed, and no task of this epoch may use it (see `expansion`).
    """

    task: int
    attempt: int
    rank: int
    nbytes: int = 0
    #: that the attempt took, and that its output would take to be made durable
    seconds: float = 0.0
    write_seconds: float = 0.0
    quick: bool = False
    continued: bool = False


@dataclass(frozen=True, slots=True)
class TaskFailed:
    """An attempt ended without an output. Each ends in exactly one `TaskFinished` or `TaskFailed`, or with its rank.

    kind: ``"exception"`` (the function raised), ``"crash"`` (its worker died), ``"timeout"`` and ``"memory"``
    (its worker was killed for a limit of the task's), ``"rank-lost"`` (its rank did),
    ``"lost-input"`` (an input could not be had: *missing* names it, as (task, attempt)), ``"storage"`` (an input could
    not be read from the storage, though it may be whole), ``"canceled"`` (as told by `CancelAttempt`), ``"returned"`` (as asked by
    `Recall`: it has not begun, nor will it).
    retryable: for an exception, whether it is of the task's `retry_exceptions`.
    """

    task: int
    attempt: int
    kind: str
    error: Any = None
    retryable: bool = False
    missing: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class TaskCommitted:
    """The journal durably names the output of *attempt*: true for ever, even if that was given up meanwhile (R1)."""

    task: int
    attempt: int


@dataclass(frozen=True, slots=True)
class CommitFailed:
    """An output could not be made durable. retryable: writing again may help (not after a failed fsync)."""

    task: int
    attempt: int
    error: Any = None
    retryable: bool = True


@dataclass(frozen=True, slots=True)
class ObjectsLost:
    """No copy in memory is left of the outputs of these (task, attempt) pairs; committed ones may be among them."""

    outputs: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Cancel:
    """The user wants the workflow to stop."""


@dataclass(frozen=True, slots=True)
class RetryDue:
    """The time of a `RetryAfter` is over."""

    task: int
    attempt: int


@dataclass(frozen=True, slots=True)
class TaskCaught:
    """The output that `Catch` asked for is in the memory of *rank*."""

    task: int
    attempt: int
    rank: int
    nbytes: int = 0


Event = (
    Start
    | RankJoined
    | RankLost
    | RankShared
    | TaskFinished
    | TaskFailed
    | TaskCommitted
    | CommitFailed
    | ObjectsLost
    | AttemptsOver
    | Voided
    | RollbackEnded
    | RolledBack
    | RollbackFailed
    | Cancel
    | RetryDue
    | TaskCaught
)


# ------------------------------------------------------------------------------------------------------ instructions
@dataclass(frozen=True, slots=True)
class Input:
    """Where to find the output of a task: in ``"memory"`` (of *attempt*) or in its ``"checkpoint"`` (attempt -1)."""

    task: int
    source: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Run *attempt* of a task on a rank. Inputs are in the order of `TaskSpec.data`. A reduce takes no worker.

    An external task is to be sent there only after a durable record of its start (R10a). While tasks are quick, some are dispatched
    ahead: they wait on the rank for a worker. One that waits for long is to be returned (`TaskFailed`).
    """

    task: int
    attempt: int
    rank: int
    inputs: tuple[Input, ...]


@dataclass(frozen=True, slots=True)
class Commit:
    """Write the output of *attempt* to a checkpoint, then its record to the journal; answer with one commit event."""

    task: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Release:
    """Nobody needs the output of *attempt* in memory any more, or it came too late to be taken: free it."""

    task: int
    attempt: int


@dataclass(frozen=True, slots=True)
class CancelAttempt:
    """Stop *attempt*. What it answers is ignored, but has to come: its worker counts as busy until then."""

    task: int
    attempt: int
    rank: int


@dataclass(frozen=True, slots=True)
class Recall:
    """Have *attempt* returned if it has not begun: another rank has room."""

    task: int
    attempt: int
    rank: int


@dataclass(frozen=True, slots=True)
class Void:
    """Void the output of a task, and whatever of it is on its way into the journal (R5); answer with `Voided`.

    attempt: the latest one that is meant.
    """

    task: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Rollback:
    """Undo the effect of a task on a rank, as *attempt*; answer with `RolledBack` or `RollbackFailed`."""

    task: int
    attempt: int
    rank: int


@dataclass(frozen=True, slots=True)
class Finish:
    """The run is over; the last instruction there is.

    status: ``"SUCCESSFUL"`` (the output, and every promised checkpoint, is durable), ``"FAILED"``, ``"CANCELED"``, or
    ``"RESUMABLE"`` (it was not the workflow's fault, as with a full disk: resume when that is repaired).
    task: the one that failed, or else the one whose output is the workflow's. kind: of the failure, as in
    `TaskFailed`, or ``"commit"``, ``"rollback"``, ``"nondeterminism"``; empty if there was none.
    """

    status: str
    task: int
    kind: str = ""
    error: Any = None


@dataclass(frozen=True, slots=True)
class RetryAfter:
    """Say `RetryDue` in *delay* seconds: *attempt* has failed, and the task waits for that long before the next one."""

    task: int
    attempt: int
    delay: float


@dataclass(frozen=True, slots=True)
class Catch:
    """Make the output (None, error) of *attempt*, which has failed for good; answer with `TaskCaught`."""

    task: int
    attempt: int
    error: Any = None


Instruction = Dispatch | Commit | Release | CancelAttempt | Recall | Void | Rollback | RetryAfter | Catch | Finish


@dataclass(frozen=True, slots=True)
class Counters:
    """What happened in this run of the workflow, as ``--json`` shows it."""

    #: tasks that were started at least once
    run: int = 0
    #: tasks that were not started: committed before, or not wanted any more
    skipped: int = 0
    #: starts beyond the first of each task, for whatever reason
    rerun: int = 0
    #: effects that were undone
    rolled_back: int = 0
