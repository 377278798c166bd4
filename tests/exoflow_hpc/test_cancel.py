"""Canceling a workflow, whatever becomes of the controller that is asked."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import exoflow_hpc as ef
from exoflow_hpc import history
from exoflow_hpc.compile import compile_workflow
from exoflow_hpc.heartbeat import Heartbeat
from exoflow_hpc.storage import Storage

__all__: list[str] = []


@ef.task
def f() -> int:
    return 1


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return Storage(tmp_path / "s").create("w", compile_workflow(f.bind()).to_bytes())


def test_a_workflow_that_nobody_runs_is_canceled_at_once(directory: Path) -> None:
    storage = directory.parent.parent
    ef.cancel("w", storage)
    assert history.status_of(directory)[0] == "CANCELED"
    with pytest.raises(ef.ExoFlowError, match="ended already"):
        ef.cancel("w", storage)


def test_a_controller_that_dies_after_it_was_asked_keeps_nobody_waiting(directory: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        with Heartbeat(directory / "heartbeat", 0):
            canceling = pool.submit(ef.cancel, "w", directory.parent.parent, 30)
            deadline = time.monotonic() + 30
            while not (directory / "cancel").exists():
                assert time.monotonic() < deadline
                time.sleep(0.01)
        canceling.result(30)
    assert history.status_of(directory)[0] == "CANCELED"
