"""The pool itself: what it prints, calls, refuses, and says when it can't start workers."""

from __future__ import annotations

import queue
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

from exoflow_hpc.worker import TaskCrashed, TaskDone, WorkerPool


def test_prints_come_out_line_by_line(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            sys.path[:0] = {sys.path!r}
            import hashlib, queue, cloudpickle
            from exoflow_hpc.worker import TaskIdentity, TaskRequest, WorkerPool
            from hoplite_mpi import ObjectID

            def task(name):
                for number in range(300):
                    print(name, number, name)

            def request(name):
                blob = cloudpickle.dumps(task)
                args = cloudpickle.dumps(((name,), {{}}))
                return TaskRequest(TaskIdentity("w", name), "k", args, {{"k": blob}}, {{}}, ObjectID.random())

            done = queue.Queue()
            with WorkerPool(2) as pool:
                for name in "ab":
                    pool.submit(request(name), done.put)
                for _ in "ab":
                    done.get(timeout=30)
            """
        )
    )
    output = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=True)
    assert output.stdout == "", "stdout is for the result alone"
    lines = output.stderr.splitlines()
    for name in "ab":
        expected = [f"{name} {number} {name}" for number in range(300)]
        assert [line for line in lines if line.startswith(name)] == expected
    assert len(lines) == 600


def test_callback_that_raises_harms_nobody(pool: WorkerPool, tools: Any, caplog: pytest.LogCaptureFixture) -> None:
    called = threading.Event()

    def broken(_result: Any) -> None:
        called.set()
        raise RuntimeError("broken callback")

    pool.submit(tools.request(int), broken)
    assert called.wait(tools.DEADLINE)
    # callbacks come from one thread, so the next one comes when this one has been dealt with
    assert isinstance(tools.call(pool, int), TaskDone)
    assert "broken callback" in caplog.text


def test_pool_that_cannot_start_workers_says_so(tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with WorkerPool(1) as pool:
        result = tools.call(pool, int)
        assert isinstance(result, TaskCrashed)
        assert not result.started
        assert "its forkserver, which exited with status 1" in result.reason
        monkeypatch.undo()
        assert isinstance(tools.call(pool, int), TaskDone)  # what was in the way is gone


def test_closed_pool(tools: Any) -> None:
    pool = WorkerPool(1)
    pool.close()
    with pytest.raises(Exception, match="closed"):
        pool.submit(tools.request(int), print)
    pool.close()
    with pytest.raises(ValueError, match="0 workers"):
        WorkerPool(0)


def test_whoever_drives_the_pool_makes_the_calls_and_its_own_thread_while_nobody_does(
    pool: WorkerPool, tools: Any
) -> None:
    threads: queue.Queue[threading.Thread] = queue.Queue()
    me = threading.current_thread()
    for _ in range(3):
        assert pool.drive(0.0)  # from here on it is this thread
        pool.submit(tools.request(lambda: None), lambda _: threads.put(threading.current_thread()))
        while threads.empty():
            assert pool.drive(tools.DEADLINE)
        assert threads.get() is me
        pool.submit(tools.request(lambda: None), lambda _: threads.put(threading.current_thread()))
        assert threads.get(timeout=tools.DEADLINE) is not me


def test_a_drive_ends_when_it_is_woken_and_when_the_pool_is_closed(own_pool: WorkerPool, tools: Any) -> None:
    driven: list[bool] = []
    woken = threading.Event()

    def drive() -> None:
        while not driven or driven[-1]:
            driven.append(own_pool.drive(tools.DEADLINE))
            woken.set()

    thread = threading.Thread(target=drive)
    thread.start()
    while not woken.wait(0.01):  # the first ones may wake the pool's own thread
        own_pool.wake()
    own_pool.close()
    thread.join(tools.DEADLINE)
    assert driven[0] and not driven[-1]
