"""Limits of a task: its time and its memory, kept by the pool, whatever the task does against it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from exoflow_hpc.worker import TaskCancelled, TaskCrashed, TaskDone, TaskFailed, WorkerPool

cloudpickle.register_pickle_by_value(sys.modules[__name__])

#: seconds; a task that is killed for its timeout runs far longer, one that is not far shorter
TIMEOUT = 0.3
MIB = 1 << 20


def sleep() -> None:
    time.sleep(1000)


def spin_in_c() -> None:
    """Hold the GIL for ever."""
    import itertools

    sum(itertools.repeat(0))


def block_signals() -> None:
    """Loop with all signals blocked and SIGTERM ignored."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    while True:
        pass


def stop() -> None:
    """Stop the process: it answers nobody."""
    os.kill(os.getpid(), signal.SIGSTOP)


def load_forever() -> Any:
    """Return something whose unpickling never ends: the task's arguments are loaded on its own time."""

    class Endless:
        def __reduce__(self) -> Any:
            return time.sleep, (1000,)

    return Endless()


@pytest.mark.parametrize("function", [sleep, spin_in_c, block_signals, stop])
def test_timeout(own_pool: WorkerPool, tools: Any, function: Any) -> None:
    result = tools.call(own_pool, function, timeout=TIMEOUT)
    assert isinstance(result, TaskCrashed)
    assert result.kind == "timeout"
    assert result.reason == f"worker pid {result.pid} was killed: attempt 0 ran longer than its timeout of 0.3 s"
    assert not tools.is_alive(result.pid)
    assert isinstance(tools.call(own_pool, int), TaskDone)


def test_loading_the_arguments_is_on_the_clock(own_pool: WorkerPool, tools: Any) -> None:
    result = tools.call(own_pool, id, load_forever(), timeout=TIMEOUT)
    assert isinstance(result, TaskCrashed) and result.kind == "timeout"


def test_waiting_for_a_worker_is_not_on_the_clock(tools: Any) -> None:
    with WorkerPool(1) as pool:
        first = tools.Submitted(pool, tools.request(time.sleep, 2.5))
        second = tools.Submitted(pool, tools.request(int, timeout=2.0))
        assert isinstance(first.result(), TaskDone)
        assert isinstance(second.result(), TaskDone)


def test_timeout_takes_what_the_task_has_started(own_pool: WorkerPool, tools: Any) -> None:
    def start() -> None:
        from exoflow_hpc.context import context

        inside = subprocess.Popen(["sleep", "1000"])
        outside = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        context().progress(1.0, f"{inside.pid} {outside.pid}")
        time.sleep(1000)

    task = tools.Submitted(own_pool, tools.request(start, timeout=3.0))
    pids = [int(pid) for pid in task.reported().split()]
    assert task.result().kind == "timeout"
    assert not any(tools.is_alive(pid) for pid in pids)


def test_a_task_in_time_is_left_alone(pool: WorkerPool, tools: Any) -> None:
    assert isinstance(tools.call(pool, time.sleep, 0.01, timeout=tools.DEADLINE), TaskDone)
    assert isinstance(tools.call(pool, time.sleep, TIMEOUT), TaskDone)  # no limit is left over from the task before


def test_cancel_before_the_timeout(own_pool: WorkerPool, tools: Any) -> None:
    task = tools.Submitted(own_pool, tools.request(block_signals, timeout=1000.0))
    assert own_pool.cancel(task.handle)
    assert task.result() == TaskCancelled(True)


# --- memory ---


def allocate(nbytes: int) -> int:
    return len(bytearray(nbytes))


def test_allocation_above_the_limit_is_a_memory_error(pool: WorkerPool, tools: Any) -> None:
    result = tools.call(pool, allocate, 1 << 30, memory=100 * MIB)
    assert isinstance(result, TaskFailed)
    assert result.type_names[0] == "builtins.MemoryError"
    assert "limit memory=100 MiB, allocated " in result.message
    assert isinstance(result.load_exception(), MemoryError)
    # the limit is the task's, not the worker's
    assert all(isinstance(tools.call(pool, allocate, 200 * MIB), TaskDone) for _ in range(4))


def start_thread() -> None:
    import threading

    threading.stack_size(256 * MIB)
    threading.Thread(target=int).start()


def map_memory() -> None:
    import mmap

    mmap.mmap(-1, 256 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


@pytest.mark.parametrize(("function", "kind"), [(start_thread, "RuntimeError"), (map_memory, "OSError")])
def test_other_errors_for_want_of_memory_name_the_limit(tools: Any, function: Any, kind: str) -> None:
    with WorkerPool(1) as pool:
        result = tools.call(pool, function, memory=100 * MIB)
    assert isinstance(result, TaskFailed)
    assert result.type_names[0] == f"builtins.{kind}"
    assert "limit memory=100 MiB, allocated " in result.message


def test_limit_is_on_top_of_what_the_worker_has(tools: Any) -> None:
    def hoard() -> None:
        sys.hoard = bytearray(150 * MIB)  # type: ignore[attr-defined]

    with WorkerPool(1) as pool:
        assert isinstance(tools.call(pool, hoard), TaskDone)
        assert isinstance(tools.call(pool, allocate, 50 * MIB, memory=100 * MIB), TaskDone)
        assert isinstance(tools.call(pool, allocate, 150 * MIB, memory=100 * MIB), TaskFailed)


def test_mapped_inputs_do_not_count(pool: WorkerPool, tools: Any, tmp_path: Path) -> None:
    def read(path: str) -> int:
        import mmap

        with open(path, "rb") as file:
            return sum(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)[:: 1 << 20])

    with open(tmp_path / "large", "wb") as file:
        file.truncate(300 * MIB)
    assert isinstance(tools.call(pool, read, str(tmp_path / "large"), memory=100 * MIB), TaskDone)


def test_memory_of_children_counts(own_pool: WorkerPool, tools: Any) -> None:
    """Each is below the limit that the kernel keeps for one process; together they are not."""

    def fork() -> None:
        from exoflow_hpc.context import context

        read, write = os.pipe()
        pids = []
        for _ in range(3):
            pid = os.fork()
            if pid == 0:
                os.setsid()
                os.read(read, 1)
                hoard = bytearray(60 * MIB)
                hoard[::4096] = b"x" * len(hoard[::4096])  # touched, so that it is memory
                signal.pause()
            pids.append(str(pid))
        context().progress(1.0, " ".join(pids))
        os.write(write, b"now")
        signal.pause()

    task = tools.Submitted(own_pool, tools.request(fork, memory=100 * MIB))
    result = task.result()
    assert isinstance(result, TaskCrashed)
    assert result.kind == "memory"
    assert "attempt 0 used " in result.reason and "more than its limit memory=100 MiB" in result.reason
    assert not any(tools.is_alive(int(pid)) for pid in [result.pid, *task.reported().split()])


def test_memory_that_forks_share_counts_once(own_pool: WorkerPool, tools: Any) -> None:
    def fork() -> None:
        hoard = bytearray(80 * MIB)
        hoard[::4096] = b"x" * len(hoard[::4096])
        pids = [os.fork() for _ in range(3)]
        if 0 in pids:
            signal.pause()
        time.sleep(0.5)  # several looks

    assert isinstance(tools.call(own_pool, fork, memory=200 * MIB), TaskDone)


def test_crash_at_the_limit_names_it(own_pool: WorkerPool, tools: Any) -> None:
    """As of a library in C that ends the process when it gets no memory."""
    result = tools.call(own_pool, os._exit, 1, memory=100 * MIB)
    assert isinstance(result, TaskCrashed)
    assert "exited with status 1 (its limit is memory=100 MiB; at most " in result.reason


def test_workers_go_before_the_rank(pool: WorkerPool, tools: Any) -> None:
    tools.call(pool, int)
    adjusted = [Path(f"/proc/{pid}/oom_score_adj").read_text().strip() for pid in pool.statistics().pids]
    assert adjusted and set(adjusted) == {"1000"}
    server = pool.statistics().forkserver_pid
    assert Path(f"/proc/{server}/oom_score_adj").read_text() == Path("/proc/self/oom_score_adj").read_text()


#: in a cgroup with little memory: a task that takes more than there is, then one that works
RANK = """
import json, os, queue, sys
with open(os.path.join(sys.argv[1], "cgroup.procs"), "w") as file:
    file.write(str(os.getpid()))
sys.path[:0] = json.loads(sys.argv[2])
import cloudpickle
from exoflow_hpc.worker import TaskIdentity, TaskRequest, WorkerPool
from hoplite_mpi import ObjectID

def hog():
    return len([b"x" * (1 << 20) for _ in range(1024)])  # far above the cgroup's limit, far below the machine's memory

results = queue.Queue()
def call(function):
    request = TaskRequest(
        TaskIdentity("w", "t"), "f", cloudpickle.dumps(((), {})), {"f": cloudpickle.dumps(function)}, {}, ObjectID.random()
    )
    pool.submit(request, results.put)
    return results.get(timeout=60)

with WorkerPool(2) as pool:
    reports = [call(hog).reason, type(call(int)).__name__]
print(json.dumps(reports))
"""


def make_cgroup(path: Path, limits: dict[str, str]) -> bool:
    """Make a cgroup with these limits; False, and nothing is there, where that can't be done."""
    try:
        path.mkdir()
    except OSError:
        return False
    # where no controller of that kind is mounted, it is a directory like any other
    if (path / "cgroup.procs").exists() and all((path / name).exists() for name in limits):
        try:
            for name, value in limits.items():
                (path / name).write_text(value)
            if all((path / name).read_text().strip() == value for name, value in limits.items()):
                return True
        except OSError:
            pass
    path.rmdir()
    return False


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A cgroup with 256 MiB of memory, of version 2 or 1; skips where none can be made."""
    size, name = str(256 * MIB), f"exoflow-test-{os.getpid()}"
    path = Path("/sys/fs/cgroup") / name
    if not make_cgroup(path, {"memory.max": size, "memory.swap.max": "0"}):
        path = Path("/sys/fs/cgroup/memory") / name
        if not make_cgroup(path, {"memory.limit_in_bytes": size, "memory.memsw.limit_in_bytes": size}):
            pytest.skip("no memory cgroup can be made here: that needs root and a writable /sys/fs/cgroup")
    yield path
    deadline = time.monotonic() + 30
    while True:  # busy for a moment after its last process is gone
        try:
            path.rmdir()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def test_out_of_memory_kills_the_worker_and_not_the_rank(small_cgroup: Path, tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    argv = [sys.executable, str(tmp_path / "rank.py"), str(small_cgroup), json.dumps(sys.path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    reason, after = json.loads(done.stdout)
    assert reason.endswith("was killed by SIGKILL (out of memory?)")
    assert after == "TaskDone"
