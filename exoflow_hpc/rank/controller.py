"""The controller of one workflow: carries out what the scheduler says, and commits to the journal (R1, R8, R10)."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exoflow_hpc import records, serialize
from exoflow_hpc import scheduler_events as ev
from exoflow_hpc.errors import ExoFlowError, FencedError, NondeterminismError
from exoflow_hpc.history import facts_of
from exoflow_hpc.journal import Journal
from exoflow_hpc.outcome import Outcome
from exoflow_hpc.rank import messages as ms
from exoflow_hpc.rank.commits import Commits
from exoflow_hpc.rank.effects import Effects
from exoflow_hpc.rank.failure import Failure, pack_caught
from exoflow_hpc.rank.loop import Strand
from exoflow_hpc.rank.naming import output_id, reference_id
from exoflow_hpc.rank.outputs import Output, place_of
from exoflow_hpc.rank.progress import ProgressLine
from exoflow_hpc.rank.recording import Recorder
from exoflow_hpc.rank.references import Key, Put, References
from exoflow_hpc.rank.takeover import Found
from exoflow_hpc.rank.tally import Tally
from exoflow_hpc.scheduler import Scheduler
from exoflow_hpc.settings import Settings
from exoflow_hpc.spec import WorkflowSpec
from exoflow_hpc.succession import Lineage, era_of, plain, shown
from exoflow_hpc.task_table import Held
from hoplite_mpi import ClosedError, EvictedError
from hoplite_mpi.ids import ObjectID
from hoplite_mpi.meta import Meta
from hoplite_mpi.protocol.view import Member, View
from hoplite_mpi.testing import fault

if TYPE_CHECKING:  # importing it initialises MPI
    from hoplite_mpi.store import ObjectStore

__all__ = ["Controller"]

#: seconds that a task takes at most for the next ones to be dispatched before a worker is free
_QUICK = 0.002
#: seconds that the next epoch waits at most for what other tasks continue with, once it is to begin for one
_GATHER = 0.05

log = logging.getLogger("exoflow_hpc.controller")


class Controller:
    """Runs one workflow in one epoch. All methods run inside of the loop.

    found: the run, and what is left in it of the controller that this one takes over from.
    continued: what *spec* is expanded by, as in `messages.Begin`.
    """

    def __init__(
        self,
        workflow_id: str,
        workflow_dir: Path,
        spec: WorkflowSpec,
        journal: Journal,
        history: Iterable[dict[str, Any]],
        store: ObjectStore,
        loop: Strand,
        send: Callable[[int, ms.Message], None],
        progress: ProgressLine,
        tally: Tally,
        lease: float,
        found: Found,
        continued: Sequence[list[Any]] = (),
    ) -> None:
        self._workflow_id = workflow_id
        self._workflow_dir = workflow_dir
        self._spec = spec
        self._journal = journal
        self._store = store
        self._loop = loop
        self.send = send
        self._progress = progress
        self._tally = tally
        self._epoch = journal.epoch
        self._continued = list(continued)
        self._found, self._run = found, found.run
        facts = facts_of(spec, history)
        survivors = self._found.survivors.values()
        self._outputs: dict[int, Output] = dict(self._found.outputs)
        self._recorder = Recorder(journal, loop)
        self._effects = Effects(spec, facts, journal, lease, self, {(one.task, one.attempt) for one in survivors})
        self._lineage = Lineage(spec.tasks, facts.deviant)
        for one in survivors:
            self._lineage.adopt(one.task, one.attempt, one.stand)
        self._references = References(facts.committed, spec.index)
        self._commits = Commits(
            spec,
            facts,
            self._outputs,
            self._references,
            self._effects,
            self,
            self._epoch,
            self._lineage,
            self._add_bytes,
        )
        self._scheduler = Scheduler(
            spec,
            committed=facts.committed,
            attempts=facts.attempts,
            effects=list(facts.effects),
            unseen=self._effects.unseen,
            deviant=facts.deviant,
            owed=facts.owed,
            undoing=facts.rollbacks,
            held={
                task: Held(out.attempt, out.rank, self._found.ranks[out.rank][0], out.meta.nbytes)
                for task, out in self._outputs.items()
            },
            running=self._found.running,
            era=era_of(self._epoch) if found.ranks else 0,
            settings=Settings.from_environment(),
            seed=self._run,
        )
        #: rank → incarnation of agents that were told to begin
        self._agents: dict[int, int] = {}
        #: ranks that were told to begin and have not answered: no task is dispatched ahead before they have got theirs
        self._awaited: set[int] = set()
        #: (task, attempt) → rank, of what was dispatched and not answered
        self._running: dict[tuple[int, int], int] = {
            (one.task, one.attempt): one.rank for one in survivors if one.running
        }
        #: committed outputs became void: the next epoch has to begin with what is left
        self.must_begin_again = False
        #: it begins in the same run, with what runs and is in memory: nothing of that is worth less than it was
        self.goes_on = False
        #: (task, attempt) of those that have continued, durably
        self._changes: list[tuple[int, int]] = []
        self.outcome: Outcome | None = None

    # -- life ----------------------------------------------------------------------------------------------------------------

    def start(self, view: View) -> None:
        """Begin with the ranks of *view*."""
        began = records.WorkflowStarted(socket.gethostname(), os.getpid(), time.time(), self._run)
        self.append(began, lambda: None)
        self._tally.begin(view)
        for rank, (incarnation, slots) in self._found.ranks.items():
            self.tell(ev.RankJoined(rank, incarnation, slots))
            self._admit(rank, incarnation)
        self._invite(view)
        begun = self._scheduler.handle(ev.Start())
        kept = [task for task in self._found.survivors if task not in self._commits.committed]
        self._commits.seen.begin([*self._scheduler.wanted, *kept])
        outputs = [(task, self._found.outputs[task].checksum) for task in kept if task in self._found.outputs]
        deviating = [task for task, checksum in outputs if checksum and self._commits.deviates(task, checksum)]
        if deviating:
            return  # the next epoch follows
        self._do(begun)
        self._commits.seen.begin(self._scheduler.wanted)  # also of what is void since
        self.on_view(view, ())  # a rank may have been lost since it reported
        self._effects.begin()
        self._show()

    def on_view(self, view: View, lost: tuple[Member, ...]) -> None:
        """Take a new view: lost ranks' tasks run elsewhere, new ranks get tasks."""
        if self.outcome is not None:
            return
        gone = [rank for rank, incarnation in self._agents.items() if not view.has(rank, incarnation)]
        if gone:
            self._tally.lost += len(gone)
            names = ", ".join(map(str, gone))
            self._progress.say(f"lost rank {names}: what it ran goes on elsewhere ({len(view)} ranks left)")
            self._find_lost_outputs()
        for rank in gone:
            incarnation = self._agents.pop(rank)
            self._awaited.discard(rank)
            running = [which for which, where in self._running.items() if where == rank]
            for which in running:  # its worker may have left a whole output in the node's memory
                del self._running[which]
                self._effects.stopped(which)
                self._store.delete(self._id(*which))
            unseen = self._effects.lost(rank, self._store.is_dead(rank, incarnation), running)
            self.tell(ev.RankLost(rank, incarnation, certain=not unseen))
            self._commits.rank_lost(rank)
        self._invite(view)

    def _invite(self, view: View) -> None:
        for member in view.members.values():
            if self._agents.get(member.rank) != member.incarnation:
                if self._tally.joins(member.rank, member.incarnation):
                    self._progress.say(f"rank {member.rank} is back (incarnation {member.incarnation})")
                self._admit(member.rank, member.incarnation)

    def _admit(self, rank: int, incarnation: int) -> None:
        self._agents[rank] = incarnation
        self._awaited.add(rank)
        self._begin(rank)

    def greet(self, rank: int, incarnation: int) -> None:
        """Tell a rank again, that may not have been listening."""
        if self._agents.get(rank) == incarnation and self.outcome is None:
            self._begin(rank)

    def without(self, rank: int) -> None:
        """A rank takes no part: the run was over for it before this controller came."""
        self._awaited.discard(rank)

    def _begin(self, rank: int) -> None:
        where = (self._workflow_id, str(self._workflow_dir), self._run)
        survivors = self._found.survivors.values()
        kept = [[self._spec.tasks[one.task].name, one.attempt] for one in survivors] if self._found.ranks else None
        self.send(rank, ms.Begin(self._epoch, *where, self._effects.lease, kept, self._continued))

    def _find_lost_outputs(self) -> None:
        """Ask which outputs, and objects of theirs, still have a copy; the directory answers when every member of the view has reported."""
        ids = {
            self._id(task, out.attempt): (task, out.attempt) for task, out in self._outputs.items() if out.data is None
        }
        puts = {self._id(*key): key for key in self._references.in_memory}
        if not ids and not puts:
            return
        found = self._store.located([*ids, *puts])
        lost = [which for oid, which in ids.items() if oid not in found]
        lost += self._references.lost(key for oid, key in puts.items() if oid not in found)
        if lost:
            log.info("outputs lost with their ranks: %s", [self._spec.tasks[task].name for task, _ in lost])
            self._lose(lost)

    def _lose(self, outputs: Iterable[tuple[int, int]]) -> None:
        """Outputs in memory are gone, or worth nothing without what they refer to."""
        lost = tuple(dict.fromkeys(outputs))
        for task, attempt in lost:
            output = self._outputs.get(task)
            if output is not None and output.attempt == attempt:
                del self._outputs[task]
        self.tell(ev.ObjectsLost(lost))
        for which in lost:
            self._free(which)

    def _free(self, which: tuple[int, int]) -> None:
        """Delete what only that output referred to."""
        for key in self._references.gone(which):
            self._store.delete(self._id(*key))

    def cancel(self) -> None:
        """Stop the workflow: CANCELED."""
        self.tell(ev.Cancel())

    # -- messages of agents ----------------------------------------------------------------------------------------------------

    def handle(self, rank: int, incarnation: int, message: ms.Message) -> None:
        """Take a message of an agent."""
        if message.epoch != self._epoch or self._agents.get(rank) != incarnation or self.outcome is not None:
            log.info("a late %s from rank %d.%d was dropped", type(message).__name__, rank, incarnation)
            return
        match message:
            case ms.Finished():  # the most frequent one first
                self._finished(rank, message)
            case ms.Renew():
                self._effects.renew(rank, message.sent)
            case ms.Ready():
                self._awaited.discard(rank)
                self._effects.joined(rank, message.process, message.sent)
                self.tell(ev.RankJoined(rank, incarnation, message.slots))
            case ms.Shared():
                waiting = tuple((task, attempt) for task, attempt in message.waiting)
                self.tell(ev.RankShared(rank, message.others, message.sharing, waiting))
            case ms.Failed():
                self._failed(message)
            case ms.Written():
                self._commits.written(message)
            case ms.WriteFailed():
                if self._commits.write_failed(message):
                    which = (message.task, message.attempt)
                    self._lose([which] if message.index < 0 else self._references.lost([(*which, message.index)]))
            case ms.Corrupt():
                self._commits.damaged(message)
            case ms.Progress():
                self._progress.task(self._spec.tasks[message.task].name, message.fraction, message.text)
        self._show()

    def _finished(self, rank: int, message: ms.Finished) -> None:
        task = message.task
        self._running.pop((task, message.attempt), None)
        if self._effects.is_rollback((task, message.attempt)):
            self._effects.rolled_back((task, message.attempt))
            return
        known = self._outputs.get(task)
        meta = Meta.from_wire(message.meta)
        checksum = "" if message.data is None else serialize.checksum(meta, message.data)
        seen_as = records.seen_as(checksum, (), message.continued)
        missing = self._note_references(rank, message) if message.refers else []
        # what it refers to counts as well, and has no checksum yet
        if (
            seen_as
            and not message.refers
            and self._scheduler.is_current(task, message.attempt)
            and self._commits.deviates(task, seen_as)
        ):
            return
        output = Output(message.attempt, meta, message.data, rank, checksum, message.continued)
        if known is None or known.attempt < message.attempt:
            self._outputs[task] = output
        quick = message.seconds < _QUICK and not self._awaited
        nbytes = message.nbytes
        if message.refers:  # as good as a large one: it can't be kept, or sent, by itself
            nbytes = max(nbytes, records.INLINE_LIMIT + 1) + self._references.nbytes((task, message.attempt))
        write_seconds = self._commits.writes.seconds(nbytes)
        continued = bool(message.continued)
        self.tell(
            ev.TaskFinished(task, message.attempt, rank, nbytes, message.seconds, write_seconds, quick, continued)
        )
        if missing and self.outcome is None:
            self._lose(self._references.lost(missing))

    def _note_references(self, rank: int, message: ms.Finished) -> list[Key]:
        """Take what an output refers to; return what of it is lost already."""
        which = (message.task, message.attempt)
        puts = {
            (*which, index): Put(Meta.from_wire(meta).nbytes, rank, tuple((a, b, c) for a, b, c in refers))
            for index, meta, refers in message.puts
        }
        self._references.made(which, [(a, b, c) for a, b, c in message.refers], puts)
        return self._references.missing(which)

    def _failed(self, message: ms.Failed) -> None:
        failure = Failure.from_wire(message.error)
        self._running.pop((message.task, message.attempt), None)
        name = self._spec.tasks[message.task].name
        undoing = self._effects.is_rollback((message.task, message.attempt))
        if failure.kind not in ("canceled", "returned"):
            what = f"the rollback of task {name}" if undoing else f"task {name}"
            self._progress.say(f"{what} (attempt {shown(message.attempt)}): {failure.text}")
        if undoing:
            self._effects.stopped((message.task, message.attempt))
            lost = message.kind in ("rank-lost", "lost-input", "storage")
            self.tell(ev.RollbackFailed(message.task, message.attempt, failure, lost))
            return
        missing = [(which[0], which[1]) for which in message.missing if len(which) == 2]
        gone = self._references.lost((a, b, c) for a, b, *rest in message.missing for c in rest)
        self.tell(
            ev.TaskFailed(message.task, message.attempt, message.kind, failure, message.retryable, (*missing, *gone))
        )
        if gone:  # also if nobody waits for that attempt any more
            self._lose(gone)
        for which in missing:
            if not self._scheduler.is_held(*which):
                self._free(which)

    # -- instructions ----------------------------------------------------------------------------------------------------------

    def tell(self, event: ev.Event) -> None:
        """Give the scheduler an event, and do what it says."""
        if self.outcome is None:
            self._do(self._scheduler.handle(event))

    def _do(self, instructions: list[ev.Instruction]) -> None:
        for what in instructions:
            match what:
                case ev.Dispatch():
                    self._dispatch(what)
                case ev.Commit():
                    self._begin_commit(what.task, what.attempt)
                case ev.Release():
                    self._release(what)
                case ev.CancelAttempt():
                    self._cancel_attempt(what)
                case ev.Recall():
                    self.send(what.rank, ms.Recall(self._epoch, what.task, what.attempt))
                case ev.Void():
                    self._commits.void(what)
                case ev.Rollback():
                    self._running[what.task, what.attempt] = what.rank
                    self._effects.roll_back(what)
                case ev.Finish():
                    self._finish(what)
                case ev.RetryAfter():
                    self._retry_after(what)
                case ev.Catch():
                    self._catch(what)

    def _dispatch(self, what: ev.Dispatch) -> None:
        fault.point("controller.dispatch")
        self._running[what.task, what.attempt] = what.rank
        self._commits.seen.dispatched(what.task)
        places = [self._place(one) for one in what.inputs]
        made = ((place.task, place.attempt, place.task in self._commits.committed) for place in places)
        stand = self._lineage.dispatched(what.task, what.attempt, made)
        references = self._references.places(
            [(place, self._refers(one)) for place, one in zip(places, what.inputs, strict=True)]
        )
        life = self._effects.incarnation(what.task)
        named = plain(stand, self._spec.tasks)
        message = ms.Run(self._epoch, what.task, what.attempt, life, False, named, places, references)
        if self._spec.tasks[what.task].external:
            commits = self._commits
            inputs = [commits.kept(one.task) for one in what.inputs] if self._spec.tasks[what.task].rollback else []
            self._effects.start(what, message, inputs, commits.seen.by(what.task, commits.committed), named)
        else:
            self.send(what.rank, message)

    def _cancel_attempt(self, what: ev.CancelAttempt) -> None:
        which = (what.task, what.attempt)
        if self._effects.take_back(which):  # it is nowhere yet
            self._running.pop(which, None)
            self._loop.post(lambda: self.tell(ev.TaskFailed(what.task, what.attempt, "canceled")))
        else:
            self.send(what.rank, ms.Cancel(self._epoch, what.task, what.attempt))

    def _place(self, one: ev.Input) -> ms.InputPlace:
        output = self._outputs.get(one.task)
        if one.source == "memory":
            assert output is not None and output.attempt == one.attempt, self._scheduler.story(one.task)
            return output.place(one.task)
        return place_of(one.task, self._commits.committed[one.task])

    def _refers(self, one: ev.Input) -> Sequence[Key]:
        """Return what an input refers to, in the order in which its bytes count that."""
        if one.source == "memory":
            return self._references.direct((one.task, one.attempt))
        return [self._references.key(reference) for reference in self._commits.committed[one.task].references]

    def _release(self, what: ev.Release) -> None:
        self._free((what.task, what.attempt))
        output = self._outputs.get(what.task)
        if output is not None and output.attempt == what.attempt:
            del self._outputs[what.task]
            if output.data is not None:
                return
        self._store.delete(self._id(what.task, what.attempt))

    def _begin_commit(self, task: int, attempt: int) -> None:
        output = self._outputs.get(task)
        if output is None or output.attempt != attempt:
            self._loop.post(lambda: self._lose([(task, attempt)]))
            return
        # the rank that has the bytes, or, if it is gone, any other: it gets them first
        self._commits.begin(task, attempt, output.rank if output.rank in self._agents else min(self._agents))

    def broken(self, error: BaseException) -> None:
        """Nothing can be committed in this epoch any more."""
        if self.outcome is None:
            self._end("RESUMABLE", error if isinstance(error, ExoFlowError) else ExoFlowError(str(error)))

    # -- what the parts need (`Driver`), beside `send`, `tell` and `broken` -----------------------------------------------------------

    def append(
        self, record: records.Record, durable: Callable[[], None], failed: Callable[[BaseException], None] | None = None
    ) -> None:
        """Journal a record; *durable* or *failed* follows inside of the loop."""
        self._recorder.append(record, durable, failed or self.broken)

    def continued(self, task: int, attempt: int) -> None:
        """The workflow has other tasks now: the next epoch begins with them, unless this run ends."""
        if not self._changes:
            self._loop.after(_GATHER, self._go_on)
        self._changes.append((task, attempt))
        if self._scheduler.is_ending or not self._commits.are_continuing:
            self._go_on()

    def _go_on(self) -> None:
        """Begin the next epoch with the tasks that there are now, if there is to be one."""
        if self.outcome is not None:
            return
        if self._scheduler.is_ending:
            changes, self._changes = self._changes, []
            for which in changes:
                self.tell(ev.TaskCommitted(*which))
        else:
            self.goes_on = True
            self.begin_again()

    @property
    def epoch(self) -> int:
        """In which this one controls the workflow."""
        return self._epoch

    @property
    def run(self) -> str:
        """As in `messages.Begin`."""
        return self._run

    def begin_again(self) -> None:
        """End this epoch: the next one begins with what the journal says then."""
        self.must_begin_again = True
        self._end("RESUMABLE", None)

    def post(self, call: Callable[[], None]) -> None:
        """Have *call* called as soon as the one under way is over."""
        self._loop.post(call)

    def say(self, text: str) -> None:
        """Tell the user."""
        self._progress.say(text)

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Have *call* called later."""
        self._loop.after(seconds, call)

    def is_running(self, which: tuple[int, int], rank: int) -> bool:
        """Whether an attempt is still meant to run on *rank*."""
        return self._running.get(which) == rank and self.outcome is None

    def is_there(self, rank: int) -> bool:
        """Whether a rank takes part."""
        return rank in self._agents

    # -- the end -----------------------------------------------------------------------------------------------------------------

    def _finish(self, what: ev.Finish) -> None:
        name = self._spec.tasks[what.task].name
        error: ExoFlowError | None = None
        if what.status == "CANCELED":
            error = None
        elif isinstance(what.error, FencedError):
            error = what.error
        elif what.kind == "nondeterminism":
            error = NondeterminismError(str(what.error))
        elif isinstance(what.error, Failure):
            error = what.error.to_error(f"{name} (rollback)" if what.kind == "rollback" else name)
        elif what.status != "SUCCESSFUL":
            error = what.error if isinstance(what.error, ExoFlowError) else ExoFlowError(f"task {name!r}: {what.error}")
        if what.status == "RESUMABLE":
            self._end(what.status, error)
            return
        record = records.WorkflowFinished(what.status, str(error or ""), ms.pack_error(error))

        def durable() -> None:
            fault.point("controller.finished")
            self._end(what.status, error)

        self.append(record, durable)

    def _end(self, status: str, error: ExoFlowError | None) -> None:
        if self.outcome is not None:
            return
        self._recorder.write()  # what was done is kept, however this ends
        self._tally.add(self._scheduler)
        self.outcome = self._tally.outcome(status, error, len(self._spec.tasks))
        self._show()
        with contextlib.suppress(ClosedError, EvictedError):
            for key in self._references.in_memory:
                self._store.delete(self._id(*key))
            if self.goes_on:
                return
            for task, output in self._outputs.items():
                if output.data is None:
                    self._store.delete(self._id(task, output.attempt))
            for task, attempt in self._running:  # what still comes of it is taken for late
                self._store.delete(self._id(task, attempt))

    def end_message(self) -> ms.End:
        """Return what to tell the agents once there is an outcome."""
        assert self.outcome is not None
        error = ms.pack_error(self.outcome.error)
        return ms.End(self._epoch, self.outcome.status, error, self._workflow_id, str(self._workflow_dir))

    def _id(self, task: int, attempt: int, index: int = -1) -> ObjectID:
        output = output_id(self._run, self._spec.tasks[task].name, attempt)
        return output if index < 0 else reference_id(self._run, output, index)

    def _add_bytes(self, nbytes: int) -> None:
        self._progress.add_bytes(nbytes)
        self._show()

    def _show(self) -> None:
        if not (self._progress.is_due or self.outcome is not None):
            return
        counters = self._scheduler.counters
        self._progress.update(
            total=len(self._spec.tasks),
            committed=len(self._commits.committed),
            started=counters.run,
            rerun=counters.rerun,
        )

    # -- failures ----------------------------------------------------------------------------------------------------------------

    def _retry_after(self, what: ev.RetryAfter) -> None:
        self._loop.after(what.delay, lambda: self.tell(ev.RetryDue(what.task, what.attempt)))

    def _catch(self, what: ev.Catch) -> None:
        """Make the error of an attempt its output: here, since of a crash no worker is left to make it."""
        name = self._spec.tasks[what.task].name
        failure = what.error if isinstance(what.error, Failure) else Failure("crash", str(what.error))
        plan = pack_caught(failure, name)
        # small, so it never needs the store
        self._outputs[what.task] = Output(what.attempt, plan.meta, plan.to_bytes(), self._store.rank)
        self._loop.post(lambda: self.tell(ev.TaskCaught(what.task, what.attempt, self._store.rank, plan.meta.nbytes)))
