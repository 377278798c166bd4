"""Processes that are killed: a worker, the forkserver, the rank. The pool goes on, or nothing is left of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from exoflow_hpc.worker import Spawner, TaskCancelled, TaskCrashed, TaskDone, WorkerPool

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def spin_in_c() -> None:
    """Report the pid, then never return to the interpreter: no signal handler of Python runs any more."""
    import collections
    import itertools

    from exoflow_hpc.context import context

    context().progress(1.0, str(os.getpid()))
    collections.deque(itertools.repeat(0), maxlen=0)


def spin_with_child() -> None:
    """Report the pids of this process and of a child that it starts, then wait for ever."""
    import subprocess

    from exoflow_hpc.context import context

    child = subprocess.Popen(["sleep", "1000"])
    context().progress(1.0, f"{os.getpid()} {child.pid}")
    child.wait()


def works(pool: WorkerPool, tools: Any) -> bool:
    """Whether both places of the pool run tasks."""
    both = [tools.Submitted(pool, tools.request(int)) for _ in range(4)]
    return all(isinstance(one.result(), TaskDone) for one in both)


def test_kill_busy_worker(own_pool: WorkerPool, tools: Any) -> None:
    task = tools.Submitted(own_pool, tools.request(spin_in_c))
    pid = int(task.reported())
    os.kill(pid, signal.SIGKILL)
    result = task.result()
    assert result == TaskCrashed(f"worker pid {pid} was killed by SIGKILL (out of memory?)", pid, -9)
    assert not tools.is_alive(pid)
    assert works(own_pool, tools)
    assert own_pool.statistics().crashed == 1


def test_kill_idle_workers(own_pool: WorkerPool, tools: Any) -> None:
    pids = own_pool.statistics().pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    tools.wait_gone(*pids)
    results = [tools.call(own_pool, int) for _ in range(6)]
    # a task that was given to a worker before its death was seen has crashed; none hangs, none is lost
    assert isinstance(results[-1], TaskDone)
    assert all(isinstance(one, (TaskDone, TaskCrashed)) for one in results)
    assert not set(pids) & set(own_pool.statistics().pids)


def _exit() -> None:
    os._exit(3)


def _segfault() -> None:
    import ctypes
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.string_at(0)


def _abort() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.abort()


@pytest.mark.parametrize(
    ("die", "text"),
    [(_exit, "exited with status 3"), (_segfault, "was killed by SIGSEGV"), (_abort, "was killed by SIGABRT")],
)
def test_worker_dies_by_itself(own_pool: WorkerPool, tools: Any, die: Any, text: str) -> None:
    result = tools.call(own_pool, die)
    assert isinstance(result, TaskCrashed)
    assert result.reason == f"worker pid {result.pid} {text}"
    assert works(own_pool, tools)


def _close_everything() -> None:
    os.closerange(0, 10_000)
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    while True:
        signal.sigwait({signal.SIGUSR1})


def test_task_that_closes_its_connection_and_blocks_signals(own_pool: WorkerPool, tools: Any) -> None:
    result = tools.call(own_pool, _close_everything)
    assert isinstance(result, TaskCrashed)
    assert "closed its connection" in result.reason
    assert result.pid is not None
    assert not tools.is_alive(result.pid)
    assert works(own_pool, tools)


def _reuse_descriptor(path: str) -> None:
    os.closerange(3, 10_000)
    descriptors = [os.open(path, os.O_RDWR | os.O_CREAT) for _ in range(20)]
    os.write(descriptors[0], b"precious")


def test_reply_never_goes_into_a_file_of_the_task(own_pool: WorkerPool, tools: Any, tmp_path: Path) -> None:
    result = tools.call(own_pool, _reuse_descriptor, str(tmp_path / "file"))
    assert isinstance(result, TaskCrashed)
    assert (tmp_path / "file").read_bytes() == b"precious"


def _leave_heir() -> None:
    """Die by SIGKILL while a child holds the connection open."""
    if os.fork() == 0:
        signal.pause()
    os.kill(os.getpid(), signal.SIGKILL)


def test_child_that_holds_the_connection(own_pool: WorkerPool, tools: Any) -> None:
    result = tools.call(own_pool, _leave_heir)
    assert isinstance(result, TaskCrashed)
    assert "SIGKILL" in result.reason


def _write_garbage() -> None:
    import stat

    for number in range(3, 100):
        try:
            is_socket = stat.S_ISSOCK(os.fstat(number).st_mode)
        except OSError:
            continue
        if is_socket:
            os.write(number, (5).to_bytes(8, "little") + b"\xc1\xc1\xc1\xc1\xc1")


def test_garbage_on_the_connection(own_pool: WorkerPool, tools: Any) -> None:
    result = tools.call(own_pool, _write_garbage)
    assert isinstance(result, TaskCrashed)
    assert "wrote into its worker's socket" in result.reason
    assert works(own_pool, tools)


def test_what_a_dead_worker_started_is_killed(own_pool: WorkerPool, tools: Any) -> None:
    task = tools.Submitted(own_pool, tools.request(spin_with_child))
    worker, child = map(int, task.reported().split())
    os.kill(worker, signal.SIGKILL)
    assert isinstance(task.result(), TaskCrashed)
    tools.wait_gone(worker, child)


def test_kill_forkserver(own_pool: WorkerPool, tools: Any) -> None:
    tasks = [tools.Submitted(own_pool, tools.request(spin_in_c)) for _ in range(2)]
    pids = [int(task.reported()) for task in tasks]
    waiting = tools.Submitted(own_pool, tools.request(int))
    old = own_pool.statistics().forkserver_pid
    assert old is not None
    os.kill(old, signal.SIGKILL)
    for task in tasks:
        result = task.result()
        assert isinstance(result, TaskCrashed)
        assert "died with its forkserver, which was killed by SIGKILL" in result.reason
    tools.wait_gone(old, *pids)
    assert isinstance(waiting.result(), TaskDone)
    assert works(own_pool, tools)
    assert own_pool.statistics().forkserver_pid != old


def test_cancel_running(own_pool: WorkerPool, tools: Any) -> None:
    task = tools.Submitted(own_pool, tools.request(spin_in_c))
    pid = int(task.reported())
    assert own_pool.cancel(task.handle)
    assert task.result() == TaskCancelled(True)
    assert not tools.is_alive(pid)
    assert not own_pool.cancel(task.handle)
    assert works(own_pool, tools)
    assert own_pool.statistics().crashed == 0


def test_cancel_queued(own_pool: WorkerPool, tools: Any) -> None:
    running = [tools.Submitted(own_pool, tools.request(spin_in_c)) for _ in range(2)]
    for task in running:
        task.reported()
    queued = tools.Submitted(own_pool, tools.request(int))
    assert own_pool.statistics().queued == 1
    assert own_pool.cancel(queued.handle)
    assert queued.result() == TaskCancelled(False)
    for task in running:
        assert own_pool.cancel(task.handle)
        assert task.result() == TaskCancelled(True)


def test_close_with_running_and_queued(tools: Any) -> None:
    exits: list[int] = []
    pool = WorkerPool(1, on_exit=exits.append)
    pool.start()
    running = tools.Submitted(pool, tools.request(spin_with_child))
    pids = [int(text) for text in running.reported().split()]
    queued = tools.Submitted(pool, tools.request(int))
    forkserver = pool.statistics().forkserver_pid
    pool.close()
    assert running.result() == TaskCancelled(True)
    assert queued.result() == TaskCancelled(False)
    assert exits == pids[:1]
    tools.wait_gone(forkserver, *pids)


def test_exit_is_told_before_the_result(tools: Any) -> None:
    told: list[Any] = []
    with WorkerPool(1, on_exit=told.append) as pool:
        task = tools.Submitted(pool, tools.request(_exit))
        result = task.result()
        assert told == [result.pid]


def test_forkserver_that_is_stopped_does_not_hold_up_close(tools: Any) -> None:
    spawner = Spawner()
    pool = WorkerPool(1, spawner=spawner)
    pool.start()
    task = tools.Submitted(pool, tools.request(spin_in_c))
    pid = int(task.reported())
    os.kill(spawner.pid, signal.SIGSTOP)
    pool.close(timeout=0.1)
    assert task.result() == TaskCancelled(True)
    tools.wait_gone(spawner.pid, pid)


RANK = """
import json, queue, signal, sys
sys.path[:0] = json.loads(sys.argv[1])
import cloudpickle
from exoflow_hpc.worker import TaskIdentity, TaskRequest, WorkerPool
from hoplite_mpi import ObjectID

args = cloudpickle.dumps(((), {}))
blobs = {"c": open(sys.argv[2], "rb").read(), "child": open(sys.argv[3], "rb").read()}
reports = queue.Queue()
pool = WorkerPool(2)
pool.start()
for key, blob in blobs.items():
    identity = TaskIdentity("w", key)
    pool.submit(TaskRequest(identity, key, args, {key: blob}, {}, ObjectID.random()), print, reports.put)
pids = [int(pid) for _ in blobs for pid in reports.get(timeout=30).text.split()]
print(json.dumps([pool.statistics().forkserver_pid, *pids]), flush=True)
signal.pause()
"""


HEIR = """
import os, signal
heir = os.fork()
if heir == 0:
    signal.pause()
pids.append(heir)
"""


def test_kill_rank_with_a_fork_that_holds_its_sockets(tools: Any, tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(cloudpickle.dumps(spin_in_c))
    (tmp_path / "child").write_bytes(cloudpickle.dumps(spin_with_child))
    before, print_, after = RANK.partition("print(json")
    (tmp_path / "rank.py").write_text(before + HEIR + print_ + after)
    argv: list[str | Path] = [
        sys.executable,
        tmp_path / "rank.py",
        json.dumps(sys.path),
        tmp_path / "c",
        tmp_path / "child",
    ]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        *pids, heir = json.loads(rank.stdout.readline())
        try:
            rank.kill()
            assert rank.wait(30) == -signal.SIGKILL
            tools.wait_gone(*pids)
            assert tools.is_alive(heir)
        finally:
            os.kill(heir, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_kill_rank(tools: Any, tmp_path: Path, number: int) -> None:
    (tmp_path / "c").write_bytes(cloudpickle.dumps(spin_in_c))
    (tmp_path / "child").write_bytes(cloudpickle.dumps(spin_with_child))
    (tmp_path / "rank.py").write_text(textwrap.dedent(RANK))
    argv: list[str | Path] = [
        sys.executable,
        tmp_path / "rank.py",
        json.dumps(sys.path),
        tmp_path / "c",
        tmp_path / "child",
    ]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        pids = json.loads(rank.stdout.readline())
        assert len(pids) == 4  # the forkserver, two workers, and what one of their tasks started
        assert all(tools.is_alive(pid) for pid in pids)
        rank.send_signal(number)
        assert rank.wait(30) == -number
    tools.wait_gone(*pids)
