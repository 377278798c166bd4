"""A rank's part in one run of a workflow: it follows the rank that controls the run, and is the next to control it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from exoflow_hpc import heartbeat, history, journal, records
from exoflow_hpc.errors import CanceledError, CorruptCheckpointError, ExoFlowError, FencedError, StorageError
from exoflow_hpc.journal import History, Journal
from exoflow_hpc.outcome import REFUSED, Ended
from exoflow_hpc.rank import messages as ms
from exoflow_hpc.rank.active import refuse_if_active
from exoflow_hpc.rank.agent import Agent
from exoflow_hpc.rank.controller import Controller
from exoflow_hpc.rank.loop import Strand
from exoflow_hpc.rank.progress import ProgressLine
from exoflow_hpc.rank.takeover import Found, Takeover
from exoflow_hpc.rank.tally import Tally
from exoflow_hpc.rank.turns import Turn, controlling
from exoflow_hpc.spec import WorkflowSpec
from exoflow_hpc.storage import Storage
from hoplite_mpi.protocol.view import Member, View
from hoplite_mpi.testing import fault

if TYPE_CHECKING:
    from exoflow_hpc.rank.session import Session

__all__ = ["Prepare", "Running"]

log = logging.getLogger("exoflow_hpc")

#: returns storage and id of a workflow
Prepare = Callable[[], tuple[Storage, str]]

#: seconds between looks for a request to cancel
_CANCEL_PERIOD = 0.5
#: messages of these types are for the controller, others for the agent
_FOR_CONTROLLER = (
    ms.Ready,
    ms.Shared,
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
#: seconds that ranks may take to say what they know of a run
_ANSWERS = 2.0
#: seconds that ranks may take to report to a head that takes over
_REPORTS = 15.0
#: seconds for which a head that was lost may go on beating before its follower gives up: by then it knows that it is out of the view
_STILL_BEATING = 30.0


class Running:
    """All methods run inside of the session's loop. quiet, terminal: as in `ProgressLine`."""

    def __init__(self, session: Session, turn: Turn, quiet: bool, terminal: bool) -> None:
        self._session = session
        self._turn = turn
        #: rank that controls the run
        self._head = controlling(session.view, turn.first)
        self._quiet, self._terminal = quiet, terminal
        self._loop = Strand(session.loop)
        arena = session.store.runtime.arena
        self._agent = Agent(
            session.store, arena, session.pool, session.slots, session.shares, session.writer, self._loop, self._send
        )
        self._controller: Controller | Takeover | None = None
        #: whether this rank has controlled the run, at its end at least, and whether another one has, at its begin
        self.led = self._was_led = False
        #: ranks that were told that the run is over and have not answered, and what they were told
        self._leaving: set[tuple[int, int]] = set()
        self._goodbye: ms.End | None = None
        #: rank → what it knows of the run (`Hello.begun`), of those that have answered when they were asked
        self._heard: dict[int, list[str]] = {}

    @property
    def is_head(self) -> bool:
        """Whether this rank controls the run."""
        return self._head == self._session.rank

    @property
    def end(self) -> ms.End | None:
        """How the run has ended, as this rank was told or tells others; None: that is not known here."""
        return self._goodbye or self._agent.ended

    def close(self) -> None:
        """Wait for threads; not inside of the loop."""
        self._agent.close()

    # -- messages ------------------------------------------------------------------------------------------------------------

    def _send(self, rank: int, message: ms.Message) -> None:
        self._session.send(self._turn.number, rank, message)

    def take(self, peer: tuple[int, int], message: ms.Message) -> None:
        """Take a message of (rank, incarnation) *peer*."""
        self._loop.call(self._handle, peer, message)

    def _handle(self, peer: tuple[int, int], message: ms.Message) -> None:
        if type(message) is ms.Run:  # the most frequent ones first
            self._agent.handle(peer[0], message)
        elif isinstance(message, _FOR_CONTROLLER):
            if self._controller is not None:
                self._controller.handle(*peer, message)
        elif isinstance(message, ms.Over):
            self._leaving.discard(peer)
            if isinstance(self._controller, Controller):
                self._controller.without(peer[0])
        elif isinstance(message, ms.Hello):
            self._greeted(peer, message)
        else:
            self._agent.handle(peer[0], message)

    def _greeted(self, peer: tuple[int, int], message: ms.Hello) -> None:
        if self._goodbye is not None:
            self._send(peer[0], dataclasses.replace(self._goodbye, epoch=0))  # it may never have been told to begin
        elif message.asks:
            self._send(peer[0], ms.Hello(begun=[*(self._agent.run or ())]))
        else:
            self._heard[peer[0]] = message.begun
        if self._controller is not None:
            self._controller.greet(*peer)

    def on_view(self, view: View, lost: tuple[Member, ...]) -> None:
        """Take a new view, which the session has already."""
        self._loop.call(self._on_view, view, lost)

    def _on_view(self, view: View, lost: tuple[Member, ...]) -> None:
        before, self._head = self._head, controlling(view, self._turn.first)
        if self._head != before:
            self.greet()  # it may have asked before this rank took part
        self._leaving.intersection_update(self._session.members())
        if self._controller is not None:
            self._controller.on_view(view, lost)

    def greet(self) -> None:
        """Tell the rank that controls the run that this one takes part."""
        if not self.is_head:
            self._send(self._head, ms.Hello())

    # -- running -------------------------------------------------------------------------------------------------------------

    def take_part(self, prepare: Prepare, repeatable: bool) -> Ended:
        """As `Session.run`."""
        try:
            return self._take_part(prepare, repeatable)
        finally:
            self._agent.retire()

    def _take_part(self, prepare: Prepare, repeatable: bool) -> Ended:
        try:
            storage: Storage | None = None
            workflow_id = run = ""
            if not self.is_head or self._agent.ended is not None:
                ended = self._follow()
                if ended is not None:
                    return ended
            known = self._agent.run or self._ask()
            if self._agent.ended is not None:
                return self._agent.ended.to_ended()
            if known is not None:
                workflow_id, directory, run = known
                storage = Storage(Path(directory).parent.parent, create=False)
            self.led = True
            if storage is None and self._was_led and not repeatable:
                error = ExoFlowError("the rank that controls the run is gone, and no other knows what it was to run")
                self._refuse(error, history.Status.RESUMABLE)
                return Ended("", history.Status.RESUMABLE, error)
        except BaseException as error:
            self._leave(error)
            raise
        if storage is None:
            try:
                with self._loop.outside():
                    storage, workflow_id = prepare()
            except BaseException as error:
                self._refuse(error)
                raise
        try:
            return self._lead(storage, workflow_id, run or self._untold(storage, workflow_id))
        except BaseException as error:
            self._leave(error)
            raise

    def _leave(self, error: BaseException) -> None:
        """Leave the others, and tell them why if they wait for what this rank says."""
        try:
            with contextlib.suppress(Exception):  # the first error is the one to report
                if self.is_head:
                    self._refuse(error, history.Status.RESUMABLE)
        finally:
            with contextlib.suppress(Exception):
                self._session.store.close()

    @property
    def _prefix(self) -> str:
        """What the names of this run, and of no other of any job, begin with (`messages.Begin.run`)."""
        return f"{self._session.job}.{self._turn.number}."

    def _untold(self, storage: Storage, workflow_id: str) -> str:
        """Return what the run is called if another rank has begun it, and was lost before it could say so here; empty: it is not begun."""
        if not self._session.has_lost:
            return ""
        with self._loop.outside():
            run = history.last_run(journal.read(storage.directory(workflow_id)).records)
        return run if run.startswith(self._prefix) else ""

    def _ask(self) -> tuple[str, str, str] | None:
        """Ask the others whether they were told of the run, if its head may have been lost before this rank came; return what they say."""
        if not self._session.has_lost:
            return None
        others = [rank for rank in self._session.view.ranks if rank != self._session.rank]
        for rank in others:
            self._send(rank, ms.Hello(asks=True))

        def is_known() -> bool:
            return self._agent.ended is not None or self._session.store.closed or any(self._heard.values())

        # who is at its own work has not begun anything
        self._loop.run_until(lambda: is_known() or self._heard.keys() >= set(others), _ANSWERS)
        return next(((known[0], known[1], known[2]) for known in self._heard.values() if known), None)

    def _follow(self) -> Ended | None:
        """Run what is dispatched here until the run ends; None: this rank has to control it from now on."""
        store = self._session.store
        self._was_led = True
        self._loop.run_until(lambda: self._agent.ended is not None or self.is_head or store.closed)
        if self._agent.ended is None:
            self._loop.run_until(lambda: self._agent.ended is not None, _LAST_WORDS)
        end = self._agent.ended
        if end is not None:
            return end.to_ended()
        if not store.closed:
            return None
        return Ended("", history.Status.RESUMABLE, self._left_behind())

    def _left_behind(self) -> ExoFlowError:
        return ExoFlowError(f"rank {self._session.rank}: the others went on without this rank; resume the workflow")

    def _lead(self, storage: Storage, workflow_id: str, run: str) -> Ended:
        """Control the run of a workflow; *run*: what it is called if another rank did until it was lost."""
        store, directory = self._session.store, storage.directory(workflow_id)
        progress = ProgressLine(workflow_id, terminal=self._terminal, quiet=self._quiet)
        tally, own = Tally(), 0
        if run:
            progress.say(f"the rank that controlled the run is gone: rank {self._session.rank} goes on")
            fault.point("controller.take_over")
            ended = self._ended_before(directory, workflow_id)
            if ended is not None:
                return ended
        try:
            while True:
                with self._controlling(storage, workflow_id, progress, tally, run, own) as controller:
                    self._controller = controller
                    controller.start(self._session.view)
                    self._watch_for_cancel(controller, directory)
                    self._loop.run_until(lambda: controller.outcome is not None or store.closed)
                if not controller.must_begin_again:
                    break
                own = controller.epoch if controller.goes_on else 0
                run = controller.run if own else ""
        except ExoFlowError as error:
            interrupted = isinstance(error, (FencedError, StorageError)) or bool(run)
            status = history.Status.RESUMABLE if interrupted else REFUSED
            if run and isinstance(error, CanceledError):  # meanwhile
                status = history.Status.CANCELED
            known = str(directory) if run else ""
            self._refuse(error, status, workflow_id, known)
            return Ended(workflow_id, status, error, directory=known)
        finally:
            self._controller = None
        outcome = controller.outcome
        if outcome is None:
            why = "the others went on without the rank that controls the run: resume the workflow"
            return Ended(workflow_id, history.Status.RESUMABLE, ExoFlowError(why), directory=str(directory))
        self._dismiss(controller.end_message(), self._session.view.ranks)
        progress.finish(outcome.status)
        return Ended(workflow_id, outcome.status, outcome.error, outcome, str(directory))

    def _ended_before(self, directory: Path, workflow_id: str) -> Ended | None:
        """Tell the others how a run has ended if it had when its head was lost, and return it."""
        with self._loop.outside():
            ended = history.ended(directory, workflow_id)
        if ended is not None:
            said = ms.End(0, ended.status, ms.pack_error(ended.error), workflow_id, str(directory))
            self._dismiss(said, self._session.view.ranks)
        return ended

    def _refuse(self, error: BaseException, status: str = REFUSED, workflow_id: str = "", directory: str = "") -> None:
        """Tell the other ranks that the run they wait for will not begin, or not go on."""
        rank = self._session.rank
        known = error
        if not isinstance(known, ExoFlowError):
            known = ExoFlowError(f"rank {rank} failed: {str(error) or repr(error)}")
        others = [other for other in self._session.view.ranks if other != rank]
        self._dismiss(ms.End(0, status, ms.pack_error(known), workflow_id, directory), others)

    def _dismiss(self, message: ms.End, ranks: Iterable[int]) -> None:
        """Say that the run is over, and wait for the answers: to leave before them would look like a failure."""
        to = set(ranks)
        self._goodbye = message
        self._leaving = {peer for peer in self._session.members() if peer[0] in to}
        for rank in to:
            self._send(rank, message)
        self._loop.run_until(lambda: not self._leaving or self._session.store.closed, _GOODBYE)

    @contextlib.contextmanager
    def _controlling(
        self, storage: Storage, workflow_id: str, progress: ProgressLine, tally: Tally, run: str, own: int
    ) -> Iterator[Controller]:
        """Be the controller of a workflow: its journal is ours, and its heartbeat moves.

        run: see `_lead`; own: the epoch in which this rank has controlled it until now, 0: it has not.
        """
        session, directory = self._session, storage.directory(workflow_id)
        with self._loop.outside():  # other runs don't wait for what takes long
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
            with self._loop.outside():
                _give_up_damaged(directory, journal, past, progress)
                continued = history.continued(past.records)
                spec = history.expanded(base, directory, continued)
                _check_output(directory, spec, journal, past, progress)
            if not own:
                (directory / "cancel").unlink(missing_ok=True)
            with heartbeat.Heartbeat(directory / "heartbeat", journal.epoch) as beat:
                found = Found(self._prefix + secrets.token_hex(4))
                if run:
                    found = self._find(directory, spec, journal, past, run, tally, bool(own))
                controller = Controller(
                    workflow_id,
                    directory,
                    spec,
                    journal,
                    past.records,
                    session.store,
                    self._loop,
                    self._send,
                    progress,
                    tally,
                    session.settings.lease,
                    found,
                    continued,
                )
                yield controller
                beat.handed_on = controller.goes_on
        finally:
            with self._loop.outside():
                journal.close()

    def _find(
        self, directory: Path, spec: WorkflowSpec, journal: Journal, past: History, run: str, tally: Tally, own: bool
    ) -> Found:
        """Ask all ranks what there is of a run whose controller is lost, or was this rank itself."""
        session = self._session
        self._controller = takeover = Takeover(journal.epoch, str(directory), run, self._send)
        takeover.start(session.view)
        # one that is not in a run may be at its own work for long: it is taken for one that has nothing
        self._loop.run_until(lambda: takeover.is_complete or session.store.closed, _REPORTS)
        if session.store.closed:
            raise self._left_behind()
        if not own:
            tally.take_over(history.ran_in(past.records, run), session.met, session.view)
        found = takeover.found(spec, past.records, session.store)
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
