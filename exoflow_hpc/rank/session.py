"""What a rank needs to take part in workflows: store, worker processes, checkpoint writer; one of each for the process's life."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from exoflow_hpc import heartbeat, history, journal, records
from exoflow_hpc.checkpoint import WriterClient
from exoflow_hpc.errors import CanceledError, CorruptCheckpointError, ExoFlowError, FencedError, StorageError
from exoflow_hpc.journal import History, Journal
from exoflow_hpc.outcome import REFUSED, Ended
from exoflow_hpc.rank import messages as ms
from exoflow_hpc.rank.active import refuse_if_active
from exoflow_hpc.rank.agent import Agent
from exoflow_hpc.rank.controller import Controller
from exoflow_hpc.rank.loop import Loop
from exoflow_hpc.rank.progress import ProgressLine
from exoflow_hpc.rank.takeover import Found, Takeover
from exoflow_hpc.rank.tally import Tally
from exoflow_hpc.settings import Settings
from exoflow_hpc.spec import WorkflowSpec
from exoflow_hpc.storage import Storage
from exoflow_hpc.worker.pool import WorkerPool
from exoflow_hpc.worker.spawner import Spawner
from hoplite_mpi.protocol.view import Member, View
from hoplite_mpi.testing import fault

__all__ = ["Session"]

log = logging.getLogger("exoflow_hpc")

_CHANNEL = 0
#: seconds between looks for a request to cancel
_CANCEL_PERIOD = 0.5
#: messages of these types are for the controller, others for the agent
_FOR_CONTROLLER = (
    ms.Ready,
    ms.Report,
    ms.Renew,
    ms.Finished,
    ms.Failed,
    ms.Written,
    ms.WriteFailed,
    ms.Progress,
    ms.Corrupt,
)
#: seconds that the other ranks may take to hear that a run is over
_GOODBYE = 5.0
#: seconds in which what the head said last comes, though it has left already: by another way than the new view
_LAST_WORDS = 0.2
#: seconds that ranks may take to report to a head that takes over
_REPORTS = 15.0
#: seconds for which a head that was lost may go on beating before its follower gives up: by then it knows that it is out of the view
_STILL_BEATING = 30.0


class Session:
    """Resources of this rank. Start it before MPI is initialised where that is possible; blocks until all ranks are there."""

    def __init__(self, store: Any = None) -> None:
        self.settings = Settings.from_environment()
        spawner = Spawner()
        try:
            # only now: what is forked before has none of MPI's threads, memory and sockets
            import hoplite_mpi as hm

            self._own_store = store is None
            self.store = hm.init() if store is None else store
        except BaseException:
            spawner.close(1.0)
            raise
        runtime = self.store.runtime
        place = runtime.place
        self.rank, self.incarnation = place.rank, place.incarnation
        # at once: what comes before somebody listens is lost
        self._loop = Loop()
        self._post = self.store.channel(_CHANNEL, self._receive)
        assert runtime.view is not None, "the store is opened when there is a view"
        self.slots = worker_count(self.settings, runtime.view, place.node)
        self.writer = WriterClient(place.rank, place.incarnation)
        self.writer.start()
        arena = {"run": place.arena, "rank": place.rank, "incarnation": place.incarnation}
        self.pool = WorkerPool(self.slots, spawner=spawner, arena=arena, on_exit=self._reap)
        self.pool.start()
        self._loop.drive(self.pool.drive, self.pool.wake)
        self._agent = Agent(self.store, runtime.arena, self.pool, self.slots, self.writer, self._loop)
        self._agent.connect(self._send)
        self._controller: Controller | Takeover | None = None
        #: whether this rank has controlled the latest run, at its end at least, and whether another one has, at its begin
        self.led = self._was_led = False
        #: ranks that were told that the run is over and have not answered, and what they were told
        self._leaving: set[int] = set()
        self._goodbye = ms.End(0, "")
        self._closed = False
        self._view: View = self.store.on_view(lambda view, lost: self._loop.post(lambda: self._new_view(view, lost)))
        #: (rank, incarnation) of all that have been in the view
        self._met = set(self.members())
        if not self.is_head:
            self._send(self._view.coordinator, ms.Hello())

    @property
    def is_head(self) -> bool:
        """Whether this rank controls what the ranks run: the one that has been there for the longest."""
        return self._view.coordinator == self.rank

    # -- messages ------------------------------------------------------------------------------------------------------------

    def _reap(self, pid: int) -> None:
        with contextlib.suppress(FileNotFoundError):  # after an eviction the store, and with it the arena, goes first
            self.store.runtime.arena.reap(pid)

    def _send(self, rank: int, message: ms.Message) -> None:
        if rank == self.rank:  # in order, too, and not before its sender is done with what it does
            self._loop.post(partial(self._handle, (rank, self.incarnation), message))
        else:
            self._post(rank, ms.encode(message))  # to one that is gone it is dropped: the next view tells

    def _receive(self, peer: tuple[int, int], payload: bytes) -> None:
        self._loop.post(lambda: self._handle(peer, ms.decode(payload)))

    def _handle(self, peer: tuple[int, int], message: ms.Message) -> None:
        if type(message) is ms.Run:  # the most frequent ones first
            self._agent.handle(peer[0], message)
        elif type(message) is ms.Finished:
            if self._controller is not None:
                self._controller.handle(*peer, message)
        elif isinstance(message, ms.Over):
            if message.epoch == self._goodbye.epoch:  # else it is of an earlier run
                self._leaving.discard(peer[0])
        elif isinstance(message, ms.Hello):
            if self._controller is not None:
                self._controller.greet(*peer)
            if peer[0] in self._leaving:
                self._send(peer[0], self._goodbye)
        elif not isinstance(message, _FOR_CONTROLLER):
            self._agent.handle(peer[0], message)
        elif self._controller is not None:
            self._controller.handle(*peer, message)

    def _new_view(self, view: View, lost: tuple[Member, ...]) -> None:
        if view.coordinator not in (self.rank, self._view.coordinator):
            self._send(view.coordinator, ms.Hello())  # it may have asked before this rank listened
        self._view = view
        self._met.update(self.members())
        self._leaving.intersection_update(view.ranks)
        if self._controller is not None:
            self._controller.on_view(view, lost)

    # -- running -------------------------------------------------------------------------------------------------------------

    def run(
        self,
        prepare: Callable[[], tuple[Storage, str]],
        *,
        repeatable: bool = False,
        quiet: bool = False,
        terminal: bool | None = None,
    ) -> Ended:
        """Take part in the run of a workflow until it ends.

        prepare: returns storage and id of the workflow; called by the rank that controls the run, what it raises is raised there. If that
        rank is lost, another one goes on; if it was lost before it began, only where *prepare* is *repeatable*: may be called again.
        After an error that nobody foresaw this rank leaves the others, so that they don't wait for it.
        """
        if self.store.closed:
            raise ExoFlowError(f"rank {self.rank} has left the other ranks, so it can run nothing with them")
        show = sys.stderr.isatty() if terminal is None else terminal
        self.led = self._was_led = False
        try:
            going_on = None
            if not self.is_head:
                ended = self._follow()
                if ended is not None:
                    return ended
                going_on = self._agent.run
            self.led = True
            if going_on is not None:
                workflow_id, directory, run = going_on
                return self._lead(Storage(Path(directory).parent.parent, create=False), workflow_id, quiet, show, run)
            if self._was_led and not repeatable:
                error = ExoFlowError("the rank that controls the run is gone, and no other knows what it was to run")
                self.refuse(error, history.Status.RESUMABLE)
                return Ended("", history.Status.RESUMABLE, error)
        except BaseException as error:
            self._leave(error)
            raise
        try:
            storage, workflow_id = prepare()
        except BaseException as error:
            self.refuse(error)
            raise
        try:
            run = self._untold(storage, workflow_id) if self._was_led else ""
            return self._lead(storage, workflow_id, quiet, show, run)
        except BaseException as error:
            self._leave(error)
            raise

    def _leave(self, error: BaseException) -> None:
        """Leave the others, and tell them why if they wait for what this rank says."""
        with contextlib.suppress(Exception):  # the first error is the one to report
            if self.is_head:
                self.refuse(error, history.Status.RESUMABLE)
            self.store.close()

    def _new_run(self) -> str:
        """Return a name that starts with the job's, by which each rank of the job knows the run for one of its own."""
        return f"{self.store.runtime.place.run}.{secrets.token_hex(4)}"

    def _untold(self, storage: Storage, workflow_id: str) -> str:
        """Return the run that another rank of this job has begun, and was lost before it could say so here; empty: it has not begun one."""
        run = history.last_run(journal.read(storage.directory(workflow_id)).records)
        is_ours = run.partition(".")[0] == self.store.runtime.place.run
        return run if is_ours and run != self._agent.latest else ""

    def _follow(self) -> Ended | None:
        """Run what is dispatched here until the run ends; None: this rank has to control it from now on."""
        self._agent.ended = None
        self._was_led = True
        self._loop.run_until(lambda: self._agent.ended is not None or self.is_head or self.store.closed)
        if self._agent.ended is None:
            self._loop.run_until(lambda: self._agent.ended is not None, _LAST_WORDS)
        end = self._agent.ended
        if end is not None:
            return Ended(self._agent.workflow_id, end.status, end.to_error(), directory=self._agent.workflow_dir)
        if not self.store.closed:
            return None
        error = ExoFlowError(f"rank {self.rank}: the others went on without this rank; resume the workflow")
        return Ended("", history.Status.RESUMABLE, error)

    def _lead(self, storage: Storage, workflow_id: str, quiet: bool, terminal: bool, run: str = "") -> Ended:
        """Control the run of a workflow; *run*: the one in which another rank did until it was lost."""
        progress = ProgressLine(workflow_id, terminal=terminal, quiet=quiet)
        tally, own = Tally(), 0
        if run:
            progress.say(f"the rank that controlled the run is gone: rank {self.rank} goes on")
            fault.point("controller.take_over")
            ended = self._ended_before(storage, workflow_id)
            if ended is not None:
                return ended
        try:
            while True:
                with self._controlling(storage, workflow_id, progress, tally, run, own) as controller:
                    self._controller = controller
                    controller.start(self._view)
                    self._watch_for_cancel(controller, storage.directory(workflow_id))
                    self._loop.run_until(lambda: controller.outcome is not None or self.store.closed)
                if not controller.must_begin_again:
                    break
                own = controller.epoch if controller.goes_on else 0
                run = controller.run if own else ""
        except ExoFlowError as error:
            interrupted = isinstance(error, (FencedError, StorageError)) or bool(run)
            status = history.Status.RESUMABLE if interrupted else REFUSED
            if run and isinstance(error, CanceledError):  # meanwhile
                status = history.Status.CANCELED
            self.refuse(error, status)
            return Ended(workflow_id, status, error, directory=self._agent.workflow_dir if run else "")
        finally:
            self._controller = None
        outcome = controller.outcome
        if outcome is None:
            why = "the others went on without the rank that controls the run: resume the workflow"
            directory = str(storage.directory(workflow_id))
            return Ended(workflow_id, history.Status.RESUMABLE, ExoFlowError(why), directory=directory)
        self._dismiss(controller.end_message(), self._view.ranks)
        progress.finish(outcome.status)
        return Ended(workflow_id, outcome.status, outcome.error, outcome, str(storage.directory(workflow_id)))

    def _ended_before(self, storage: Storage, workflow_id: str) -> Ended | None:
        """Tell the others how a run has ended if it had when its head was lost, and return it."""
        directory = storage.directory(workflow_id)
        end = history.last_end(journal.read(directory).records)
        if end is None:
            return None
        error = history.error_of(end) if end.status == history.Status.FAILED else None
        if end.status == history.Status.CANCELED:
            error = history.canceled(workflow_id)
        self._dismiss(ms.End(0, end.status, ms.pack_error(error)), self._view.ranks)
        return Ended(workflow_id, end.status, error, directory=str(directory))

    def refuse(self, error: BaseException, status: str = REFUSED) -> None:
        """Tell the other ranks that the run they wait for will not begin, or not go on."""
        known = (
            error
            if isinstance(error, ExoFlowError)
            else ExoFlowError(f"rank {self.rank} failed: {str(error) or repr(error)}")
        )
        self._dismiss(ms.End(0, status, ms.pack_error(known)), [rank for rank in self._view.ranks if rank != self.rank])

    def _dismiss(self, message: ms.End, ranks: Iterable[int]) -> None:
        """Say that the run is over, and wait for the answers: to leave before them would look like a failure."""
        self._leaving, self._goodbye = set(ranks), message
        for rank in ranks:
            self._send(rank, message)
        self._loop.run_until(lambda: not self._leaving or self.store.closed, _GOODBYE)

    def members(self) -> list[tuple[int, int]]:
        """Return (rank, incarnation) of those that are in the view now."""
        return [(member.rank, member.incarnation) for member in self._view.members.values()]

    @contextlib.contextmanager
    def _controlling(
        self, storage: Storage, workflow_id: str, progress: ProgressLine, tally: Tally, run: str, own: int
    ) -> Iterator[Controller]:
        """Be the controller of a workflow: its journal is ours, and its heartbeat moves.

        run: see `_lead`; own: the epoch in which this rank has controlled it until now, 0: it has not.
        """
        directory = storage.directory(workflow_id)
        base = WorkflowSpec.from_bytes(storage.spec(workflow_id), str(directory / "spec"))
        if not own:
            refuse_if_active(directory, workflow_id, _STILL_BEATING if run else 0.0)
        journal, past = Journal.open(directory, after=own or None)
        try:
            for tail in past.torn:
                progress.say(f"{tail.file}: {tail.nbytes} bytes at its end were never acknowledged and are dropped")
            end = history.last_end(past.records)
            if end is not None and end.status == history.Status.CANCELED:
                raise history.canceled(workflow_id)
            _give_up_damaged(directory, journal, past, progress)
            continued = history.continued(past.records)
            spec = history.expanded(base, directory, continued)
            _check_output(directory, spec, journal, past, progress)
            if not own:
                (directory / "cancel").unlink(missing_ok=True)
            with heartbeat.Heartbeat(directory / "heartbeat", journal.epoch) as beat:
                found = Found(self._new_run())
                if run:
                    found = self._find(directory, spec, journal, past, run, tally, bool(own))
                controller = Controller(
                    workflow_id,
                    directory,
                    spec,
                    journal,
                    past.records,
                    self.store,
                    self._loop,
                    self._send,
                    progress,
                    tally,
                    self.settings.lease,
                    found,
                    continued,
                )
                yield controller
                beat.handed_on = controller.goes_on
        finally:
            journal.close()

    def _find(
        self, directory: Path, spec: WorkflowSpec, journal: Journal, past: History, run: str, tally: Tally, own: bool
    ) -> Found:
        """Ask all ranks what there is of a run whose controller is lost, or was this rank itself."""
        self._controller = takeover = Takeover(journal.epoch, str(directory), run, self._send)
        takeover.start(self._view)
        # one that is not in a run may be at its own work for long: it is taken for one that has nothing
        self._loop.run_until(lambda: takeover.is_complete or self.store.closed, _REPORTS)
        if self.store.closed:
            raise ExoFlowError(f"rank {self.rank}: the others went on without this rank; resume the workflow")
        if not own:
            tally.take_over(history.ran_in(past.records, run), self._met, self._view)
        found = takeover.found(spec, past.records, self.store)
        if own:
            tally.go_on(found.survivors)
        fault.point("controller.taken_over")
        return found

    def _watch_for_cancel(self, controller: Controller, directory: Path) -> None:
        if controller.outcome is not None:
            return
        if (directory / "cancel").exists():
            controller.cancel()
        else:
            self._loop.after(_CANCEL_PERIOD, lambda: self._watch_for_cancel(controller, directory))

    def close(self) -> None:
        """Free everything; never hangs on dead peers. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self.pool.close()
        self.writer.close()
        self._agent.close()
        if self._own_store:
            self.store.close()


def _give_up_damaged(directory: Path, journal: Journal, past: History, progress: ProgressLine) -> None:
    """Void what tasks have continued with that is damaged, and what has come of that."""
    for voided in history.without_damaged(directory, past.records):
        if not voided.lost:
            progress.say(f"{voided.message}; task {voided.task_id} runs again")
        record = records.encode(voided)
        journal.append(record).result()
        past.records.append(record)


def _check_output(directory: Path, spec: WorkflowSpec, journal: Journal, past: History, progress: ProgressLine) -> None:
    """Void the workflow's own output if it is committed and damaged: no task reads it, so no task would find out."""
    known = history.committed_tasks(spec, past.records).get(spec.output)
    if known is None:
        return
    try:
        history.check_output(directory, known)
    except CorruptCheckpointError as error:
        progress.say(str(error))
        record = records.encode(records.TaskVoided(known.task_id, known.attempt, str(error)))
        journal.append(record).result()
        past.records.append(record)


def worker_count(settings: Settings, view: View, node: str) -> int:
    """Return how many worker processes this rank has: what is set, else Slurm's share, else its share of the node's cores."""
    if settings.workers:
        return settings.workers
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    mates = sum(member.node == node for member in view.members.values())
    return max(1, len(os.sched_getaffinity(0)) // max(1, mates))
