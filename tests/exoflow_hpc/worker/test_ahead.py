"""Tasks that wait in the letter box of a worker: what becomes of them when it dies, takes long, or they are not wanted any more."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from exoflow_hpc.worker import TaskCancelled, TaskCrashed, TaskDone, WorkerPool
from exoflow_hpc.worker import pool as pool_module

__all__: list[str] = []


def _until(path: str) -> None:
    import os
    import time

    from exoflow_hpc import context

    context().progress(1.0, str(os.getpid()))
    while not os.path.exists(path):
        time.sleep(0.001)


@pytest.fixture
def one_worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerPool]:
    """A pool that leaves with its only worker what it was given."""
    monkeypatch.setattr(pool_module, "_LONGEST_WAIT", 1e6)
    monkeypatch.setattr(pool_module, "_QUICK", 1e6)
    with WorkerPool(1) as made:
        yield made


def _behind(pool: WorkerPool, tools: Any, path: Path, count: int) -> tuple[int, Any, list[Any]]:
    """Return the worker's pid, a task that runs until there is a file at *path*, and *count* that wait behind it."""
    again = tools.request(int)
    assert isinstance(tools.Submitted(pool, again).result(), TaskDone)
    running = tools.Submitted(pool, tools.request(_until, str(path)))
    pid = int(running.reported())
    waiting = [tools.Submitted(pool, again) for _ in range(count)]
    assert pool.statistics().queued == count
    assert len(pool._queue) == max(0, count - pool_module._DEPTH + 1), "the others are in its letter box"
    return pid, running, waiting


def test_a_task_that_its_dead_worker_has_never_seen_runs_elsewhere(one_worker: WorkerPool, tools: Any) -> None:
    assert isinstance(tools.call(one_worker, int), TaskDone)
    (pid,) = one_worker.statistics().pids
    os.kill(pid, signal.SIGSTOP)
    task = tools.Submitted(one_worker, tools.request(int))
    os.kill(pid, signal.SIGKILL)
    assert isinstance(task.result(), TaskDone)


def test_one_that_was_cancelled_before_it_was_seen_is_not_run(one_worker: WorkerPool, tools: Any) -> None:
    assert isinstance(tools.call(one_worker, int), TaskDone)
    (pid,) = one_worker.statistics().pids
    os.kill(pid, signal.SIGSTOP)
    task = tools.Submitted(one_worker, tools.request(int))
    assert one_worker.cancel(task.handle)
    assert task.result() == TaskCancelled(True)


def test_they_follow(one_worker: WorkerPool, tools: Any, tmp_path: Path) -> None:
    _, running, waiting = _behind(one_worker, tools, tmp_path / "go", 10)
    (tmp_path / "go").touch()
    assert isinstance(running.result(), TaskDone)
    assert all(isinstance(task.result(), TaskDone) for task in waiting)
    assert one_worker.statistics().started == 1


def test_only_the_one_that_ran_has_crashed_with_its_worker(one_worker: WorkerPool, tools: Any, tmp_path: Path) -> None:
    pid, running, waiting = _behind(one_worker, tools, tmp_path / "never", 5)
    os.kill(pid, signal.SIGKILL)
    assert isinstance(running.result(), TaskCrashed)
    assert all(isinstance(task.result(), TaskDone) for task in waiting)
    assert one_worker.statistics().crashed == 1


def test_cancel_and_withdraw_leave_the_one_that_runs(one_worker: WorkerPool, tools: Any, tmp_path: Path) -> None:
    _, running, (first, second, third) = _behind(one_worker, tools, tmp_path / "go", 3)
    assert one_worker.cancel(second.handle)
    assert second.result() == TaskCancelled(False)
    assert one_worker.withdraw(third.handle)
    assert not one_worker.withdraw(running.handle)
    (tmp_path / "go").touch()
    assert isinstance(running.result(), TaskDone)
    assert isinstance(first.result(), TaskDone)
    assert isinstance(tools.call(one_worker, int), TaskDone)
    assert third.results.empty()
    assert one_worker.statistics().started == 1


def test_cancel_of_the_one_that_runs_leaves_the_others(one_worker: WorkerPool, tools: Any, tmp_path: Path) -> None:
    _, running, waiting = _behind(one_worker, tools, tmp_path / "never", 2)
    assert one_worker.cancel(running.handle)
    assert running.result() == TaskCancelled(True)
    assert all(isinstance(task.result(), TaskDone) for task in waiting)


def test_behind_one_that_takes_long_another_worker_takes_them(own_pool: WorkerPool, tools: Any, tmp_path: Path) -> None:
    again = tools.request(int)
    for _ in range(20):
        tools.Submitted(own_pool, again).result()
    running = tools.Submitted(own_pool, tools.request(_until, str(tmp_path / "go")))
    running.reported()
    waiting = [tools.Submitted(own_pool, again) for _ in range(30)]
    assert all(isinstance(task.result(), TaskDone) for task in waiting)
    assert running.results.empty()
    (tmp_path / "go").touch()
    assert isinstance(running.result(), TaskDone)


def test_one_with_a_limit_waits_for_a_worker_of_its_own(one_worker: WorkerPool, tools: Any, tmp_path: Path) -> None:
    _, running, _ = _behind(one_worker, tools, tmp_path / "go", 0)
    limited = tools.Submitted(one_worker, tools.request(int, timeout=30.0))
    assert len(one_worker._queue) == 1
    time.sleep(0.1)
    (tmp_path / "go").touch()
    assert isinstance(running.result(), TaskDone)
    assert isinstance(limited.result(), TaskDone)
