"""What a rank needs to take part in workflows: store, worker processes, checkpoint writer; one of each for the process's life."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import threading
from functools import partial
from typing import Any

from exoflow_hpc.checkpoint import WriterClient
from exoflow_hpc.errors import ExoFlowError
from exoflow_hpc.outcome import Ended
from exoflow_hpc.rank import messages as ms
from exoflow_hpc.rank.loop import Loop
from exoflow_hpc.rank.running import Prepare, Running
from exoflow_hpc.rank.shares import Shares
from exoflow_hpc.rank.turns import Turn
from exoflow_hpc.settings import Settings
from exoflow_hpc.worker.pool import WorkerPool
from exoflow_hpc.worker.spawner import Spawner
from hoplite_mpi.protocol.view import Member, View

__all__ = ["Session"]

_CHANNEL = 0

_Peer = tuple[int, int]


class Session:
    """Resources of this rank, which its runs share; blocks until all ranks are there. Start it before MPI is initialised where possible."""

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
        #: name of the job, the same on all of its ranks, and how many they were at its start
        self.job, self._size = place.run, place.size
        self.loop = Loop()
        self._lock = threading.Lock()
        #: runs that were called for, and those of them that may go on beside others
        self._turns = self._beside = 0
        #: number → the run, of those that this rank takes part in now
        self._runs: dict[int, Running] = {}
        #: number → what was said of a run that this rank has not come to
        self._early: dict[int, list[tuple[_Peer, ms.Message]]] = {}
        #: number → how it has ended, for those that join later
        self._ended: dict[int, ms.End] = {}
        #: whether this rank has controlled the run that ended last, at its end at least
        self.led = False
        self._closed = False
        # at once: what comes before somebody listens is lost
        self._post = self.store.channel(_CHANNEL, self._receive)
        assert runtime.view is not None, "the store is opened when there is a view"
        self.slots = worker_count(self.settings, runtime.view, place.node)
        self.writer = WriterClient(place.rank, place.incarnation)
        self.writer.start()
        arena = {"run": place.arena, "rank": place.rank, "incarnation": place.incarnation}
        self.pool = WorkerPool(self.slots, spawner=spawner, arena=arena, on_exit=self._reap)
        self.pool.start()
        self.shares = Shares()
        self.loop.drive(self.pool.drive, self.pool.wake)
        self.view: View = self.store.on_view(lambda view, lost: self.loop.post(lambda: self._new_view(view, lost)))
        #: (rank, incarnation) of all that have been in the view
        self.met = set(self.members())
        #: whether a rank may have been lost, so that what it had begun is to be looked for
        self.has_lost = place.incarnation > 0

    def _reap(self, pid: int) -> None:
        with contextlib.suppress(FileNotFoundError):  # after an eviction the store, and with it the arena, goes first
            self.store.runtime.arena.reap(pid)

    def members(self) -> list[tuple[int, int]]:
        """Return (rank, incarnation) of those that are in the view now."""
        return [(member.rank, member.incarnation) for member in self.view.members.values()]

    # -- messages ------------------------------------------------------------------------------------------------------------

    def send(self, run: int, rank: int, message: ms.Message) -> None:
        """Send a message about a run."""
        if rank == self.rank:  # in order, too, and not before its sender is done with what it does
            self.loop.post(partial(self._handle, (rank, self.incarnation), run, message))
        else:
            self._post(rank, ms.encode(run, message))  # to one that is gone it is dropped: the next view tells

    def _receive(self, peer: _Peer, payload: bytes) -> None:
        self.loop.post(lambda: self._handle(peer, *ms.decode(payload)))

    def _handle(self, peer: _Peer, run: int, message: ms.Message) -> None:
        running = self._runs.get(run)
        if running is not None:
            running.take(peer, message)
            return
        end = self._ended.get(run)
        if isinstance(message, ms.End):  # this rank need not take part any more
            self._ended.setdefault(run, message)
            self._early.pop(run, None)
            self.send(run, peer[0], ms.Over(message.epoch))
        elif isinstance(message, ms.Survey):  # what it had is gone, or it has not had anything yet
            self.send(run, peer[0], ms.Report(message.epoch, 0, [], []))
        elif end is not None:
            if isinstance(message, ms.Hello):
                self.send(run, peer[0], dataclasses.replace(end, epoch=0))
            elif isinstance(message, ms.Begin):
                self.send(run, peer[0], ms.Over(message.epoch))
        else:
            early = self._early.setdefault(run, [])
            early.append((peer, message))
            if isinstance(message, ms.Hello) and message.asks:
                begun = [one for _, one in early if isinstance(one, ms.Begin)]
                known = [begun[-1].workflow_id, begun[-1].workflow_dir, begun[-1].run] if begun else []
                self.send(run, peer[0], ms.Hello(begun=known))

    def _new_view(self, view: View, lost: tuple[Member, ...]) -> None:
        self.view = view
        self.met.update(self.members())
        self.has_lost = self.has_lost or bool(lost)
        for running in self._runs.values():
            running.on_view(view, lost)

    # -- running -------------------------------------------------------------------------------------------------------------

    def turn(self, *, beside: bool = False) -> Turn:
        """Return the place of this rank's next run. beside: others go on meanwhile, so each is controlled by another rank."""
        with self._lock:
            turn = Turn(self._turns, self._beside % self._size if beside else 0)
            self._turns += 1
            self._beside += beside
            return turn

    def run(
        self,
        prepare: Prepare,
        turn: Turn | None = None,
        *,
        repeatable: bool = False,
        quiet: bool = False,
        terminal: bool | None = None,
    ) -> Ended:
        """Take part in the run of a workflow until it ends; several threads may, each in another run.

        prepare: returns storage and id of the workflow; called by the rank that controls the run, what it raises is raised there. If that
        rank is lost, another one goes on; if it was lost before it began, only where *prepare* is *repeatable*: may be called again.
        turn: default: the next one. After an error that nobody foresaw this rank leaves the others, so that they don't wait for it.
        """
        turn = turn or self.turn()
        self.led = False
        if self.store.closed:
            raise ExoFlowError(f"rank {self.rank} has left the other ranks, so it can run nothing with them")
        show = sys.stderr.isatty() if terminal is None else terminal
        with contextlib.ExitStack() as stack, self.loop:
            end = self._ended.get(turn.number)
            if end is not None:
                return end.to_ended()
            running = self._runs[turn.number] = Running(self, turn, quiet, show)
            stack.callback(running.close)  # outside of the loop
            try:
                for peer, message in self._early.pop(turn.number, ()):
                    running.take(peer, message)
                running.greet()
                return running.take_part(prepare, repeatable)
            finally:
                del self._runs[turn.number]
                self.led = running.led
                if running.end is not None:
                    self._ended[turn.number] = running.end

    def close(self) -> None:
        """Free everything; never hangs on dead peers. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self.pool.close()
        self.writer.close()
        if self._own_store:
            self.store.close()


def worker_count(settings: Settings, view: View, node: str) -> int:
    """Return how many worker processes this rank has: what is set, else Slurm's share, else its share of the node's cores."""
    if settings.workers:
        return settings.workers
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    mates = sum(member.node == node for member in view.members.values())
    return max(1, len(os.sched_getaffinity(0)) // max(1, mates))
