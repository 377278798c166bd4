"""What runs when and where: a sans-IO state machine. No MPI, clock, disk or thread; events in, instructions out.

It decides on attempts, retries, writes and the end of the run. Where tasks stand is kept by `task_table`, which rank
gets a task is decided by `placement`, what has to run again by `semantics`, and what has to be undone before that is
seen to by `undoing`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .placement import Ranks
from .records import INLINE_LIMIT
from .retries import Retries
from .scheduler_events import (
    AttemptsOver,
    Cancel,
    CancelAttempt,
    Catch,
    Commit,
    CommitFailed,
    Counters,
    Dispatch,
    Event,
    Finish,
    Input,
    Instruction,
    ObjectsLost,
    RankJoined,
    RankLost,
    RankShared,
    Recall,
    Release,
    RetryAfter,
    RetryDue,
    RollbackEnded,
    RollbackFailed,
    RolledBack,
    Start,
    TaskCaught,
    TaskCommitted,
    TaskFailed,
    TaskFinished,
    Voided,
)
from .semantics import is_worth_writing, plan
from .settings import Settings
from .spec import WorkflowSpec
from .succession import first_of_era
from .task_table import Held, TaskState, TaskTable
from .undoing import Undoing

__all__ = ["Scheduler", "TaskState"]

_FAILURES = ("exception", "crash", "rank-lost", "lost-input", "storage", "canceled", "timeout", "memory", "returned")

#: what ``catch_exceptions`` catches: what the task or its process did, and not what befell its rank, inputs or storage
_CAUGHT = ("exception", "crash", "timeout", "memory")


#: tasks that a rank is given beyond its workers, for each worker, while tasks are quick
_AHEAD = 4


class Scheduler:
    """The run of one workflow in one epoch.

    committed: tasks that the journal names. ranks: (rank, incarnation, slots) of those that are there already.
    attempts: the highest attempt number that earlier epochs may have used, by task: no two attempts share an id (R10c).
    effects: external tasks that were started and not rolled back since, in the order of their first start.
    unseen: (task, attempt) of external tasks that may still run somewhere, until `AttemptsOver`. deviant: tasks that are
    taken to be deterministic and are not (R12). owed: tasks whose effects were undone and are not committed since. undoing: those of
    effects whose rollback was begun. held: outputs in memory, and running: task → (attempt, rank), which another controller had
    made (see `exoflow_hpc.succession`). era: at least this is the number of each attempt that this one has made.
    seed: the waits before retries are drawn from it; the same seed, the same waits.

    Promises: each task that runs and whose checkpoint is not ``"skip"`` is committed before the run is SUCCESSFUL, even
    if all its consumers have finished and its bytes are lost (then it runs again). A promise binds the run that made
    it: a later run does what the output needs (R6), and makes promises of its own.
    """

    def __init__(
        self,
        spec: WorkflowSpec,
        committed: Iterable[int] = (),
        ranks: Iterable[tuple[int, int, int]] = (),
        attempts: Mapping[int, int] | None = None,
        settings: Settings | None = None,
        effects: Sequence[int] = (),
        unseen: Iterable[tuple[int, int]] = (),
        deviant: Iterable[int] = (),
        owed: Iterable[int] = (),
        undoing: Iterable[int] = (),
        held: Mapping[int, Held] | None = None,
        running: Mapping[int, tuple[int, int]] | None = None,
        era: int = 0,
        seed: str = "",
    ) -> None:
        self.spec = spec
        self._settings = settings or Settings()
        self._known = frozenset(committed)
        self._deviant = frozenset(deviant)
        self._owed = frozenset(owed)
        self._rollbacks_begun = frozenset(undoing)
        self._found, self._found_running = dict(held or {}), dict(running or {})
        self._era = era
        self._undoing = Undoing(spec.tasks, effects, unseen)
        varying = {t.index for t in spec.tasks if not t.deterministic} | self._deviant
        self._table = TaskTable(spec, varying, self._undoing.effects, self)
        self._ranks = Ranks()
        for rank, incarnation, slots in ranks:
            self._ranks.join(rank, incarnation, slots)
        #: number of the latest attempt; results of any other are late
        self._attempt = [-1] * len(spec.tasks)
        for task, attempt in (attempts or {}).items():
            self._attempt[task] = attempt
        #: task → attempt for each `Commit` without an answer
        self._committing: dict[int, int] = {}
        #: the same, also where nobody waits for the answer any more, since the output is lost: it may get through all the same
        self._asked: dict[int, int] = {}
        self._retries = Retries(spec.tasks, self._settings, seed)
        #: task → its attempt that failed, for those that wait before they run again
        self._delayed: dict[int, int] = {}
        #: task → its attempt that failed for good, while its error is made its output
        self._catching: dict[int, int] = {}
        #: task → error that is made its output when its effect is undone
        self._undone_first: dict[int, Any] = {}
        #: task → how often it was dispatched, not counting what was returned; none at 0
        self._run: dict[int, int] = {}
        self._dispatches = 0
        #: whether the task that finished last was quick
        self._quick = False
        self._started = False
        #: set when the run can't succeed any more: what to say when the writes under way are over
        self._ending: Finish | None = None
        self._finished = False
        self._out: list[Instruction] = []

    # ------------------------------------------------------------------------------------------------- for drivers
    def handle(self, event: Event) -> list[Instruction]:
        """Return what to do about *event*. ValueError, with the task's story, for an event that can't have happened."""
        if self._finished:
            return []
        self._out = []
        _HANDLERS[type(event)](self, event)
        if self._started and self._ending is None:
            self._go_on_undoing()
            self._dispatch()
        self._finish_if_over()
        return self._out

    @property
    def counters(self) -> Counters:
        """What was run, skipped and run again so far."""
        run, undone = len(self._run), self._undoing.undone
        return Counters(run, len(self.spec.tasks) - run, self._dispatches - run, undone)

    @property
    def ran(self) -> frozenset[int]:
        """Tasks that were dispatched at least once."""
        return frozenset(self._run)

    @property
    def committed(self) -> frozenset[int]:
        """Tasks whose outputs are durable."""
        return frozenset(self._table.committed)

    @property
    def wanted(self) -> tuple[int, ...]:
        """Tasks that this run executes, in topological order; known after `Start`."""
        return tuple(self._table.wanted)

    @property
    def is_finished(self) -> bool:
        """Whether `Finish` was returned."""
        return self._finished

    @property
    def is_ending(self) -> bool:
        """Whether the run can't succeed any more: `Finish` follows, or was returned."""
        return self._finished or self._ending is not None

    @property
    def has_ranks(self) -> bool:
        """Whether any rank is there; without one nothing happens until one joins, and it is the driver's to give up."""
        return len(self._ranks) > 0

    def state(self, task: int) -> TaskState:
        """Return where *task* stands."""
        return self._table.state[task]

    def is_current(self, task: int, attempt: int) -> bool:
        """Whether the result of *attempt* would be taken."""
        return self._is_current(task, attempt)

    def is_held(self, task: int, attempt: int) -> bool:
        """Whether the output of *attempt* is in memory, and may be needed."""
        held = self._table.held[task]
        return held is not None and held.attempt == attempt

    def attempt(self, task: int) -> int:
        """Return the number of the latest attempt of *task*, -1 if there was none."""
        return self._attempt[task]

    def story(self, task: int) -> str:
        """Return all that is known of *task*, in a line for an error message or a log."""
        table, held = self._table, self._table.held[task]
        return (
            f"task {self.spec.tasks[task].name!r} is {table.state[task].value}"
            f"{', committed' if task in table.committed else ''}, attempt {self._attempt[task]}, "
            f"output in memory: {f'of attempt {held.attempt}' if held else 'none'}, "
            f"inputs missing {table.missing[task]}, "
            f"control edges open {table.blocked[task]}, readers {table.readers[task]}, "
            f"failures {self._retries.failures[task]}, ranks lost {self._retries.losses[task]}"
        )

    # ------------------------------------------------------------------------------------------------------ events
    def _on_start(self, event: Start) -> None:
        if self._started:
            raise ValueError("Start was handled before")
        self._started = True
        found, found_running = self._found, self._found_running
        begin = plan(
            self.spec.tasks,
            self.spec.output,
            self._known,
            tuple(self._undoing.effects),
            self._deviant,
            self._owed,
            self._rollbacks_begun,
            found,
            found_running,
            self.spec.ends,
        )
        if begin.conflict is not None:
            self._refuse(*begin.conflict)
            return
        for task in begin.void:
            self._out.append(self._undoing.void(task, self._attempt[task]))
        self._undoing.undo(begin.undo)
        for task, (attempt, rank) in found_running.items():
            self._take_over(task, attempt, rank, task in begin.kept)
        for task, held in found.items():
            if task in begin.kept:
                self._attempt[task] = max(self._attempt[task], held.attempt)
                self._run[task] = 1
                self._dispatches += 1
            else:
                self.released(task, held.attempt)
        self._table.begin(begin, {task: held for task, held in found.items() if task in begin.kept})
        for task in sorted(begin.kept):
            if task in found and task in self._table.due:
                self._commit(task)
        # what may still run somewhere must not run twice at a time
        self._table.hold_back([task for task in self._undoing.unseen if task in set(begin.wanted) - begin.hold])

    def _take_over(self, task: int, attempt: int, rank: int, kept: bool) -> None:
        """Have an attempt that another controller has dispatched go on, or end."""
        self._attempt[task] = max(self._attempt[task], attempt)
        self._ranks.start(task, attempt, rank, self.spec.tasks[task].kind != "reduce")
        if self.spec.tasks[task].external:
            self._undoing.began(task, attempt)
        if kept:
            self._run[task] = 1
            self._dispatches += 1
        else:
            self._undoing.give_up(task, attempt)
            self._out.append(CancelAttempt(task, attempt, rank))

    def _on_rank_joined(self, event: RankJoined) -> None:
        known = self._ranks.incarnation(event.rank)
        if known is not None:
            if known >= event.incarnation:
                return
            self._on_rank_lost(RankLost(event.rank, known))
        self._ranks.join(event.rank, event.incarnation, event.slots)

    def _on_rank_lost(self, event: RankLost) -> None:
        if self._ranks.incarnation(event.rank) != event.incarnation:
            return
        for task, attempt in self._ranks.lose(event.rank):
            if event.certain:
                self._undoing.is_over(task, attempt)
            if self._undoing.rolling == (task, attempt):
                self._undoing.stopped()
            elif self._is_current(task, attempt):
                self._count_loss(task, "rank-lost", f"rank {event.rank} (incarnation {event.incarnation}) was lost")

    def _on_finished(self, event: TaskFinished) -> None:
        task, attempt = event.task, event.attempt
        self._check_attempt(task, attempt)
        self._quick = event.quick
        self._undoing.is_over(task, attempt)
        if not (self._ranks.end(task, attempt) and self._is_current(task, attempt)):
            held = self._table.held[task]
            if held is None or held.attempt != attempt:  # late, not just said twice
                self.released(task, attempt)
            return
        spec = self.spec.tasks[task]
        if spec.checkpoint == "auto" and event.nbytes > INLINE_LIMIT and not event.continued:
            consumers = self._table.consumers(task)
            if not is_worth_writing(spec, event.seconds, event.write_seconds, consumers):
                self._table.let_off(task)
        incarnation = self._ranks.incarnation(event.rank)
        held = Held(attempt, event.rank, -1 if incarnation is None else incarnation, event.nbytes)
        self._table.finish(task, held, event.continued)
        if task in self._table.due:
            self._commit(task)

    def _on_rank_shared(self, event: RankShared) -> None:
        if self._ranks.incarnation(event.rank) is None:
            return
        self._ranks.share(event.rank, event.others, event.sharing)
        if event.waiting:
            self._quick = False
        for task, attempt in event.waiting[: self._ranks.has_more_room(event.rank)]:
            if self._ranks.where(task, attempt) == event.rank and self._undoing.rolling != (task, attempt):
                self._out.append(Recall(task, attempt, event.rank))

    def _on_failed(self, event: TaskFailed) -> None:
        task = event.task
        self._check_attempt(task, event.attempt)
        if event.kind not in _FAILURES:
            raise ValueError(f"TaskFailed of kind {event.kind!r}: {self.story(task)}")
        self._undoing.is_over(task, event.attempt)
        if not (self._ranks.end(task, event.attempt) and self._is_current(task, event.attempt)):
            return
        if event.kind == "returned":
            self._quick = False
            self._dispatches -= 1
            self._run[task] -= 1
            if not self._run[task]:
                del self._run[task]
            self._table.requeue(task, begun=False)
            return
        if event.kind in ("rank-lost", "lost-input", "storage"):
            self._count_loss(task, event.kind, event.error)
            self._lose(event.missing)
            return
        may_retry = event.retryable if event.kind == "exception" else True
        if may_retry and self._retries.after_failure(task):
            self._retry(task)
        elif self.spec.tasks[task].catch_exceptions and event.kind in _CAUGHT:
            if self.spec.tasks[task].rollback:  # half of an effect would be neither the one nor the other
                self._undone_first[task] = event.error
                self._undoing.undo([task])
            else:
                self._catch(task, event.error)
        else:
            self._end(Finish("FAILED", task, event.kind, event.error))

    def _on_committed(self, event: TaskCommitted) -> None:
        task = event.task
        self._check_attempt(task, event.attempt)
        if self._asked.get(task) == event.attempt:
            del self._asked[task]
        if self._undoing.is_void(task, event.attempt):
            return
        self._committing.pop(task, None)
        if task in self._table.committed:
            return
        if self._table.state[task] is TaskState.RUNNING:
            # the record of an attempt that was given up got through: it counts, and running again is once too often
            self._cancel_attempt(task)
        self._table.commit(task)

    def _on_commit_failed(self, event: CommitFailed) -> None:
        task = event.task
        if self._asked.get(task) == event.attempt:
            del self._asked[task]
        if self._committing.get(task) != event.attempt:
            return
        del self._committing[task]
        if not event.retryable:
            self._committing.clear()  # nothing can be written any more, so nothing is waited for
        if self._ending is not None:
            return
        if event.retryable and self._retries.after_commit(task):
            self._commit(task)
        else:
            self._end(Finish("RESUMABLE", task, "commit", event.error))

    def _on_objects_lost(self, event: ObjectsLost) -> None:
        self._lose(event.outputs)

    def _on_cancel(self, event: Cancel) -> None:
        self._end(Finish("CANCELED", self.spec.output))

    # ----------------------------------------------------------------------------------- undoing what is void (R5, R10)
    def _on_attempts_over(self, event: AttemptsOver) -> None:
        for task, attempt in event.attempts:
            self._undoing.is_over(task, attempt)

    def _on_voided(self, event: Voided) -> None:
        self._undoing.voided(event.task)

    def _on_rollback_ended(self, event: RollbackEnded) -> None:
        if self._undoing.rolling == (event.task, event.attempt):
            self._ranks.end(event.task, event.attempt)  # whatever becomes of that rank: the record is what counts now

    def _on_rolled_back(self, event: RolledBack) -> None:
        if self._undoing.rolling == (event.task, event.attempt):
            self._ranks.end(event.task, event.attempt)
            self._undoing.rolled_back()
            if event.task in self._undone_first:
                self._catch(event.task, self._undone_first.pop(event.task))

    def _on_rollback_failed(self, event: RollbackFailed) -> None:
        if self._undoing.rolling != (event.task, event.attempt):
            return
        self._ranks.end(event.task, event.attempt)
        self._undoing.stopped()
        self._undoing.is_over(event.task, event.attempt)
        if not self._retries.after_rollback(event.task, event.lost):
            self._end(Finish("FAILED", event.task, "rollback", event.error))

    def _go_on_undoing(self) -> None:
        task = self._undoing.next()
        if task is not None and self._ranks.has_room(takes_worker=True):
            rank = self._ranks.choose({}, takes_worker=True)
            assert rank is not None, "there is room"
            self._attempt[task] = self._next_attempt(task)
            self._ranks.start(task, self._attempt[task], rank, True)
            self._out.append(self._undoing.start(task, self._attempt[task], rank))
        for task in self._undoing.free():
            self._table.let_go(task)

    def _refuse(self, task: int, effect: int) -> None:
        names = self.spec.tasks
        self._end(
            Finish(
                "FAILED",
                task,
                "nondeterminism",
                f"task {names[task].name!r} would have to run again, and may give another value, but the effect of task "
                f"{names[effect].name!r} is for good and stands on the first one: declare {names[task].name!r} "
                f"deterministic=False, so that it is committed first, or give {names[effect].name!r} a rollback",
            )
        )

    # what the table tells (`TableListener`)
    def released(self, task: int, attempt: int) -> None:
        self._out.append(Release(task, attempt))

    def voided(self, task: int, running: bool, committed: bool) -> None:
        self._undoing.give_up(task, self._attempt[task])
        if running and self._undoing.rolling != (task, self._attempt[task]):
            self._cancel_attempt(task)
        self._undone_first.pop(task, None)
        if self._forget_commit(task) or committed:
            self._out.append(self._undoing.void(task, self._attempt[task]))
        if task in self._undoing.effects:
            if not self.spec.tasks[task].rollback:
                above = [index for index in self._table.wanted if index not in self._table.committed]
                self._refuse(above[0], task)
            self._undoing.undo([task])

    def redone(self, task: int) -> None:
        self._undoing.give_up(task, self._attempt[task])
        if self._forget_commit(task):
            self._out.append(self._undoing.void(task, self._attempt[task]))
        if task in self._undoing.effects and not self.spec.tasks[task].idempotent:
            self._undoing.undo([task])
            self._table.must_come_again(task)

    def _forget_commit(self, task: int) -> bool:
        """Whether a commit of the task is under way, that must not count any more."""
        self._committing.pop(task, None)
        return self._asked.pop(task, None) is not None

    def held_back(self, tasks: Iterable[int]) -> None:
        self._undoing.hold(tasks)

    # ------------------------------------------------------------------------------------------------------ pieces
    def _is_current(self, task: int, attempt: int) -> bool:
        running = self._table.state[task] is TaskState.RUNNING and self._attempt[task] == attempt
        return running and self._ending is None

    def _next_attempt(self, task: int) -> int:
        known = self._attempt[task]
        return known + 1 if known >= self._era else first_of_era(self._era, known)

    def _check_attempt(self, task: int, attempt: int) -> None:
        if not 0 <= task < len(self._attempt) or attempt > self._attempt[task]:
            known = self.story(task) if 0 <= task < len(self._attempt) else "there is no such task"
            raise ValueError(f"attempt {attempt} of task {task} was never dispatched: {known}")

    def _commit(self, task: int) -> None:
        held = self._table.held[task]
        assert held is not None, "what is due is not released, and what is lost is not being committed"
        self._committing[task] = self._asked[task] = held.attempt
        self._out.append(Commit(task, held.attempt))

    def _lose(self, outputs: Iterable[tuple[int, int]]) -> None:
        for task in self._table.lose(outputs):
            self._committing.pop(task, None)  # its answer may still come, but isn't waited for

    def _count_loss(self, task: int, kind: str, error: Any) -> None:
        if not self._retries.after_loss(task):
            # what is stored may be readable again later, so a storage that isn't there fails no workflow
            self._end(Finish("RESUMABLE" if kind == "storage" else "FAILED", task, kind, error))
        else:
            self._table.requeue(task)

    def _cancel_attempt(self, task: int) -> None:
        rank = self._ranks.where(task, self._attempt[task])
        if rank is not None:
            self._out.append(CancelAttempt(task, self._attempt[task], rank))

    # ----------------------------------------------------------------------------------------- dispatching, ending
    def _dispatch(self) -> None:
        for takes_worker in (True, False):
            while self._ranks.has_room(takes_worker):
                task = self._table.pop_ready(takes_worker)
                if task is None:
                    break
                if not self._awaits_commit(task):
                    self._dispatch_one(task, takes_worker)
        if self._quick and self._undoing.is_idle:
            self._dispatch_ahead()

    def _dispatch_ahead(self) -> None:
        """Let small tasks wait on ranks for workers, which need not wait for them then.

        Not those with effects or limits, nor those with large inputs: they go where these are, or where a worker is free.
        """
        while (rank := self._ranks.ahead(_AHEAD)) is not None:
            task = self._table.next_ready(True)
            if task is None:
                return
            spec = self.spec.tasks[task]
            if spec.external or spec.timeout is not None or spec.memory is not None:
                return
            held = (self._table.held[upstream] for upstream in spec.data)
            if any(one is not None and one.nbytes > INLINE_LIMIT for one in held):
                return
            self._table.pop_ready(True)
            self._dispatch_one(task, True, rank)

    def _awaits_commit(self, task: int) -> bool:
        """Whether an external task has to wait, since its rollback could not be given what the task is given.

        Small inputs are kept with the record of the start; a large one has to be committed.
        """
        if not self.spec.tasks[task].rollback:
            return False
        for upstream in self.spec.tasks[task].data:
            held = self._table.held[upstream]
            if held is not None and held.nbytes > INLINE_LIMIT and upstream not in self._table.committed:
                self._table.await_commit(task, upstream)
                if upstream not in self._committing:
                    self._commit(upstream)
                return True
        return False

    def _dispatch_one(self, task: int, takes_worker: bool, ahead: int | None = None) -> None:
        inputs = []
        nbytes: dict[int, int] = {}
        for upstream in self.spec.tasks[task].data:
            held = self._table.held[upstream]
            if held is None:
                inputs.append(Input(upstream, "checkpoint", -1))
                continue
            inputs.append(Input(upstream, "memory", held.attempt))
            if self._ranks.incarnation(held.rank) == held.incarnation:
                nbytes[held.rank] = nbytes.get(held.rank, 0) + held.nbytes
        rank = self._ranks.choose(nbytes, takes_worker) if ahead is None else ahead
        assert rank is not None, "the caller has seen that there is room"
        self._attempt[task] = self._next_attempt(task)
        self._ranks.start(task, self._attempt[task], rank, takes_worker)
        self._run[task] = self._run.get(task, 0) + 1
        self._dispatches += 1
        if self.spec.tasks[task].external:
            self._undoing.began(task, self._attempt[task])
        self._out.append(Dispatch(task, self._attempt[task], rank, tuple(inputs)))

    def _end(self, finish: Finish) -> None:
        """Start nothing more; wait for writes under way, so that what was done is kept. The first reason counts."""
        if self._ending is None:
            self._ending = finish
            self._cancel_all()

    def _cancel_all(self) -> None:
        for task, attempt, rank in self._ranks.running():
            if self._table.state[task] is TaskState.RUNNING and self._attempt[task] == attempt:
                self._out.append(CancelAttempt(task, attempt, rank))

    def _finish_if_over(self) -> None:
        if self._ending is not None:
            if not self._committing:
                self._finished = True
                self._out.append(self._ending)
        elif self._started and not self._table.due and self._undoing.is_idle:
            self._finished = True
            self._cancel_all()
            self._out.append(Finish("SUCCESSFUL", self.spec.output))

    # ------------------------------------------------------------------------------------------ waiting, catching
    def _retry(self, task: int) -> None:
        """Run the task again, after a while."""
        attempt = self._attempt[task]
        delay = self._retries.wait(task, attempt)
        if delay <= 0:
            self._table.requeue(task)
            return
        self._delayed[task] = attempt
        self._table.hold((task,))
        self._table.requeue(task)
        self._out.append(RetryAfter(task, attempt, delay))

    def _on_retry_due(self, event: RetryDue) -> None:
        if self._delayed.get(event.task) == event.attempt:
            del self._delayed[event.task]
            self._table.let_go(event.task)

    def _catch(self, task: int, error: Any) -> None:
        self._catching[task] = self._attempt[task]
        self._out.append(Catch(task, self._attempt[task], error))

    def _on_caught(self, event: TaskCaught) -> None:
        task, attempt = event.task, event.attempt
        if self._catching.get(task) != attempt:
            return
        del self._catching[task]
        if not self._is_current(task, attempt):  # committed by a late record, or the run is ending
            self.released(task, attempt)
            return
        incarnation = self._ranks.incarnation(event.rank)
        self._table.finish(task, Held(attempt, event.rank, -1 if incarnation is None else incarnation, event.nbytes))
        if task in self._table.due:
            self._commit(task)


_HANDLERS: dict[type, Any] = {
    Start: Scheduler._on_start,
    RankJoined: Scheduler._on_rank_joined,
    RankLost: Scheduler._on_rank_lost,
    RankShared: Scheduler._on_rank_shared,
    TaskFinished: Scheduler._on_finished,
    TaskFailed: Scheduler._on_failed,
    TaskCommitted: Scheduler._on_committed,
    CommitFailed: Scheduler._on_commit_failed,
    ObjectsLost: Scheduler._on_objects_lost,
    AttemptsOver: Scheduler._on_attempts_over,
    Voided: Scheduler._on_voided,
    RollbackEnded: Scheduler._on_rollback_ended,
    RolledBack: Scheduler._on_rolled_back,
    RollbackFailed: Scheduler._on_rollback_failed,
    Cancel: Scheduler._on_cancel,
    RetryDue: Scheduler._on_retry_due,
    TaskCaught: Scheduler._on_caught,
}
