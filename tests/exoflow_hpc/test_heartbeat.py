from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from exoflow_hpc.errors import StorageError
from exoflow_hpc.heartbeat import Heartbeat, watch
from tests.exoflow_hpc.durability import ROOT


class Clock:
    """A clock that only moves when it is slept on; *during* runs at each sleep."""

    def __init__(self, during: object = None) -> None:
        self.now = 100.0
        self.during = during

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if callable(self.during):
            self.during()


def change(path: Path, **fields: object) -> None:
    beat = json.loads(path.read_bytes())
    path.write_text(json.dumps({**beat, **fields}))


def test_moves_while_it_runs(tmp_path: Path) -> None:
    path = tmp_path / "heartbeat"
    with Heartbeat(path, 1, interval=0.02) as beating:
        assert watch(path, 30)
        assert watch(path, 30)
        assert beating.error is None
        assert beating.last_beat > 0
        assert path.stat().st_size == 512
    clock = Clock()
    assert not watch(path, clock=clock, sleep=clock.sleep)
    assert clock.now == 100.0  # it says that it has stopped: nobody waits


def test_standing_still_for_three_seconds_of_the_own_clock(tmp_path: Path) -> None:
    path = tmp_path / "heartbeat"
    Heartbeat(path, 1)._beat()
    change(path, boot="another machine", host="far")
    clock = Clock()
    assert not watch(path, 3.0, clock=clock, sleep=clock.sleep)
    assert clock.now == pytest.approx(103.0, abs=0.15)


def test_one_beat_at_the_last_moment_counts(tmp_path: Path) -> None:
    path = tmp_path / "heartbeat"
    Heartbeat(path, 1)._beat()
    change(path, boot="another machine")
    clock = Clock()
    clock.during = lambda: change(path, counter=9) if clock.now > 102.85 else None
    assert watch(path, 3.0, clock=clock, sleep=clock.sleep)


def test_absent(tmp_path: Path) -> None:
    clock = Clock()
    assert not watch(tmp_path / "heartbeat", clock=clock, sleep=clock.sleep)
    assert clock.now == 100.0


def test_that_appears_while_watched(tmp_path: Path) -> None:
    path = tmp_path / "heartbeat"
    path.write_bytes(b"half a be")
    clock = Clock(lambda: Heartbeat(path, 1)._beat())
    assert watch(path, clock=clock, sleep=clock.sleep)


def test_garbage_that_stands_still(tmp_path: Path) -> None:
    path = tmp_path / "heartbeat"
    path.write_bytes(b"\xff\0[")
    clock = Clock()
    assert not watch(path, clock=clock, sleep=clock.sleep)
    assert clock.now >= 102.9


def test_dead_process_of_this_host_needs_no_wait(tmp_path: Path) -> None:
    path = tmp_path / "heartbeat"
    code = (
        "import os, sys; from exoflow_hpc import heartbeat as h"
        "; h.Heartbeat(sys.argv[1], 3).start(); os.kill(os.getpid(), 9)"
    )
    subprocess.run(
        [sys.executable, "-c", code, path], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=30, check=False
    )
    assert json.loads(path.read_bytes())["epoch"] == 3
    clock = Clock()
    assert not watch(path, clock=clock, sleep=clock.sleep)
    assert clock.now == 100.0


@pytest.mark.parametrize("field", ["boot", "pid_namespace"])
def test_process_of_elsewhere_is_never_called_dead_by_its_pid(tmp_path: Path, field: str) -> None:
    path = tmp_path / "heartbeat"
    Heartbeat(path, 1)._beat()
    change(path, pid=2**22 + 1, **{field: "other"})
    clock = Clock()
    assert not watch(path, clock=clock, sleep=clock.sleep)
    assert clock.now >= 102.9


def test_pid_taken_by_another_process(tmp_path: Path) -> None:
    path = tmp_path / "heartbeat"
    Heartbeat(path, 1)._beat()
    clock = Clock()
    assert not watch(path, 1.0, clock=clock, sleep=clock.sleep)
    assert clock.now > 100.5  # we live: waited for
    change(path, started="1")
    clock = Clock()
    assert not watch(path, clock=clock, sleep=clock.sleep)
    assert clock.now == 100.0


def test_older_epoch_gives_way(tmp_path: Path) -> None:
    path = tmp_path / "heartbeat"
    newer, older = Heartbeat(path, 2), Heartbeat(path, 1)
    newer._beat()
    before = path.read_bytes()
    older._beat()
    older.stop()
    assert older.superseded
    assert not newer.superseded
    assert path.read_bytes() == before
    newer._beat()
    assert path.read_bytes() != before


def test_storage_that_is_gone_is_remembered_and_survived(tmp_path: Path) -> None:
    directory = tmp_path / "w"
    with pytest.raises(StorageError, match="heartbeat"):
        Heartbeat(directory / "heartbeat", 1).start()
    directory.mkdir()
    beating = Heartbeat(directory / "heartbeat", 1)
    beating._beat()
    os.rename(directory, tmp_path / "away")
    beating._beat()
    assert isinstance(beating.error, StorageError)
    os.rename(tmp_path / "away", directory)
    beating._beat()
    assert beating.error is None


def test_no_thread_is_left(tmp_path: Path) -> None:
    before = {t.ident for t in threading.enumerate()}
    with Heartbeat(tmp_path / "heartbeat", 1, interval=0.01):
        pass
    assert not [t for t in threading.enumerate() if t.name == "heartbeat-1" and t.ident not in before]
