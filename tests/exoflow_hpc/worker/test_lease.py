"""Leases: workers end when nobody has said for too long that they may go on, whatever becomes of their rank (R10b)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from exoflow_hpc.worker import TaskCancelled, TaskCrashed, TaskDone, WorkerPool

from .conftest import DEADLINE, Submitted, call, request

__all__: list[str] = []

ROOT = Path(__file__).parents[3]


def _sleep(seconds: float) -> str:
    import time

    import exoflow_hpc as ef

    ef.context().progress(1.0, "runs")
    time.sleep(seconds)
    return "done"


def test_workers_are_killed_when_it_is_over_and_start_again_with_the_next() -> None:
    with WorkerPool(1) as pool:
        assert isinstance(call(pool, _sleep, 0.0), TaskDone)
        running = Submitted(pool, request(_sleep, 60.0), "run")
        assert running.reported() == "runs"
        pool.set_lease(time.monotonic() + 0.2, "run")
        ended = running.result()
        assert isinstance(ended, TaskCrashed)
        assert ended.kind == "rank-lost", "it is not the task's fault"
        assert "nothing was heard of the controller" in ended.reason
        waiting = Submitted(pool, request(_sleep, 0.0), "run")
        time.sleep(0.3)
        assert waiting.results.empty(), "it waits for another lease"
        assert pool.statistics().queued == 1
        pool.set_lease(time.monotonic() + DEADLINE, "run")
        assert isinstance(waiting.result(), TaskDone)
        pool.set_lease(None, "run")
        assert isinstance(call(pool, _sleep, 0.0), TaskDone)


def test_a_lease_that_is_renewed_goes_on() -> None:
    with WorkerPool(1) as pool:
        running = Submitted(pool, request(_sleep, 1.0), "run")
        for _ in range(10):
            pool.set_lease(time.monotonic() + 20.0, "run")
            time.sleep(0.02)
        assert isinstance(running.result(), TaskDone)


def test_what_others_run_goes_on() -> None:
    """One whose lease is over gets no worker, however many are idle; the others get them."""
    with WorkerPool(2) as pool:
        held = Submitted(pool, request(_sleep, 60.0), "run")
        other = Submitted(pool, request(_sleep, 1.5), "other")
        free = Submitted(pool, request(_sleep, 0.0))
        assert (held.reported(), other.reported()) == ("runs", "runs")
        pool.set_lease(time.monotonic() + DEADLINE, "other")
        pool.set_lease(time.monotonic() + 0.2, "run")
        ended = held.result()
        assert isinstance(ended, TaskCrashed) and ended.kind == "rank-lost"
        waiting = Submitted(pool, request(_sleep, 0.0), "run")
        assert isinstance(free.result(), TaskDone)
        assert isinstance(other.result(), TaskDone)
        assert isinstance(Submitted(pool, request(_sleep, 0.0), "other").result(), TaskDone)
        assert waiting.results.empty()
        pool.set_lease(None, "run")
        assert isinstance(waiting.result(), TaskDone)


def test_what_is_cancelled_while_its_lease_is_over() -> None:
    with WorkerPool(1) as pool:
        assert isinstance(call(pool, _sleep, 0.0), TaskDone)
        pool.set_lease(time.monotonic(), "run")
        waiting = Submitted(pool, request(_sleep, 0.0), "run")
        withdrawn = Submitted(pool, request(_sleep, 0.0), "run")
        assert pool.statistics().queued == 2
        assert pool.withdraw(withdrawn.handle)
        assert pool.cancel(waiting.handle)
        assert isinstance(waiting.result(), TaskCancelled)
        left = Submitted(pool, request(_sleep, 0.0), "run")
    assert isinstance(left.result(), TaskCancelled), "the pool was closed"


RANK = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[2])
from tests.exoflow_hpc.worker.conftest import Submitted, request
from exoflow_hpc.worker import WorkerPool

def work(path):
    import time, exoflow_hpc as ef
    ef.context().progress(1.0, "runs")
    while True:
        with open(path, "a") as file:
            file.write(".")
        time.sleep(0.01)

with WorkerPool(1) as pool:
    running = Submitted(pool, request(work, sys.argv[1]), "run")
    running.reported()
    pool.set_lease(time.monotonic() + 1.0, "run")
    os.kill(os.getpid(), signal.SIGSTOP)
    print(type(running.result()).__name__, flush=True)
"""


def test_workers_of_a_stopped_rank_are_killed_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "work"
    rank = subprocess.Popen(
        [sys.executable, "-c", RANK, str(path), str(ROOT)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        _wait(lambda: _state(rank.pid) == "T")
        _wait(lambda: not _grows(path))
        assert _state(rank.pid) == "T", "nobody has woken it"
        size = path.stat().st_size
        os.kill(rank.pid, signal.SIGCONT)
        output, _ = rank.communicate(timeout=DEADLINE)
        assert output == "TaskCrashed\n"
        assert path.stat().st_size == size
    finally:
        rank.kill()
        rank.wait()


def _grows(path: Path) -> bool:
    """Whether somebody writes to it: several times as long as the writer sleeps, on a busy machine too."""
    before = path.stat().st_size
    time.sleep(1.0)
    return path.stat().st_size != before


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _wait(condition: object) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.01)
