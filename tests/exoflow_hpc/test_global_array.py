"""Blocks of a global array, saved by many, are one array again (E17)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import exoflow_hpc as ef
from exoflow_hpc import checkpoint, serialize
from exoflow_hpc.checkpoint.group import Item, write_group
from exoflow_hpc.checkpoint.known import Known
from exoflow_hpc.cli.main import main
from exoflow_hpc.errors import CorruptCheckpointError, ExoFlowError
from exoflow_hpc.garbage import collect
from exoflow_hpc.journal import Journal
from tests.exoflow_hpc.durability import run_until_killed
from tests.exoflow_hpc.stored import Stored, flip

WHOLE = np.arange(60 * 40, dtype=np.float64).reshape(60, 40)
#: rows and columns at which the blocks begin and end: small ones go to the journal, large ones to files
ROWS, COLUMNS = [0, 7, 50, 60], [0, 30, 40]


def block(whole: np.ndarray[Any, Any], rows: slice, columns: slice, name: str = "array") -> ef.Shard:
    return ef.Shard(whole[rows, columns], (rows.start, columns.start), whole.shape, name)


def blocks(whole: np.ndarray[Any, Any] = WHOLE) -> list[ef.Shard]:
    return [block(whole, slice(*ROWS[i : i + 2]), slice(*COLUMNS[j : j + 2])) for i in range(3) for j in range(2)]


def commit(stored: Stored, held: Journal, name: str, value: Any) -> None:
    if serialize.pack(value).nbytes <= 4096:
        stored.inline(held, name, value)
    else:
        stored.commit(held, **{name: value})


def store(root: Path, shards: list[ef.Shard]) -> Stored:
    stored = Stored(root / "s", "abcdefgh")
    with stored.open() as held:
        for name, value in zip("abcdefgh", [*shards, "no shard"], strict=False):
            commit(stored, held, name, value)
    return stored


def read(stored: Stored, name: str = "array") -> Any:
    return ef.read_global("w", name, stored.storage.path)


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    return store(tmp_path, blocks())


@pytest.mark.parametrize(
    "key",
    [
        np.s_[:],
        np.s_[...],
        np.s_[5],
        np.s_[-1, -1],
        np.s_[6:51, 29:31],
        np.s_[::7, 3:40:5],
        np.s_[10:20],
        np.s_[..., 39],
        np.s_[20:10],
        np.s_[0:0, 5],
    ],
    ids=str,
)
def test_any_part(stored: Stored, key: Any) -> None:
    part = read(stored)[key]
    np.testing.assert_array_equal(part, WHOLE[key])
    assert part.shape == WHOLE[key].shape


def test_what_it_is(stored: Stored) -> None:
    found = read(stored)
    assert (found.shape, found.dtype, found.ndim, len(found.shards)) == ((60, 40), np.float64, 2, 6)
    assert found.shards["a"] == (slice(0, 7), slice(0, 30))
    assert "6 blocks" in repr(found)
    with pytest.raises(IndexError):
        found[60]
    with pytest.raises(IndexError):
        found[0, 0, 0]
    with pytest.raises(IndexError):
        found[::-1]
    with pytest.raises(ExoFlowError, match="no committed block of a global array 'other'"):
        read(stored, "other")


def test_output_of_one_task_is_a_shard(stored: Stored) -> None:
    one = ef.get_output("w", "c", stored.storage.path)
    assert (one.offset, one.shape, one.name, one.index) == ((7, 0), (60, 40), "array", np.s_[7:50, 0:30])
    np.testing.assert_array_equal(one.array, WHOLE[7:50, :30])
    assert not one.array.flags.writeable


def test_only_blocks_with_a_share_are_read(stored: Stored) -> None:
    """A damaged one is an error where it is needed, and only there."""
    flip(next(path for path in stored.checkpoints.iterdir() if "000000001" in path.name), WHOLE[20, :30].tobytes())
    found = read(stored)
    np.testing.assert_array_equal(found[50:], WHOLE[50:])
    with pytest.raises(CorruptCheckpointError, match="checksum"):
        found[:, 0]


def test_block_that_is_not_there(tmp_path: Path) -> None:
    found = read(store(tmp_path, blocks()[:-1]))
    np.testing.assert_array_equal(found[:50], WHOLE[:50])
    with pytest.raises(ExoFlowError, match="10 of the 40 items asked for are in no committed block"):
        found[55]
    with pytest.raises(ExoFlowError, match="not whole"):
        found.to_hdf5()


def test_file_that_cannot_be_read_hides_only_its_block(stored: Stored) -> None:
    next(path for path in stored.checkpoints.iterdir() if "000000001" in path.name).write_bytes(b"")
    with pytest.raises(ExoFlowError, match="in no committed block that can be read"):
        read(stored)[7, 0]
    np.testing.assert_array_equal(read(stored)[50:], WHOLE[50:])


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (ef.Shard(np.zeros((8, 8)), (5, 25), (60, 40)), "blocks of tasks . and b overlap|tasks a and . overlap"),
        (ef.Shard(np.zeros((1, 1)), (0, 0), (61, 40)), r"shape \(60, 40\)"),
        (ef.Shard(np.zeros((1, 1), "f4"), (59, 39), (60, 40)), "float32"),
    ],
    ids=["overlap", "shape", "dtype"],
)
def test_blocks_that_do_not_fit_together(tmp_path: Path, other: ef.Shard, words: str) -> None:
    with pytest.raises(ExoFlowError, match=words):
        read(store(tmp_path, [*blocks()[:-1], other]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((np.zeros((2, 2)), (0,), (4, 4)), "not within"),
        ((np.zeros((2, 2)), (3, 0), (4, 4)), "not within"),
        ((np.zeros((2, 2)), (-1, 0), (4, 4)), "not within"),
        ((np.zeros(2), (0,), (4,), "a/b"), "can't be the name"),
        (([1, 2], (0,), (4,)), "needs an array"),
        ((np.array([None]), (0,), (4,)), "needs an array"),
    ],
)
def test_shard_that_is_none(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        ef.Shard(*arguments)


@pytest.mark.parametrize("dtype", ["f4", ">i8", "c16", "?", "u1", "f2"])
def test_one_dataset_for_every_tool(tmp_path: Path, dtype: str) -> None:
    whole = WHOLE.astype(dtype)
    stored = store(tmp_path, blocks(whole))
    path = read(stored).to_hdf5()
    with h5py.File(path) as file:
        assert file["array"].dtype == whole.dtype
        np.testing.assert_array_equal(file["array"][()], whole)
        np.testing.assert_array_equal(file["array"][5:52:3, 28:33], whole[5:52:3, 28:33])
    moved = tmp_path / "elsewhere"
    shutil.move(stored.checkpoints, moved)
    with h5py.File(moved / path.name) as file:
        np.testing.assert_array_equal(file["array"][()], whole)
    np.testing.assert_array_equal(WHOLE.astype(dtype), whole)


def test_command_and_gc(stored: Stored, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--storage", str(stored.storage.path)]
    assert main(["array", "w", *arguments]) == 0
    printed = capsys.readouterr().out
    path = stored.checkpoints / "array-array.h5"
    assert printed.startswith(str(path))
    with stored.open():
        assert collect(stored.storage).files == 0
    assert main(["array", "w", "other", *arguments]) == 2
    assert sorted(p.name for p in stored.checkpoints.glob(".tmp*")) == []
    if shutil.which("h5dump"):
        done = subprocess.run(
            ["h5dump", "-y", "-d", "/array", "-s", "6,29", "-c", "2,2", path], capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.partition("DATA {")[2].split()[:4] == ["269,", "270,", "309,", "310"]


def test_kill_while_the_file_is_written(stored: Stored) -> None:
    """The file that was there is still whole, and what is left is removed once nobody can be at it."""
    path = read(stored).to_hdf5()
    code = "import sys, exoflow_hpc as ef; ef.read_global('w', storage=sys.argv[1]).to_hdf5()"
    run_until_killed(code, stored.storage.path, fault="array.before_rename=kill")
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["array"][()], WHOLE)
    (left,) = stored.checkpoints.glob(".tmp-array-*")
    assert collect(stored.storage).files == 0
    os.utime(left, (0, 0))
    assert collect(stored.storage).files == 1
    assert path.exists()


def test_what_hdf5_has_no_type_for_is_still_read(tmp_path: Path) -> None:
    whole = WHOLE.astype("M8[s]")
    found = read(store(tmp_path, blocks(whole)))
    np.testing.assert_array_equal(found[:], whole)
    assert found.dtype == whole.dtype
    with pytest.raises(ExoFlowError, match="HDF5 has no type"):
        found.to_hdf5()


def test_strange_shapes(tmp_path: Path) -> None:
    stored = Stored(tmp_path / "s", "abc")
    with stored.open() as held:
        stored.inline(held, "a", ef.Shard(np.array(5.0), (), (), "scalar"))
        stored.inline(held, "b", ef.Shard(np.zeros((0, 3)), (0, 0), (0, 3), "empty"))
        stored.inline(held, "c", ef.Shard(np.zeros((2, 3), order="F"), (0, 0), (2, 3), "fortran"))
    assert read(stored, "scalar")[()] == 5.0
    assert read(stored, "empty")[:].shape == (0, 3)
    np.testing.assert_array_equal(read(stored, "fortran")[:], np.zeros((2, 3)))


def test_unchanged_block_is_linked_and_still_one_dataset(tmp_path: Path) -> None:
    stored = Stored(tmp_path / "s", "abcd")
    known = Known()
    whole = np.random.default_rng(0).random((4, 200_000))
    with stored.open() as held:
        for number, (task, array, rows) in enumerate([("a", "x", 0), ("b", "y", 0), ("c", "x", 2), ("d", "y", 2)]):
            shard = ef.Shard(whole[rows : rows + 2], (rows, 0), whole.shape, array)
            plan = serialize.pack(shard)
            item = Item(task, task, plan.meta, plan.to_bytes())
            (written,) = write_group(stored.checkpoints, f"00000001-0.0-{number:09d}.h5", [item], known)
            stored.name(held, task, written, plan.meta)
    assert checkpoint.links(stored.directory, "00000001-0.0-000000001.h5") == ["00000001-0.0-000000000.h5"]
    for name in "xy":
        np.testing.assert_array_equal(read(stored, name)[:], whole)
        with h5py.File(read(stored, name).to_hdf5()) as file:
            np.testing.assert_array_equal(file[name][()], whole)
