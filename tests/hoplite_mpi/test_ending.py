"""How a program of the user ends that neither calls MPI_Finalize nor `os._exit`."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hoplite_mpi.launch import LocalRanks, find_mpiexec
from hoplite_mpi.transport import guard

PROGRAM = """
import os, signal, sys, time
import numpy as np
import hoplite_mpi as hm

how = sys.argv[1]
store = hm.init()
names = [hm.ObjectID.from_name(f"of {r}") for r in range(store.size)]
store.put(np.full(100_000, store.rank), names[store.rank])
for name in names:
    store.get(name)
store.barrier()
if how == "dies":
    if store.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while 1 in store.ranks:
        time.sleep(0.005)
if how == "raises" and store.rank == 1:
    raise RuntimeError("on purpose")
if how != "open":
    store.close()
print("the end")
sys.exit(3 if how == "exits" else 0)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """However ranks end, nothing stays in shared memory."""
    before = set(Path("/dev/shm").iterdir())
    yield
    assert set(Path("/dev/shm").iterdir()) <= before


def _one_by_one(program: Path, how: str, n: int = 3) -> tuple[list[int], str]:
    output = program.parent / "output"
    output.mkdir()
    with LocalRanks(n, [str(program), how], output=output) as ranks:
        codes = ranks.wait(30)
    return [codes[rank] for rank in range(n)], "".join(path.read_text() for path in output.iterdir())


@pytest.mark.parametrize(
    ("how", "codes"), [("returns", [0, 0, 0]), ("open", [0, 0, 0]), ("exits", [3, 3, 3]), ("raises", [0, 1, 0])]
)
def test_ranks_started_one_by_one_end_with_their_own_code(program: Path, how: str, codes: list[int]) -> None:
    ended, output = _one_by_one(program, how)
    assert ended == codes, output
    assert output.count("the end") == 3 - (how == "raises")
    assert "UCX" not in output


@pytest.mark.skipif(not guard.load().loaded, reason=f"the guard is not there: {guard.load().why}")
def test_after_a_death_the_others_end_as_if_nothing_had_been(program: Path) -> None:
    start = time.monotonic()
    ended, output = _one_by_one(program, "dies")
    assert ended == [0, -9, 0], output
    assert output.count("the end") == 2
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(("how", "code"), [("returns", 0), ("open", 0), ("exits", 3)])
def test_ranks_under_one_mpiexec_end_with_their_own_code(program: Path, how: str, code: int) -> None:
    command = [find_mpiexec(), "-n", "2", sys.executable, str(program), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == code, done.stderr
    assert done.stdout.count("the end") == 2
    assert "UCX" not in done.stderr


def test_a_program_that_opens_no_store_ends_mpi_all_the_same() -> None:
    code = (
        "import atexit, hoplite_mpi; from mpi4py import MPI\n"
        "from hoplite_mpi import ending; ending._end(); print(MPI.Is_finalized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr


def test_a_thread_that_comes_later_does_not_pass_for_the_engine() -> None:
    """The system gives the identifier of a thread that has ended to another one; MPI is to be finalized all the same."""
    code = """
import atexit
atexit.register(lambda: print(MPI.Is_finalized()))
import threading
import hoplite_mpi as hm
from mpi4py import MPI

store = hm.init()
store.close()
for _ in range(1000):
    thread = threading.Thread(target=threading.Event().wait, daemon=True)
    thread.start()
    if thread.ident == store.runtime.engine.thread_ident:
        print("reused")
        break
"""
    command = [find_mpiexec(), "-n", "1", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.stdout.split() == ["reused", "True"], done.stderr
