"""Joining: MPI connections between processes that were started apart, by accept and connect.

Both block, so they run in a helper thread, one at a time, in the order in which they were wanted. Of each pair the senior
accepts and the junior connects, so that only the process without state can crash in it. *go* (with the port's name) and
*ready* are exchanged over the side channel just before, so a process is in accept only while the other is known to be about
to connect. The senior of a pair never waits for a more senior one, so the waits have no cycle.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from mpi4py import MPI

from hoplite_mpi import launch
from hoplite_mpi.testing import fault
from hoplite_mpi.transport.engine import Engine
from hoplite_mpi.transport.sidechannel import PeerKey, SideChannel

__all__ = ["Joiner"]

log = logging.getLogger("hoplite_mpi.joining")

#: kinds of side-channel messages that are ours
WANT, GO, READY = 10, 11, 12
KINDS = (WANT, GO, READY)
#: seconds for one attempt to free an accept; it takes one or two
_FREE_TIMEOUT = 6.0
#: variables that would make another process believe that it is this one
_OF_THIS_PROCESS = ("PMI", "HYDI_", "MPI_LOCAL", "HOPLITE_")


class _Job:
    """One pair that is to be joined."""

    def __init__(self, peer: PeerKey, accepts: bool) -> None:
        self.peer = peer
        self.accepts = accepts
        self.port: str | None = None
        self.ready = threading.Event()
        self.dead = False

    def open(self, port: str) -> bool:
        """Say that accept is about to be called on *port*; return whether the peer is already dead. Under the engine's lock."""
        self.port = port
        return self.dead


class Joiner:
    """Brings up MPI connections of this process. Methods are called under the engine's lock unless they say otherwise."""

    def __init__(
        self,
        engine: Engine,
        side: SideChannel,
        *,
        is_senior: Callable[[PeerKey], bool],
        on_joined: Callable[[PeerKey, MPI.Comm], None],
    ) -> None:
        self._engine = engine
        self._side = side
        #: whether this process is the senior one of it and the peer
        self._is_senior = is_senior
        self._on_joined = on_joined
        self._jobs: dict[PeerKey, _Job] = {}
        #: pairs connect once in their life: doing it again is known to crash
        self._joined: set[PeerKey] = set()
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def want(self, peer: PeerKey) -> None:
        """Start to bring up the connection to a peer, unless that is under way."""
        if peer in self._joined or peer in self._jobs:
            return
        if self._is_senior(peer):
            self._enqueue(_Job(peer, accepts=True))
        else:
            self._side.send(peer, WANT, None)

    def on_side_message(self, peer: PeerKey, kind: int, body: Any) -> None:
        """Take a WANT, GO or READY."""
        if kind == WANT:
            self.want(peer)
        elif kind == GO and peer not in self._joined and peer not in self._jobs:
            job = _Job(peer, accepts=False)
            job.port = body
            self._enqueue(job)
        elif kind == READY and peer in self._jobs:
            self._jobs[peer].ready.set()

    def forget(self, peer: PeerKey) -> None:
        """Give up on a peer: it is dead."""
        job = self._jobs.get(peer)
        if job is not None:
            job.dead = True
            job.ready.set()
            if job.accepts and job.port is not None:
                threading.Thread(target=self._free, args=(job,), name="hoplite-free-accept", daemon=True).start()

    def stop(self) -> None:
        """End the helper thread when it is done with what it does."""
        self._queue.put(None)

    @property
    def busy(self) -> bool:
        """Whether a connection is being made, so that a thread is in MPI. Any thread."""
        return bool(self._jobs)

    # -- the helper thread ---------------------------------------------------------------------------------------------------

    def _enqueue(self, job: _Job) -> None:
        self._jobs[job.peer] = job
        self._queue.put(job)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="hoplite-join", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            comm = None
            try:
                if not job.dead:
                    comm = self._accept(job) if job.accepts else self._connect(job)
            except MPI.Exception as error:
                log.warning("joining rank %d.%d failed: %s", *job.peer, error)
            self._engine.run(lambda job=job, comm=comm: self._ended(job, comm))  # type: ignore[misc]

    def _ended(self, job: _Job, comm: MPI.Comm | None) -> None:
        del self._jobs[job.peer]
        if comm is None:
            return
        self._joined.add(job.peer)
        if not job.dead:
            self._on_joined(job.peer, comm)

    def _accept(self, job: _Job) -> MPI.Comm | None:
        port = MPI.Open_port()
        try:
            self._engine.run(lambda: self._side.send(job.peer, GO, port))
            if not job.ready.wait(self._engine.config.evict_timeout) or job.dead:
                return None
            if self._engine.run(lambda: job.open(port)):
                return None
            fault.point("join.before_accept")
            comm = MPI.COMM_SELF.Accept(port)
            if job.dead:  # freed by our own helper, not by the peer
                return None
            comm.Set_errhandler(MPI.ERRORS_RETURN)
            return comm
        finally:
            job.port = None
            MPI.Close_port(port)

    def _connect(self, job: _Job) -> MPI.Comm:
        assert job.port is not None
        self._engine.run(lambda: self._side.send(job.peer, READY, None))
        fault.point("join.before_connect")
        watchdog = threading.Timer(self._engine.config.join_timeout, _give_up, (job.peer,))
        watchdog.daemon = True
        watchdog.start()
        try:
            comm = MPI.COMM_SELF.Connect(job.port)
        finally:
            watchdog.cancel()
        comm.Set_errhandler(MPI.ERRORS_RETURN)
        return comm

    def _free(self, job: _Job) -> None:
        """Free an accept whose peer died before it connected: a connect from any live process does."""
        code = "import os, sys; from mpi4py import MPI; MPI.COMM_SELF.Connect(sys.argv[1]); os._exit(0)"
        # again until the accept is over: a connect can fail, and all other joins wait behind this one
        while (port := job.port) is not None:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run(
                    [launch.find_mpiexec(), "-n", "1", sys.executable, "-c", code, port],
                    env={k: v for k, v in os.environ.items() if not k.startswith(_OF_THIS_PROCESS)},
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    timeout=_FREE_TIMEOUT,
                )


def _give_up(peer: PeerKey) -> None:
    """A connecter that is stuck can't be freed; it has no state that counts: leave, and be replaced."""
    log.critical("connecting to rank %d.%d is stuck: this process leaves the run", *peer)
    os._exit(launch.REPLACE_ME)
