"""Sweeping: what dead runs left goes, what live ones have stays."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hoplite_mpi.ids import ObjectID
from hoplite_mpi.memory import Arena, arena_directory, sweep
from hoplite_mpi.meta import Meta

Start = Callable[..., Any]


@pytest.fixture
def root(tmp_path: Path) -> str:
    """A directory of our own: sweeping the real one is for users (locks work the same on any local file system)."""
    return str(tmp_path)


def test_sweep_removes_a_dead_run_and_not_a_live_one(child: Start, root: str) -> None:
    code = """
arena = Arena(sys.argv[2], 0, 0, root=sys.argv[3])
say(put(arena, A, np.arange(9)))
region = arena.allocate(B, Meta.of_bytes(9))
say(1)
hear()
say(len(os.listdir(arena.directory)))
"""
    dead, live = child(code, "dead", root), child(code, "live", root)
    for one in (dead, live):
        assert one.hear() is True
        one.hear()
    assert sweep(root) == []
    dead.kill()
    assert sweep(root) == [os.path.basename(arena_directory("dead"))]
    assert sweep(root) == []
    live.tell()
    assert live.hear() == 3
    assert os.listdir(root) == [os.path.basename(arena_directory("live"))]


def test_sweep_leaves_other_names_alone(root: str) -> None:
    for name in ("other", f"hoplite-{os.geteuid() + 1}-run", "hoplite-x-run"):
        os.mkdir(os.path.join(root, name))
    link = os.path.join(root, os.path.basename(arena_directory("link")))
    os.symlink(os.path.join(root, "other"), link)
    assert sweep(root) == []
    assert len(os.listdir(root)) == 4


def test_sweep_of_a_run_killed_before_it_had_begun(root: str) -> None:
    os.mkdir(arena_directory("empty", root), 0o700)
    assert sweep(root) == [os.path.basename(arena_directory("empty"))]


def test_sweep_keeps_no_run_from_starting(child: Start, root: str) -> None:
    """Runs start and end while two sweepers sweep without a pause; every run that has started keeps its objects."""
    sweeper = "say(1)\nwhile not os.path.exists(sys.argv[2] + '/stop'): sweep(sys.argv[2])\nsay(2)"
    sweepers = [child(sweeper, root) for _ in range(2)]
    for one in sweepers:
        one.hear()
    try:
        for k in range(300):
            with Arena(f"run{k % 3}", 0, 0, root=root) as arena, Arena.attach(f"run{k % 3}", 1, 0, root=root) as mate:
                region = arena.allocate(ObjectID.from_name("x"), Meta.of_bytes(8))
                region.data[:] = b"12345678"
                assert region.seal()
                pinned = mate.map(region.oid)
                assert pinned is not None, k
                assert bytes(pinned.buffer) == b"12345678"
                del region, pinned
    finally:
        Path(root, "stop").touch()
    for one in sweepers:
        assert one.hear() == 2
    assert os.listdir(root) == ["stop"]


def test_sweep_of_mpich_segments(child: Start, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unmapped and old ones go; mapped ones, and young ones, stay."""
    names = [f"mpich_shm_{secrets.token_hex(4)}_0" for _ in range(3)]
    for name in names:
        Path(root, name).write_bytes(bytes(4096))
    mapped, opened, dead = names
    process = child(
        "import mmap\n"
        "with open(sys.argv[2], 'rb') as file: mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)\n"
        "other = open(sys.argv[3])\nsay(1); hear()",
        os.path.join(root, mapped),
        os.path.join(root, opened),
    )
    process.hear()
    assert sweep(root) == [], "they may belong to a process that is just starting"
    monkeypatch.setattr("hoplite_mpi.memory._sweep._MPICH_MIN_AGE", -1.0)
    assert sweep(root) == [dead]
    process.kill()
    assert sorted(sweep(root)) == sorted([mapped, opened])


def test_nothing_of_mpich_goes_where_processes_may_be_hidden(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(root, "mpich_shm_1_0").write_bytes(bytes(4096))
    monkeypatch.setattr("hoplite_mpi.memory._sweep._MPICH_MIN_AGE", -1.0)
    names = {"/proc/self/ns/pid": "pid:[4026532000]", "/proc/self/ns/ipc": "ipc:[4026531839]"}
    monkeypatch.setattr("hoplite_mpi.memory._sweep.os.readlink", names.__getitem__)
    assert sweep(root) == []
    names["/proc/self/ns/ipc"] = "ipc:[4026532001]"
    assert sweep(root) == ["mpich_shm_1_0"]


def test_array_survives_the_sweep_of_its_dead_run(child: Start, root: str) -> None:
    """Whoever has it mapped without a slot (a view that outlives its closed arena) keeps the bytes."""
    arena = Arena("gone", 0, 0, root=root)
    oid = ObjectID.from_name("x")
    region = arena.allocate(oid, Meta.of_bytes(800))
    np.frombuffer(region.data, np.int64)[:] = np.arange(100)
    region.seal()
    pinned = arena.map(oid)
    assert pinned is not None
    arena.close()
    sweep(root)
    assert np.array_equal(np.frombuffer(pinned.buffer, np.int64), np.arange(100))
