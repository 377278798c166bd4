"""The journal when its writer is killed, stopped or out of disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from exoflow_hpc import _frames, journal
from tests.exoflow_hpc.durability import ROOT, full_disk_only, run_on_small_disk, run_until_killed
from tests.exoflow_hpc.journals import make, numbers, write_epoch


@pytest.fixture
def workflow(tmp_path: Path) -> Path:
    return make(tmp_path / "w")


WRITER = """
import sys
from exoflow_hpc.journal import Journal
opened, history = Journal.open(sys.argv[1])
n = len(history.records)
for n in range(n, n + 5):
    opened.append({"type": "r", "n": n}).result(30)
    print(n, flush=True)
"""


# by pthread_kill: a SIGSTOP to the process may let the calling thread run on for a moment
STOP = """
import signal, threading
from hoplite_mpi.testing import fault
left = {"%s": %d}
def point(name):
    left[name] = left.get(name, 0) - 1
    if left[name] == 0:
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
fault.point = point
"""


@pytest.mark.parametrize(
    ("point", "at"),
    [(p, at) for p in ("before_write", "after_write", "before_fsync", "after_fsync") for at in (1, 3)]
    + [("epoch_created", 1), ("sealed", 1)],
)
def test_kill_at_each_point(workflow: Path, point: str, at: int) -> None:
    acknowledged = [int(n) for n in run_until_killed(WRITER, workflow, fault=f"journal.{point}=kill@{at}").split()]
    history = journal.read(workflow)
    got = [r["n"] for r in history.records]
    assert got[: len(acknowledged)] == acknowledged
    assert len(got) <= len(acknowledged) + 1
    more = [int(n) for n in run_until_killed(WRITER, workflow, fault="journal.after_fsync=kill@3").split()]
    assert more[0] == len(got)  # what was read once stays
    assert numbers(workflow)[: len(got) + len(more)] == got + more


def test_zombie_wakes_after_the_takeover(workflow: Path) -> None:
    """Case 5 and case 11: stopped between write and fsync; two epochs later its record doesn't exist."""
    code = STOP % ("journal.before_write", 3) + WRITER
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    zombie = subprocess.Popen(
        [sys.executable, "-c", code, workflow], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        _, status = os.waitpid(zombie.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        write_epoch(workflow, 100)
        zombie.send_signal(signal.SIGCONT)
        out, err = zombie.communicate(timeout=30)
    finally:
        if zombie.poll() is None:
            zombie.kill()
            zombie.wait()
    assert out.split() == ["0"]
    assert zombie.returncode == 1
    assert "FencedError" in err
    assert "taken over" in err
    # its bytes are in the file, and yet
    assert len(_frames.scan(1, (workflow / "journal" / "00000001").read_bytes()).records) == 3
    assert numbers(workflow) == [0, 100]
    write_epoch(workflow, 101)
    assert numbers(workflow) == [0, 100, 101]


def test_seal_of_an_epoch_that_was_overtaken_does_not_count(workflow: Path) -> None:
    """Epoch 2 is stopped before its seal, epoch 3 takes over; epoch 2's late seal says nothing."""
    write_epoch(workflow, 0)
    code = STOP % ("journal.epoch_created", 1) + WRITER
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    slow = subprocess.Popen(
        [sys.executable, "-c", code, workflow], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert os.WIFSTOPPED(os.waitpid(slow.pid, os.WUNTRACED)[1])
        write_epoch(workflow, 1)
        slow.send_signal(signal.SIGCONT)
        out, err = slow.communicate(timeout=30)
    finally:
        if slow.poll() is None:
            slow.kill()
            slow.wait()
    assert out == ""
    assert "FencedError" in err
    assert numbers(workflow) == [0, 1]
    write_epoch(workflow, 2)
    assert numbers(workflow) == [0, 1, 2]


@full_disk_only
def test_full_disk(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from exoflow_hpc import journal
from exoflow_hpc.errors import JournalBrokenError
root = Path(sys.argv[1]); (root / "journal").mkdir(); (root / "FENCE").touch()
opened, _ = journal.Journal.open(root)
done = 0
try:
    while True:
        opened.append({"type": "r", "n": done, "data": b"x" * 5000}).result(30)
        done += 1
except JournalBrokenError as error:
    print(error.errno, error)
try:
    opened.append({"type": "r"})
except JournalBrokenError:
    print("still broken")
print(done > 10, [r["n"] for r in journal.read(root).records] == list(range(done)))
"""
    done = run_on_small_disk(code, tmp_path, "300k")
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert first.startswith("28 can't commit to the journal")
    assert "full" in first
    assert (second, third) == ("still broken", "True True")
