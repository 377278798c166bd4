"""Pools of real worker processes, and means to see processes end."""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from exoflow_hpc.pickling import dumps
from exoflow_hpc.worker import Progress, TaskHandle, TaskIdentity, TaskRequest, TaskResult, WorkerPool
from hoplite_mpi import ObjectID

#: seconds; far more than anything here takes, for a busy machine
DEADLINE = 30.0


def request(function: Callable[..., Any], *args: Any, task_id: str = "task", **changes: Any) -> TaskRequest:
    """Return a request to call *function*, pickled by value, with *args*."""
    blob = dumps(function)
    key = hashlib.blake2b(blob, digest_size=16).hexdigest()
    fields: dict[str, Any] = {
        "identity": TaskIdentity("workflow", task_id),
        "function": key,
        "args": dumps((args, {})),
        "blobs": {key: blob},
        "inputs": {},
        "output": ObjectID.random(),
    }
    blobs = {**fields["blobs"], **changes.pop("blobs", {})}
    return TaskRequest(**{**fields, **changes, "blobs": blobs})


class Submitted:
    """A task in a pool, and what has come of it so far."""

    def __init__(self, pool: WorkerPool, what: TaskRequest, holder: object = None) -> None:
        self.results: queue.Queue[TaskResult] = queue.Queue()
        self.progress: queue.Queue[Progress] = queue.Queue()
        self.handle: TaskHandle = pool.submit(what, self.results.put, self.progress.put, holder)

    def result(self) -> TaskResult:
        return self.results.get(timeout=DEADLINE)

    def reported(self) -> str:
        """Wait for the task's next progress report and return its text."""
        return self.progress.get(timeout=DEADLINE).text


def call(pool: WorkerPool, function: Callable[..., Any], *args: Any, **changes: Any) -> TaskResult:
    """Run *function* in *pool* and wait for what comes of it."""
    return Submitted(pool, request(function, *args, **changes)).result()


def is_alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_gone(*pids: int) -> None:
    """Wait until these processes have ended; AssertionError names those that don't."""
    limit = time.monotonic() + DEADLINE
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            try:
                select.select([descriptor], [], [], max(0.0, limit - time.monotonic()))
            finally:
                os.close(descriptor)
        assert not is_alive(pid), f"process {pid} is still there"


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    """Two workers, for tests that kill none of them."""
    with WorkerPool(2) as made:
        yield made


@pytest.fixture
def own_pool() -> Iterator[WorkerPool]:
    """Two workers, to be killed; afterwards every process of it is gone."""
    with WorkerPool(2) as made:
        call(made, int)
        statistics = made.statistics()
        yield made
        before = [
            *statistics.pids,
            *made.statistics().pids,
            statistics.forkserver_pid,
            made.statistics().forkserver_pid,
        ]
    wait_gone(*(pid for pid in before if pid is not None))


@pytest.fixture
def tools() -> Any:
    """The functions above (test modules can't import this file)."""
    import types

    return types.SimpleNamespace(
        request=request, Submitted=Submitted, call=call, is_alive=is_alive, wait_gone=wait_gone, DEADLINE=DEADLINE
    )
