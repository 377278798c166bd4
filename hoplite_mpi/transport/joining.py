"""Joining: MPI connections between processes that were started apart, by accept and connect.

Both block, so they run in a helper thread, one at a time, in the order in which they were wanted. Of each pair the senior
accepts and the junior connects, so that it is the process without state that crashes if its peer dies. *go* (with the port's name) and
*ready* are exchanged over the side channel just before, so a process is in accept only while the other is known to be about
to connect. The senior of a pair never waits for a more senior one, so the waits have no cycle. A peer that does not answer, since it is
stopped, comes to its turn again and again, and holds up nobody else.

MPICH holds its lock for as long as accept or connect lasts, so if the peer dies meanwhile, every other MPI call of this process blocks,
the engine's with the engine's lock. So a thread that needs neither lock watches the peer, by calling its side channel's address.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
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
#: seconds for the process that frees an accept to leave
_LEAVE_TIMEOUT = 1.0
#: seconds between looks at a peer that is being joined; a join takes some hundredths of a second
_LOOK_PERIOD = 0.2
#: seconds after which a join is in MPI, and mostly not over
_FIRST_LOOK = 0.001
#: seconds until a join that failed though both live is tried again
_RETRY_PERIOD = 1.0
#: variables that would make another process believe that it is this one
_OF_THIS_PROCESS = ("PMI", "HYDI_", "MPI_LOCAL", "HOPLITE_")


class _Job:
    """One pair that is to be joined."""

    def __init__(self, peer: PeerKey, accepts: bool) -> None:
        self.peer = peer
        self.accepts = accepts
        #: where the peer's side channel listens; None if that isn't known
        self.address: tuple[str, int] | None = None
        self.port: str | None = None
        #: until when the peer may take to answer, by `time.monotonic`
        self.deadline = 0.0
        self.ready = threading.Event()
        self.dead = False
        #: accept or connect has come back
        self.over = threading.Event()
        #: the accept was ended by a helper of ours
        self.freed = False


class Joiner:
    """Brings up MPI connections of this process. Methods are called under the engine's lock unless they say otherwise."""

    def __init__(
        self,
        engine: Engine,
        side: SideChannel,
        *,
        is_senior: Callable[[PeerKey], bool],
        address_of: Callable[[PeerKey], tuple[str, int] | None],
        on_joined: Callable[[PeerKey, MPI.Comm], None],
    ) -> None:
        self._engine = engine
        self._side = side
        #: whether this process is the senior one of it and the peer
        self._is_senior = is_senior
        #: where a peer's side channel listens
        self._address_of = address_of
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
                if job.accepts and not self._is_ready(job):
                    self._queue.put(job)  # it may be stopped: others don't wait for it
                    continue
                if not job.dead:
                    comm = self._accept(job) if job.accepts else self._connect(job)
                elif job.accepts and job.port is not None:
                    MPI.Close_port(job.port)
            except MPI.Exception as error:
                log.warning("joining rank %d.%d failed: %s", *job.peer, error)
            self._engine.run(lambda job=job, comm=comm: self._ended(job, comm))  # type: ignore[misc]

    def _ended(self, job: _Job, comm: MPI.Comm | None) -> None:
        del self._jobs[job.peer]
        if comm is None:
            if not job.accepts and not job.dead:
                self._engine.after(_RETRY_PERIOD, lambda: self.want(job.peer))
            return
        self._joined.add(job.peer)
        if not job.dead:
            self._on_joined(job.peer, comm)

    def _is_ready(self, job: _Job) -> bool:
        """Tell the junior peer to go; return whether it has answered, is dead, or had time enough."""
        if job.port is None and not job.dead:
            job.port = MPI.Open_port()
            job.deadline = time.monotonic() + self._engine.config.evict_timeout
            self._engine.run(lambda: self._tell(job, GO, job.port))
        return job.ready.wait(self._engine.config.stall_timeout) or time.monotonic() > job.deadline

    def _accept(self, job: _Job) -> MPI.Comm | None:
        assert job.port is not None
        try:
            if not job.ready.is_set():
                return None
            fault.point("join.before_accept")
            with self._watched(job):
                comm = MPI.COMM_SELF.Accept(job.port)
            if job.freed:  # this is our own helper, not the peer
                return None
            fault.point("join.accepted")
            comm.Set_errhandler(MPI.ERRORS_RETURN)
            return comm
        finally:
            MPI.Close_port(job.port)

    def _connect(self, job: _Job) -> MPI.Comm:
        assert job.port is not None
        self._engine.run(lambda: self._tell(job, READY, None))
        fault.point("join.before_connect")
        with self._watched(job):
            comm = MPI.COMM_SELF.Connect(job.port)
        fault.point("join.connected")
        comm.Set_errhandler(MPI.ERRORS_RETURN)
        return comm

    def _tell(self, job: _Job, kind: int, body: str | None) -> None:
        job.address = self._address_of(job.peer)
        self._side.send(job.peer, kind, body)

    @contextlib.contextmanager
    def _watched(self, job: _Job) -> Iterator[None]:
        threading.Thread(target=self._watch, args=(job,), name="hoplite-watch-join", daemon=True).start()
        try:
            yield
        finally:
            job.over.set()

    def _watch(self, job: _Job) -> None:
        """End a join whose peer is gone, or that takes too long. In a thread of its own, without the engine's lock."""
        config = self._engine.config
        # who accepts is the patient one: if both live and are stuck, the other leaves first, and is seen to be gone
        patience = config.join_timeout * (1.5 if job.accepts else 1.0)
        deadline = time.monotonic() + patience
        if not job.over.wait(_FIRST_LOOK):
            fault.point("join.in_accept" if job.accepts else "join.in_connect")
        while not job.over.wait(_LOOK_PERIOD):
            if job.dead:
                why = "it has been given up"
            elif time.monotonic() > deadline:
                why = f"{patience:g} s are over"
            elif _is_gone(job.address, config.keepalive_timeout):
                why = "its address does not answer"
            else:
                continue
            if job.over.wait(_LOOK_PERIOD):  # it may have ended just before the peer did
                return
            if not job.accepts:
                _give_up(job.peer, why)
            log.warning("accepting rank %d.%d is given up: %s", *job.peer, why)
            job.freed = True
            self._free(job)

    def _free(self, job: _Job) -> None:
        """Free an accept to which nobody will connect: a connect from any live process does."""
        assert job.port is not None
        program = [sys.executable, "-m", "hoplite_mpi.transport._free_accept", job.port]
        command = [*launch.mpiexec_command(launch.find_mpiexec()), *program]
        # with HOPLITE_RUN it is found, and ended, with the run
        own = {name for name in os.environ if name.startswith(_OF_THIS_PROCESS)} - {"HOPLITE_RUN"}
        environment = {name: value for name, value in os.environ.items() if name not in own}
        # it has to find this package also where only this process's path leads to it
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        # again until the accept is over: a connect can fail, and the whole rank waits behind this one
        while not job.over.is_set():
            helper = launch.spawn_tied(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            job.over.wait(_FREE_TIMEOUT)
            assert helper.stdin is not None
            helper.stdin.close()
            try:
                helper.wait(_LEAVE_TIMEOUT)
            except subprocess.TimeoutExpired:
                os.killpg(helper.pid, signal.SIGKILL)
                helper.wait()


def _is_gone(address: tuple[str, int] | None, timeout: float) -> bool:
    """Whether nobody listens any more at the address of a peer, or its host is silent for *timeout* seconds."""
    if address is None:
        return False
    try:
        socket.create_connection(address, timeout).close()
    except OSError:
        return True
    return False


def _give_up(peer: PeerKey, why: str) -> None:
    """A connecter that is stuck can't be freed; it has no state that counts: leave, and be replaced."""
    log.critical("connecting to rank %d.%d is stuck (%s): this process leaves the run", *peer, why)
    os._exit(launch.REPLACE_ME)
