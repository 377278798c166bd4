"""What tasks start is gone when they are over, however it tries to get away; what they leave behind hits no other task."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from exoflow_hpc.worker import TaskCancelled, TaskCrashed, TaskDone, TaskFailed, WorkerPool

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def daemonize() -> int:
    """Start a daemon as the book says: in a session of its own, an orphan, all signals ignored; return its pid."""
    read, write = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
            os.environ.clear()
            os.write(write, b"%d" % os.getpid())
            while True:
                time.sleep(1000)
        os._exit(0)
    os.close(write)
    pid = int(os.read(read, 20))
    os.close(read)
    os.wait()
    return pid


def report_daemon() -> int:
    from exoflow_hpc.context import context

    pid = daemonize()
    context().progress(1.0, str(pid))
    return pid


def then_return() -> None:
    report_daemon()


def then_raise() -> None:
    report_daemon()
    raise ValueError("after it")


def then_exit() -> None:
    report_daemon()
    os._exit(3)


def then_kill() -> None:
    report_daemon()
    os.kill(os.getpid(), signal.SIGKILL)


def then_wait() -> None:
    report_daemon()
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    while True:
        pass


@pytest.mark.parametrize(
    ("function", "kind"),
    [(then_return, TaskDone), (then_raise, TaskFailed), (then_exit, TaskCrashed), (then_kill, TaskCrashed)],
)
def test_daemon_is_gone_when_the_attempt_is_over(own_pool: WorkerPool, tools: Any, function: Any, kind: Any) -> None:
    task = tools.Submitted(own_pool, tools.request(function))
    result = task.result()
    assert type(result) is kind
    assert not tools.is_alive(int(task.reported()))
    assert isinstance(tools.call(own_pool, int), TaskDone)
    assert own_pool.statistics().crashed == (kind is TaskCrashed)


def test_daemon_is_gone_when_the_task_was_cancelled(own_pool: WorkerPool, tools: Any) -> None:
    task = tools.Submitted(own_pool, tools.request(then_wait))
    daemon = int(task.reported())
    assert own_pool.cancel(task.handle)
    assert task.result() == TaskCancelled(True)
    assert not tools.is_alive(daemon)


def test_daemon_is_gone_when_the_pool_is_closed(tools: Any) -> None:
    with WorkerPool(1) as pool:
        task = tools.Submitted(pool, tools.request(then_wait))
        daemon = int(task.reported())
    assert not tools.is_alive(daemon)


def test_family_of_daemons(own_pool: WorkerPool, tools: Any) -> None:
    """Each generation becomes a child of the worker only when its parent has been killed."""

    def start() -> None:
        from exoflow_hpc.context import context

        read, write = os.pipe()
        for _ in range(4):
            if os.fork():
                break
            os.setsid()
            os.write(write, b"%d\n" % os.getpid())
        else:
            os.write(write, b"-\n")
        if os.getsid(0) == os.getpid():
            signal.pause()
        with os.fdopen(read) as lines:
            context().progress(1.0, " ".join(iter(lines.readline, "-\n")))

    task = tools.Submitted(own_pool, tools.request(start))
    assert isinstance(task.result(), TaskDone)
    pids = [int(pid) for pid in task.reported().split()]
    assert len(pids) == 4 and not any(tools.is_alive(pid) for pid in pids)


def test_worker_with_children_left_runs_no_other_task(tools: Any) -> None:
    def leave() -> int:
        sys.left = subprocess.Popen(["sleep", "1000"])  # type: ignore[attr-defined]
        return os.getpid()

    with WorkerPool(1) as pool:
        first = tools.Submitted(pool, tools.request(leave))
        second = tools.Submitted(pool, tools.request(lambda: (os.getpid(), hasattr(sys, "left"))))
        assert isinstance(first.result(), TaskDone) and isinstance(second.result(), TaskDone)
        assert pool.statistics().crashed == 0


def test_worker_whose_children_have_ended_goes_on(tools: Any) -> None:
    def run(wait: bool) -> int:
        child = subprocess.Popen(["true"])
        if wait:
            child.wait()
        else:
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie is left
        return os.getpid()

    with WorkerPool(1) as pool:
        pids = {tools.call(pool, run, wait).inline for wait in (True, False, True)}
    assert len(pids) == 1


def test_fork_that_returns_writes_no_output(own_pool: WorkerPool, tools: Any, tmp_path: Path) -> None:
    """A child that comes back from the function, or raises, neither pickles an output nor answers."""

    class Output:
        def __reduce__(self) -> Any:
            with open(path, "a") as file:
                file.write("pickled\n")
            return int, ()

    def fork(raises: bool) -> Any:
        if os.fork() == 0:
            if raises:
                raise ValueError("in the child")
            return Output()
        os.wait()
        return Output()

    path = str(tmp_path / "log")
    for raises in (False, True):
        assert isinstance(tools.call(own_pool, fork, raises), TaskDone)
    assert (tmp_path / "log").read_text() == "pickled\n" * 2


def test_blocked_signals_and_alarms_hit_no_other_task(tools: Any) -> None:
    def leave() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        while signal.SIGALRM not in signal.sigpending():
            pass
        signal.setitimer(signal.ITIMER_REAL, 100, 100)

    with WorkerPool(1) as pool:
        assert isinstance(tools.call(pool, leave), TaskDone)
        result = tools.call(
            pool, lambda: bytes(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, []))) + bytes([signal.alarm(0)])
        )
    assert b"\0" in result.inline and result.inline.endswith(b"\0")


def test_worker_that_leaves_its_group(own_pool: WorkerPool, tools: Any) -> None:
    def leave() -> None:
        from exoflow_hpc.context import context

        os.setpgid(0, os.getpgid(os.getppid()))
        context().progress(1.0, "left")
        signal.pause()

    task = tools.Submitted(own_pool, tools.request(leave))
    task.reported()
    assert own_pool.cancel(task.handle)
    assert task.result() == TaskCancelled(True)


def test_forkserver_is_killed_under_a_task_with_children(own_pool: WorkerPool, tools: Any) -> None:
    """The worker has even undone what ends it with the forkserver."""

    def start() -> None:
        import ctypes

        from exoflow_hpc.context import context

        ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
        child = subprocess.Popen(["sleep", "1000"])
        context().progress(1.0, f"{os.getpid()} {child.pid}")
        signal.pause()

    task = tools.Submitted(own_pool, tools.request(start))
    pids = [int(pid) for pid in task.reported().split()]
    server = own_pool.statistics().forkserver_pid
    assert server is not None
    os.kill(server, signal.SIGKILL)
    assert isinstance(task.result(), TaskCrashed)
    tools.wait_gone(*pids)


def test_forkserver_that_is_stuck_takes_all_with_it(tools: Any) -> None:
    pool = WorkerPool(1)
    pool.start()
    task = tools.Submitted(pool, tools.request(then_wait))
    daemon = int(task.reported())
    server = pool.statistics().forkserver_pid
    assert server is not None
    os.kill(server, signal.SIGSTOP)
    pool.close(timeout=0.1)
    assert task.result() == TaskCancelled(True)
    tools.wait_gone(server, daemon)


def test_task_that_kills_its_forkserver(own_pool: WorkerPool, tools: Any) -> None:
    assert isinstance(tools.call(own_pool, int), TaskDone)
    server = own_pool.statistics().forkserver_pid
    result = tools.call(own_pool, lambda: os.kill(os.getppid(), signal.SIGKILL))
    assert isinstance(result, (TaskCrashed, TaskDone))  # it may have answered before the kernel killed it
    limit = time.monotonic() + tools.DEADLINE
    while (
        own_pool.statistics().forkserver_pid == server
    ):  # until then, a task may be given to a worker that is about to end
        assert time.monotonic() < limit, "the pool still counts on a forkserver that was killed"
        time.sleep(0.01)
    assert isinstance(tools.call(own_pool, int), TaskDone)
