"""Writing and reading files, without the writer process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from exoflow_hpc import checkpoint, serialize
from exoflow_hpc.checkpoint.group import Item, write_group
from exoflow_hpc.errors import CorruptCheckpointError, StorageError
from tests.exoflow_hpc.durability import full_disk_only, run_on_small_disk

NAME = "00000001-0.0-000000000.h5"
DTYPES = (
    hnp.scalar_dtypes()
    | hnp.array_dtypes(allow_subarrays=True)
    | hnp.byte_string_dtypes()
    | hnp.unicode_string_dtypes(min_len=1)
)
ARRAYS = hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
VALUES = st.lists(st.integers() | st.text(max_size=4) | st.binary(max_size=9) | ARRAYS, max_size=3) | ARRAYS


@pytest.fixture
def workflow(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


def item(value: Any, entry: str = "x", task: str = "task") -> Item:
    plan = serialize.pack(value)
    return Item(task, entry, plan.meta, plan.to_bytes())


def write(workflow: Path, *items: Item, name: str = NAME) -> list[checkpoint.Written]:
    return write_group(workflow / "checkpoints", name, list(items))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.lists(VALUES, min_size=1, max_size=4))
def test_round_trip(workflow: Path, values: list[Any]) -> None:
    items = [item(value, f"e{index}") for index, value in enumerate(values)]
    written = write(workflow, *items)
    for source, result in zip(items, written, strict=True):
        assert (result.file, result.entry, result.nbytes) == (NAME, source.entry, source.meta.nbytes)
        assert result.checksum == serialize.checksum(source.meta, source.data)
        meta, buffer = checkpoint.read(workflow, result.file, result.entry, result.checksum)
        assert meta == source.meta
        assert bytes(buffer) == source.data
        assert buffer.readonly
        target = bytearray(b"\xaa" * result.nbytes)
        assert checkpoint.read_into(workflow, result.file, result.entry, memoryview(target), result.checksum) == meta
        assert bytes(target) == source.data
    assert checkpoint.entries(workflow, NAME) == [s.entry for s in items]


@pytest.mark.parametrize(
    "dtype",
    ["f8", ">f4", "f2", "?", "c8", "c16", "u1", "i8", "S5", "g", "V8", [("a", "i4"), ("b", ">f8", (2,))]],
    ids=str,
)
def test_plain_h5py_reads_arrays(workflow: Path, dtype: Any) -> None:
    array = np.frombuffer(np.random.default_rng(1).bytes(6 * np.dtype(dtype).itemsize), dtype).reshape(2, 3)
    if dtype == "?":
        array = np.array([[True, False, True], [False, True, True]])
    write(workflow, item(array, "weights", "train[3]"))
    with h5py.File(workflow / "checkpoints" / NAME) as file:
        dataset = file["weights"]
        assert dataset.dtype == array.dtype
        assert dataset.shape == (2, 3)
        assert dataset[()].tobytes() == array.tobytes()
        assert dataset.attrs["exoflow_task"] == b"train[3]"
        assert len(dataset.attrs["exoflow_checksum"]) == 32


@pytest.mark.parametrize(
    "array", [np.array(["2020-01-01"], "M8[D]"), np.array(["a", "bc"]), np.zeros((1,) * 33)], ids=["date", "str", "33d"]
)
def test_what_hdf5_lacks_is_bytes(workflow: Path, array: np.ndarray[Any, Any]) -> None:
    (result,) = write(workflow, item(array))
    with h5py.File(workflow / "checkpoints" / NAME) as file:
        assert file["x"].dtype == np.uint8
        assert file["x"][()].tobytes() == array.tobytes()
    got = serialize.unpack(*checkpoint.read(workflow, NAME, "x", result.checksum))
    assert got.dtype == array.dtype
    assert got.shape == array.shape


def test_plain_h5py_reads_containers(workflow: Path) -> None:
    import pickle

    value = {"a": np.arange(7.0), "b": np.zeros(0), "c": "text"}
    write(workflow, item(value))
    with h5py.File(workflow / "checkpoints" / NAME) as file:
        group = file["x"]
        assert sorted(group) == ["buffer_0", "buffer_1", "header", "pickle"]
        got = pickle.loads(group["pickle"][()].tobytes(), buffers=[group[f"buffer_{n}"][()].data for n in range(2)])
    assert got["c"] == "text"
    assert got["a"].tolist() == value["a"].tolist()
    assert got["b"].size == 0


def test_names_that_clash_or_arent_names(workflow: Path) -> None:
    names = ["a", "a", "a~2", "a/b", "", ".", "ü[0]"]
    written = write(workflow, *(item(n, name) for n, name in enumerate(names)))
    assert len({w.entry for w in written}) == len(names)
    assert written[0].entry == "a"
    assert written[-1].entry == "ü[0]"
    for number, result in enumerate(written):
        assert serialize.unpack(*checkpoint.read(workflow, NAME, result.entry, result.checksum)) == number


def test_many_entries(workflow: Path) -> None:
    written = write(workflow, *(item(n, f"e{n}") for n in range(1000)))
    assert os.listdir(workflow / "checkpoints") == [NAME]
    assert [serialize.unpack(*checkpoint.read(workflow, NAME, w.entry, w.checksum)) for w in written[::97]] == list(
        range(0, 1000, 97)
    )


def test_source_in_a_file(workflow: Path, tmp_path: Path) -> None:
    data = np.arange(5000, dtype=np.uint8)
    (tmp_path / "arena").write_bytes(b"h" * 4096 + data.tobytes())
    fd = os.open(tmp_path / "arena", os.O_RDONLY)
    try:
        source = Item("t", "x", serialize.pack(data).meta, fd=fd, offset=4096)
        (result,) = write(workflow, source)
        source.offset += 1
        with pytest.raises(OSError, match="has 9096 bytes"):
            write(workflow, source, name="other.h5")
    finally:
        os.close(fd)
    assert bytes(checkpoint.read(workflow, NAME, "x", result.checksum)[1]) == data.tobytes()
    assert os.listdir(workflow / "checkpoints") == [NAME]


def test_every_flip_is_detected(workflow: Path) -> None:
    values = {"array": np.arange(5.0), "box": ["text", np.arange(3)]}
    written = {w.entry: w for w in write(workflow, *(item(v, k) for k, v in values.items()))}
    path = workflow / "checkpoints" / NAME
    data = path.read_bytes()
    noticed = 0
    for place in range(0, len(data), 3):
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :])
        for entry, result in written.items():
            try:
                meta, buffer = checkpoint.read(workflow, NAME, entry, result.checksum)
            except CorruptCheckpointError as error:
                assert NAME in str(error)
                assert repr(entry) in str(error)
                noticed += 1
            else:  # a byte that this entry doesn't use
                assert bytes(buffer) == item(values[entry]).data
                assert meta == item(values[entry]).meta
    assert noticed > 200


def test_every_flip_in_the_data_is_detected_without_the_journal(workflow: Path) -> None:
    write(workflow, item(np.full(40, 0x5A, np.uint8)))
    path = workflow / "checkpoints" / NAME
    data = path.read_bytes()
    start = data.index(b"\x5a" * 40)
    for place in range(start, start + 40):
        path.write_bytes(data[:place] + b"\x5b" + data[place + 1 :])
        with pytest.raises(CorruptCheckpointError, match=r"entry 'x'.*checksum"):
            checkpoint.read(workflow, NAME, "x")
        with pytest.raises(CorruptCheckpointError, match=r"entry 'x'.*checksum"):
            checkpoint.read_into(workflow, NAME, "x", memoryview(bytearray(40)))


def test_truncated_missing_or_another_output(workflow: Path) -> None:
    (result,) = write(workflow, item(np.arange(100)))
    path = workflow / "checkpoints" / NAME
    data = path.read_bytes()
    with pytest.raises(CorruptCheckpointError, match="was recorded"):
        checkpoint.read(workflow, NAME, "x", "0" * 32)
    with pytest.raises(CorruptCheckpointError, match="entry 'y'"):
        checkpoint.read(workflow, NAME, "y")
    with pytest.raises(ValueError, match="the target has 3 bytes"):
        checkpoint.read_into(workflow, NAME, "x", memoryview(bytearray(3)))
    for size in range(0, len(data), 50):
        path.write_bytes(data[:size])
        with pytest.raises(CorruptCheckpointError, match=NAME):
            checkpoint.read(workflow, NAME, "x", result.checksum)
    path.write_bytes(b"")
    with pytest.raises(CorruptCheckpointError, match=NAME):
        checkpoint.entries(workflow, NAME)
    path.unlink()
    with pytest.raises(CorruptCheckpointError, match="missing"):
        checkpoint.read(workflow, NAME, "x")


def test_orphans(workflow: Path) -> None:
    directory = workflow / "checkpoints"
    old, new, part = "00000001-0.0-000000000.h5", "00000002-1.0-000000003.h5", ".tmp-00000001-0.0-000000001.h5"
    for name in (old, new, part, "notes.txt"):
        (directory / name).write_bytes(b"")
    assert [p.name for p in checkpoint.orphans(workflow, {old})] == [part, new]
    assert [p.name for p in checkpoint.orphans(workflow, set(), before_epoch=2)] == [part, old]
    with pytest.raises(StorageError, match="checkpoints"):
        checkpoint.orphans(workflow / "absent", set())


@full_disk_only
@pytest.mark.parametrize("count", [1, 3000])
def test_full_disk_leaves_nothing_and_hdf5_well(tmp_path: Path, count: int) -> None:
    code = """
import os, sys
import numpy as np
from pathlib import Path
from exoflow_hpc import serialize
from exoflow_hpc.checkpoint.group import Item, UncleanError, write_group
root = Path(sys.argv[1]); count = int(sys.argv[2])
def items(n, size):
    return [Item("t", f"e{i}", serialize.pack(np.zeros(size)).meta, bytes(8 * size)) for i in range(n)]
for _ in range(3):
    try:
        write_group(root, "a.h5", items(count, 300_000 // count))
    except UncleanError as error:
        print("unclean", error)
    except OSError as error:
        print(error.errno, os.listdir(root))
    free = os.statvfs(root)
    print(free.f_bavail == free.f_blocks)
print(write_group(root, "b.h5", items(2, 1000))[1].nbytes, os.listdir(root))
"""
    done = run_on_small_disk(code, tmp_path, "600k", count)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["28 []", "True"] * 3 + ["8000 ['b.h5']"]
