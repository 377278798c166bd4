"""What has not changed since an earlier output is named or linked, and not written again (E19)."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import exoflow_hpc as ef
from exoflow_hpc import checkpoint, serialize
from exoflow_hpc.checkpoint import Written
from exoflow_hpc.checkpoint.group import Item, write_group
from exoflow_hpc.checkpoint.known import Known, Stamp
from exoflow_hpc.checksums import LEAF
from exoflow_hpc.errors import CorruptCheckpointError
from exoflow_hpc.garbage import collect
from tests.exoflow_hpc.durability import run_until_killed
from tests.exoflow_hpc.stored import Stored, flip

COUNT = 40_000


class Writer:
    """What a writer process does, in this one."""

    def __init__(self, workflow: Path) -> None:
        self.workflow = workflow
        self.directory = workflow / "checkpoints"
        self.directory.mkdir(exist_ok=True)
        self.known = Known()
        self.number = 0

    def write(self, *values: Any, epoch: int = 1) -> list[Written]:
        self.number += 1
        items = []
        for index, value in enumerate(values):
            plan = serialize.pack(value)
            items.append(Item(f"task{index}", f"e{index}", plan.meta, plan.to_bytes()))
        return write_group(self.directory, f"{epoch:08d}-0.0-{self.number:09d}.h5", items, self.known)

    def one(self, value: Any, epoch: int = 1) -> Written:
        return self.write(value, epoch=epoch)[0]

    def read(self, written: Written) -> Any:
        return serialize.unpack(*checkpoint.read(self.workflow, written.file, written.entry, written.checksum))

    def size(self, written: Written) -> int:
        return (self.directory / written.file).stat().st_size


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    return Writer(tmp_path)


def state(step: int, **changes: float) -> dict[str, Any]:
    """Return a state of ten arrays of 320 kB, all of them the same at each step but for *changes*."""
    return {"step": step, **{f"p{n}": np.full(COUNT, changes.get(f"p{n}", n), np.float64) for n in range(10)}}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name])


def test_unchanged_buffers_are_links(writer: Writer) -> None:
    first = writer.one(state(1))
    second = writer.one(state(2, p3=-1.0))
    third = writer.one(state(3, p3=-1.0, p4=-2.0))
    assert writer.size(first) > 10 * 8 * COUNT
    assert writer.size(second) < 1.2 * 8 * COUNT
    assert writer.size(third) < 1.2 * 8 * COUNT
    assert checkpoint.links(writer.workflow, first.file) == []
    assert checkpoint.links(writer.workflow, second.file) == [first.file]
    assert checkpoint.links(writer.workflow, third.file) == [first.file, second.file], "never a link to a link"
    assert_same(writer.read(first), state(1))
    assert_same(writer.read(second), state(2, p3=-1.0))
    assert_same(writer.read(third), state(3, p3=-1.0, p4=-2.0))


def test_same_array_is_named_where_it_is(writer: Writer) -> None:
    array = np.arange(LEAF, dtype=np.float64)
    first, small = writer.write(array, "small")
    second, other, again = writer.write(array, array + 1, array.copy())
    assert (second.file, second.entry, second.checksum) == (first.file, first.entry, first.checksum)
    assert (again.file, again.entry) == (first.file, first.entry)
    assert other.file != first.file
    assert writer.write(array)[0] == second
    assert len(os.listdir(writer.directory)) == 2, "nothing new: no file"
    for written, value in ((second, array), (other, array + 1)):
        np.testing.assert_array_equal(writer.read(written), value)
    assert writer.read(small) == "small"


@pytest.mark.parametrize(
    "other",
    [
        np.arange(LEAF, dtype=">f8"),
        np.arange(LEAF, dtype=np.float64).reshape(2, -1),
        np.arange(LEAF, dtype=np.float64).view(np.int64),
    ],
    ids=["order", "shape", "type"],
)
def test_same_bytes_of_another_type_are_written(writer: Writer, other: np.ndarray[Any, Any]) -> None:
    first = writer.one(np.arange(LEAF, dtype=np.float64))
    second = writer.one(other)
    assert second.file != first.file
    assert writer.read(second).dtype == other.dtype
    np.testing.assert_array_equal(writer.read(second), other)


@pytest.mark.parametrize("place", [0, LEAF // 8, LEAF - 1], ids=["first", "middle", "last"])
def test_one_changed_item_is_enough(writer: Writer, place: int) -> None:
    array = np.arange(LEAF, dtype=np.float64)
    first = writer.one(array)
    changed = array.copy()
    changed[place] = -1.0
    second = writer.one(changed)
    assert second.file != first.file
    np.testing.assert_array_equal(writer.read(second), changed)
    assert writer.one(array).file == first.file


def test_only_within_an_epoch_and_a_workflow(writer: Writer, tmp_path: Path) -> None:
    """So that what is left of an epoch that is over can be judged without looking at later ones."""
    first = writer.one(state(1))
    second = writer.one(state(1), epoch=2)
    assert checkpoint.links(writer.workflow, second.file) == []
    assert first.checksum == second.checksum
    (tmp_path / "other").mkdir()
    other = Writer(tmp_path / "other")
    other.known = writer.known
    assert checkpoint.links(other.workflow, other.one(state(1)).file) == []


def test_workflow_that_was_deleted_and_made_anew(writer: Writer) -> None:
    """The files that this writer remembers are gone, or others with their names."""
    first = writer.one(state(1))
    shutil.rmtree(writer.directory)
    writer.directory.mkdir()
    second = writer.one(state(1))
    assert checkpoint.links(writer.workflow, second.file) == []
    os.replace(writer.directory / second.file, writer.directory / first.file)
    writer.number += 1
    assert checkpoint.links(writer.workflow, writer.one(state(1)).file) == []


def test_what_is_remembered_is_bounded(writer: Writer) -> None:
    writer.known = Known(limit=3)
    first, *_ = [writer.one(np.full(LEAF, float(n))) for n in range(5)]
    assert writer.one(np.full(LEAF, 0.0)).file != first.file
    assert writer.one(np.full(LEAF, 4.0)).entry == "e0"


def test_long_loop_looks_only_at_what_begins_alike(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    true = Stamp.of
    monkeypatch.setattr(Stamp, "of", lambda path: looked.append(path) or true(path))
    for number in range(30):
        writer.one(np.full(LEAF, float(number)))
    assert len(looked) == 30, "each at its own file, when that is durable"


def test_any_hdf5_tool_reads_linked_buffers(writer: Writer) -> None:
    writer.one(state(1))
    second = writer.one(state(2, p3=-1.0))
    with h5py.File(writer.directory / second.file) as file:
        group = file["e0"]
        count = len(group) - 2
        got = pickle.loads(group["pickle"][()].tobytes(), buffers=[group[f"buffer_{n}"][()].data for n in range(count)])
    assert_same(got, state(2, p3=-1.0))


def test_flipped_byte_is_reported_for_each_output_that_uses_it(writer: Writer) -> None:
    first = writer.one(state(1))
    second, third = writer.one(state(2, p3=-1.0)), writer.one(state(3, p7=-1.0))
    flip(writer.directory / first.file, np.full(4, 7.0).tobytes())
    with pytest.raises(CorruptCheckpointError, match=f"{first.file}.*checksum"):
        writer.read(first)
    with pytest.raises(CorruptCheckpointError, match=f"{second.file}.*checksum.*links to in {first.file}"):
        writer.read(second)
    assert_same(writer.read(third), state(3, p7=-1.0))


def test_file_that_is_linked_to_is_missing_or_torn(writer: Writer) -> None:
    first = writer.one(state(1))
    second = writer.one(state(2))
    (writer.directory / first.file).write_bytes(b"")
    with pytest.raises(CorruptCheckpointError, match=f"{second.file}.*of {first.file}, which it links to"):
        writer.read(second)
    (writer.directory / first.file).unlink()
    with pytest.raises(CorruptCheckpointError, match=f"{second.file}.*of {first.file}, which it links to"):
        writer.read(second)


def test_verify_and_gc_know_links(tmp_path: Path) -> None:
    stored = Stored(tmp_path / "s")
    known = Known()
    values = {"a": state(1), "b": state(2, p3=-1.0), "c": state(3, p3=-1.0)}

    def write(name: str, epoch: int, number: int) -> Written:
        plan = serialize.pack(values[name])
        item = Item(name, name, plan.meta, plan.to_bytes())
        return write_group(stored.checkpoints, f"{epoch:08d}-0.0-{number:09d}.h5", [item], known)[0]

    with stored.open() as held:
        written = {name: write(name, 1, number) for number, name in enumerate("abc", 1)}
        for name in "bc":  # that of a, with most of the bytes, is named by nobody
            stored.name(held, name, written[name], serialize.pack(values[name]).meta)
        stored.finish(held)
    with stored.open():
        pass
    assert collect(stored.storage).files == 0
    assert collect(stored.storage, "needed").files == 0, "c links to the files of a and b"
    assert ef.verify("w", storage=stored.storage.path) == []
    flip(stored.checkpoints / written["a"].file, np.full(4, 7.0).tobytes())
    found = ef.verify("w", storage=stored.storage.path)
    assert [one.task for one in found] == ["b", "c"]
    assert all(written["a"].file in one.problem for one in found)


def test_gc_keeps_the_epoch_where_links_cannot_be_read(tmp_path: Path) -> None:
    stored = Stored(tmp_path / "s")
    with stored.open() as held:
        stored.file(1, a=1)
        (stored.checkpoints / stored.commit(held, b=2)).write_bytes(b"torn")
    with stored.open():
        assert collect(stored.storage).files == 0


KILLED = """
import sys, numpy as np
from pathlib import Path
from exoflow_hpc import serialize
from exoflow_hpc.checkpoint.group import Item, write_group
from exoflow_hpc.checkpoint.known import Known, Stamp
known = Known()
for number in range(4):
    state = {f"p{n}": np.full(40_000, float(n)) for n in range(10)} | {"p3": np.full(40_000, 100.0 + number)}
    plan = serialize.pack(state)
    (written,) = write_group(Path(sys.argv[1]), f"00000001-0.0-{number:09d}.h5", [Item("t", "x", plan.meta, plan.to_bytes())], known)
    print(written.file, written.entry, written.checksum, flush=True)
"""


@pytest.mark.parametrize("point", ["before_write", "after_write", "before_rename", "after_rename"])
def test_kill_at_each_point_of_a_file_with_links(tmp_path: Path, point: str) -> None:
    """What was answered for can be read, whatever became of the file that was being written."""
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    answered = run_until_killed(KILLED, directory, fault=f"checkpoint.{point}=kill@3").splitlines()
    assert len(answered) == 2
    for number, line in enumerate(answered):
        file, entry, checksum = line.split()
        value = serialize.unpack(*checkpoint.read(tmp_path, file, entry, checksum))
        assert value["p3"][0] == 100.0 + number
    assert checkpoint.links(tmp_path, answered[1].split()[0]) == [answered[0].split()[0]]
