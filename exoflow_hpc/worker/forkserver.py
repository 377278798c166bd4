"""The forkserver: a single-threaded process without MPI that forks workers, reaps them, and takes them with it.

Started by `spawner.Spawner` as an interpreter of its own. It ends when the rank closes the control socket or dies; its
workers are killed first, and should it be killed itself, the kernel kills them.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import select
import signal
import socket
import sys
import time
from typing import Any, NoReturn

import msgpack

from .tree import become_subreaper, end_children

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1
_MAX_MESSAGE = 4096
#: seconds for what a dead worker has left to be gone; the other workers can't be ended meanwhile
_PATIENCE = 1.0


class _Server:
    def __init__(self, control: socket.socket, rank: int) -> None:
        self._control = control
        self._rank = rank
        self._pid = os.getpid()
        self._libc = ctypes.CDLL(None, use_errno=True)
        #: pid → number of the worker, for each child that is not reaped
        self._workers: dict[int, int] = {}
        #: holder → `time.monotonic` until which workers may be that have tasks of it (R10b). Kept here and not by the rank: that may be
        #: stopped while its workers go on
        self._leases: dict[int, float] = {}
        #: number of a worker → holder whose tasks it has
        self._holders: dict[int, int] = {}

    def serve(self) -> socket.socket | None:
        """Serve the rank. Returns twice: None when the rank is gone, and in each worker the worker's socket."""
        become_subreaper()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the rank's to handle
        # a handler has to be there, or the wakeup descriptor stays silent
        signal.signal(signal.SIGCHLD, lambda *_: None)
        read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        sources: list[Any] = [self._control, read]
        with contextlib.suppress(OSError):  # kernels before 5.3 have none; the end of the control socket tells as well
            # a fork of the rank may hold its end of the control socket open after the rank's death
            sources.append(os.pidfd_open(self._rank))
        if os.getppid() != self._rank:
            return None
        while True:
            ready, _, _ = select.select(sources, [], [], self._time_left())
            if self._control not in ready:  # what is there may be a new lease
                for pid, number in self._workers.items():
                    if self._is_over(number):
                        _kill_group(pid)
            if read in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(read, _MAX_MESSAGE)
                self._reap()
            if sources[2:] and sources[2] in ready:
                self._end()
                return None
            if self._control in ready:
                try:
                    data, descriptors, _, _ = socket.recv_fds(self._control, _MAX_MESSAGE, 1)
                except OSError:
                    data, descriptors = b"", []
                if not data:
                    self._end()
                    return None
                worker_socket = self._handle(msgpack.unpackb(data), descriptors)
                if worker_socket is not None:
                    return worker_socket

    def _handle(self, message: list[Any], descriptors: list[int]) -> socket.socket | None:
        kind, number, detail = message
        if kind == "kill":
            self._kill(number)
            return None
        if kind == "lease":
            self._leases.pop(number, None)
            if detail is not None:
                self._leases[number] = detail
            return None
        if kind == "holder":
            self._holders[number] = detail
            return None
        sock = socket.socket(fileno=descriptors[0])
        sock.set_inheritable(False)  # what a task starts by os.system() must not hold it open
        try:
            pid = os.fork()
        except OSError as error:
            self._tell("unstarted", number, f"could not be forked: {error}")
            sock.close()
            return None
        if pid == 0:
            self._become_worker(sock.fileno())
            return sock
        with contextlib.suppress(OSError):  # the child does it too: whoever is first
            os.setpgid(pid, pid)
        sock.close()
        self._workers[pid] = number
        self._tell("started", number, pid)
        return None

    def _ends(self, number: int) -> float | None:
        """Return when the lease is over of what a worker has; None: never."""
        return self._leases.get(self._holders.get(number, 0))

    def _is_over(self, number: int) -> bool:
        end = self._ends(number)
        return end is not None and time.monotonic() >= end

    def _time_left(self) -> float | None:
        """Return seconds until a lease is over, if there is anybody whom that concerns."""
        ends = [end for number in self._workers.values() if (end := self._ends(number)) is not None]
        return max(0.0, min(ends) - time.monotonic()) if ends else None

    def _become_worker(self, keep: int) -> None:
        # a group of its own: it can be killed with all that its tasks start
        os.setpgid(0, 0)
        with contextlib.suppress(OSError):  # there is no stderr
            os.dup2(2, 1)  # what tasks print must not get into the result, which is alone on stdout
        become_subreaper()  # so what its tasks start stays below it, whatever group or session that is in
        self._libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != self._pid:  # it died before the line above
            os._exit(1)
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals():
            with contextlib.suppress(OSError, ValueError):  # SIGKILL, SIGSTOP and those of libc
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python has it: BrokenPipeError
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        self._control.detach()  # closed below; the object must not close another file of that number later
        for name in os.listdir("/proc/self/fd"):
            if int(name) > 2 and int(name) != keep:
                with contextlib.suppress(OSError):  # that of the listing itself
                    os.close(int(name))

    def _kill(self, number: int) -> None:
        for pid, known in self._workers.items():
            if known == number:  # not reaped, so the pid is still its own
                _kill_group(pid)

    def _reap(self) -> None:
        while self._workers:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None:
                return
            self._bury(found.si_pid)

    def _bury(self, pid: int) -> None:
        """Kill what a dead worker has left, reap it, tell the rank: when it hears of that, nothing of it is there."""
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # what it leaves is ours when it is dead
        if pid in self._workers:
            _kill_group(pid)  # before it is reaped: until then nobody else gets the number
        # a child that is no worker has lost its parent: a worker that is dead, or something that one had started
        end_children(self._workers, _PATIENCE)
        with contextlib.suppress(ChildProcessError):
            _, status = os.waitpid(pid, 0)
            number = self._workers.pop(pid, None)
            if number is not None:
                self._holders.pop(number, None)
                self._tell("exited", number, os.waitstatus_to_exitcode(status))

    def _end(self) -> None:
        for pid in self._workers:
            _kill_group(pid)
        for pid in list(self._workers):
            self._bury(pid)

    def _tell(self, *message: Any) -> None:
        with contextlib.suppress(OSError):  # the rank is gone: the next select says so
            self._control.send(msgpack.packb(message))


def _kill_group(pid: int) -> None:
    """Kill a worker that is not reaped, so that the number is its own, and its group: a task can have left that."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def _preload() -> None:
    """Import what workers need, so that each is there after one fork."""
    import cloudpickle  # noqa: F401
    import numpy.random  # noqa: F401

    import hoplite_mpi.memory.arena  # noqa: F401

    from . import main  # noqa: F401

    if "mpi4py.MPI" in sys.modules:
        raise SystemExit(
            "exoflow_hpc: an import of ours has loaded MPI into the forkserver: no fork of it can be trusted"
        )
    gc.collect()
    gc.freeze()  # a collection in a worker then writes to none of the shared pages


def main(descriptor: int, rank: int) -> NoReturn:
    """Run the forkserver on the control socket *descriptor* for the process *rank*."""
    control = socket.socket(fileno=descriptor)
    control.set_inheritable(False)
    _preload()
    worker_socket = _Server(control, rank).serve()
    if worker_socket is None:
        os._exit(0)
    from .main import run_worker

    run_worker(worker_socket)
    raise AssertionError("run_worker ends the process")
