"""The rank's side of the forkserver: start it, ask it for workers, hear how they ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass

import msgpack

from .protocol import describe_exit
from .tree import descendants

__all__ = ["Spawner", "WorkerExited", "WorkerStarted", "WorkerUnstarted"]

_MAX_MESSAGE = 4096
#: a worker that imports MPI, and a program that a task starts, is a process of its own; with these it would take itself
#: for its rank. HOPLITE_RUN stays: by it all that a run has started is found
_RANK_VARIABLES = ("HOPLITE_RENDEZVOUS", "HOPLITE_RANK", "HOPLITE_SIZE", "HOPLITE_INCARNATION")
_LAUNCHER_VARIABLES = ("PMI_", "PMIX_", "HYDI_", "HYDRA_", "OMPI_COMM_WORLD_", *_RANK_VARIABLES)
#: a task has one core; also, a forkserver with threads of a BLAS could not fork safely
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
#: not ``-m``: workers have to find what the rank finds, in the same order, whatever put it into the rank's path; and by
#: PYTHONPATH it would also reach the programs that tasks start
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); numbers = [*map(int, sys.argv[2:])]; del sys.argv[1:]; "
    "from exoflow_hpc.worker.forkserver import main; main(*numbers)"
)


@dataclass(frozen=True, slots=True)
class WorkerStarted:
    """A worker process exists."""

    number: int
    pid: int


@dataclass(frozen=True, slots=True)
class WorkerUnstarted:
    """The fork failed; *text* says why."""

    number: int
    text: str


@dataclass(frozen=True, slots=True)
class WorkerExited:
    """A worker process is gone and reaped. exitcode: as `subprocess.Popen.returncode`, −n for signal n."""

    number: int
    exitcode: int


class Spawner:
    """A forkserver process. Start it *before* MPI is initialised. One thread at a time calls its methods."""

    def __init__(self) -> None:
        """Start the forkserver; OSError if that can't be done. It loads its modules meanwhile."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _PROGRAM, json.dumps(sys.path), str(theirs.fileno()), str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    # out of reach of a Ctrl-C or killpg for the rank: it ends after its workers, when the rank does
                    start_new_session=True,
                    env=_environment(),
                )
            except BaseException:
                ours.close()
                raise
        ours.setblocking(False)
        self._socket = ours

    @property
    def pid(self) -> int:
        """Pid of the forkserver."""
        return self._process.pid

    def fileno(self) -> int:
        """Return the descriptor to select on for `receive`."""
        return self._socket.fileno()

    def fork(self, number: int, worker_socket: socket.socket) -> None:
        """Ask for a worker with *worker_socket* as its end; the caller closes its copy."""
        self._send(["fork", number, 0], [worker_socket.fileno()])

    def kill(self, number: int) -> None:
        """Ask to kill worker *number* and all processes in its group. Harmless if it is gone."""
        self._send(["kill", number, 0], [])

    def set_lease(self, holder: int, until: float | None) -> None:
        """Have workers killed that have tasks of *holder*, from *until* (`time.monotonic`) on, whatever becomes of us; None: never."""
        self._send(["lease", holder, until], [])

    def set_holder(self, number: int, holder: int) -> None:
        """Say whose tasks worker *number* has from now on; 0: nobody's that has a lease."""
        self._send(["holder", number, holder], [])

    def _send(self, message: list[object], descriptors: list[int]) -> None:
        try:
            socket.send_fds(self._socket, [msgpack.packb(message)], descriptors)
        except BlockingIOError:
            # hundreds of requests unread: it is stopped or stuck, so no worker can be trusted to end when told to
            self.abort()
        except OSError:
            return  # it is gone: `receive` says so

    def receive(self) -> list[WorkerStarted | WorkerUnstarted | WorkerExited] | None:
        """Return what has happened, without blocking; None when the forkserver is gone."""
        found: list[WorkerStarted | WorkerUnstarted | WorkerExited] = []
        while True:
            try:
                data = self._socket.recv(_MAX_MESSAGE)
            except BlockingIOError:
                return found
            except OSError:
                data = b""
            if not data:
                return found or None
            kind, number, detail = msgpack.unpackb(data)
            if kind == "started":
                found.append(WorkerStarted(number, detail))
            elif kind == "exited":
                found.append(WorkerExited(number, detail))
            else:
                found.append(WorkerUnstarted(number, detail))

    def abort(self) -> None:
        """Kill the forkserver and all that is below it: nobody else ends what has left its worker's group."""
        below = descendants(self._process.pid)
        for pid in (self._process.pid, *below):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def bury(self) -> str:
        """Reap a forkserver that is gone and say how it ended."""
        self._socket.close()
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        return describe_exit(code)

    def close(self, timeout: float) -> bool:
        """End the forkserver and all workers; kill it after *timeout* seconds. Return whether it ended well."""
        self._socket.close()
        try:
            return self._process.wait(timeout) == 0
        except subprocess.TimeoutExpired:
            self.abort()
            self._process.wait()
            return False


def _environment() -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHER_VARIABLES)}
    for name in _THREAD_VARIABLES:
        environment.setdefault(name, "1")
    return environment
