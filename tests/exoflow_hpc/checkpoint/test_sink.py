"""Bytes reach their places, with direct I/O and where there is none."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exoflow_hpc import checkpoint, serialize
from exoflow_hpc.checkpoint import sink as module
from exoflow_hpc.checkpoint.group import Item, write_group
from exoflow_hpc.checkpoint.sink import Sink

MIB = 1 << 20
DATA = np.random.default_rng(0).bytes(20 * MIB + 4096)


def memory(offset: int, nbytes: int) -> memoryview:
    """Return memory with data in it that begins *offset* bytes after a page."""
    whole = mmap.mmap(-1, offset + nbytes)
    whole[offset:] = DATA[:nbytes]
    return memoryview(whole)[offset:]


class Writes:
    """What was written how: (by direct I/O, bytes)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: int = 0, short: bool = False) -> None:
        self.seen: list[tuple[bool, int]] = []
        true = os.pwrite

        def pwrite(fd: int, data: Any, position: int) -> int:
            direct = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
            if direct and error:
                raise OSError(error, os.strerror(error))
            if direct and short:
                data = data[: len(data) // 2]
            count = true(fd, data, position)
            self.seen.append((direct, count))
            return count

        monkeypatch.setattr(os, "pwrite", pwrite)

    def total(self, direct: bool) -> int:
        return sum(count for how, count in self.seen if how == direct)


def has_direct_io(directory: Path) -> bool:
    try:
        os.close(os.open(directory / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        return False
    return True


def written(path: Path, view: memoryview, position: int = 4096, direct_from: int = MIB) -> bytes:
    path.touch()
    with Sink(path, direct_from) as sink:
        sink.write(view, position)
        sink.sync()
    return path.read_bytes()[position:]


@pytest.mark.parametrize("nbytes", [MIB - 1, MIB, MIB + 1, 8 * MIB, 20 * MIB + 4095], ids=str)
@pytest.mark.parametrize("offset", [0, 64, 8])
def test_direct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nbytes: int, offset: int) -> None:
    writes = Writes(monkeypatch)
    assert written(tmp_path / "x", memory(offset, nbytes)) == DATA[:nbytes]
    if has_direct_io(tmp_path):
        assert writes.total(True) == (nbytes // 4096 * 4096 if nbytes >= MIB and not offset else 0)
    assert writes.total(True) + writes.total(False) == nbytes


def test_position_that_is_not_aligned_or_no_direct_io_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = Writes(monkeypatch)
    assert written(tmp_path / "x", memory(0, 17 * MIB), position=100) == DATA[: 17 * MIB]
    assert written(tmp_path / "y", memory(0, 17 * MIB), direct_from=0) == DATA[: 17 * MIB]
    assert writes.total(True) == 0


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EOPNOTSUPP])
def test_file_system_that_refuses_the_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    writes = Writes(monkeypatch, error)
    assert written(tmp_path / "x", memory(0, 3 * MIB)) == DATA[: 3 * MIB]
    assert writes.total(False) == 3 * MIB


def test_file_system_that_refuses_to_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true, asked = os.open, []

    def refuse(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            asked.append(path)
            raise OSError(errno.EINVAL, "no direct I/O here")
        return true(path, flags, *rest)

    monkeypatch.setattr(module.os, "open", refuse)
    (tmp_path / "x").touch()
    with Sink(tmp_path / "x", MIB) as sink:
        sink.write(memory(0, 3 * MIB), 0)
        sink.write(memory(0, 2 * MIB), 3 * MIB)
    assert len(asked) == 1, "once for a file"
    assert (tmp_path / "x").read_bytes() == DATA[: 3 * MIB] + DATA[: 2 * MIB]


def test_short_direct_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = Writes(monkeypatch, short=True)
    assert written(tmp_path / "x", memory(0, 18 * MIB)) == DATA[: 18 * MIB]
    assert writes.total(False) > 0


def test_full_disk_is_an_error_and_no_fallback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_direct_io(tmp_path):
        pytest.skip("the file system of the tests has no direct I/O")
    Writes(monkeypatch, errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path / "x", memory(0, 3 * MIB))


@pytest.mark.parametrize("shift", [0, 64, 4096])
def test_checkpoint_by_direct_io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: int) -> None:
    """An array and a container, from a source as the store has it: what is read is what was given."""
    (tmp_path / "checkpoints").mkdir()
    array = np.frombuffer(DATA[: 5 * MIB], np.float32)
    plans = [serialize.pack(array), serialize.pack({"a": array, "b": array[:300_000], "c": "text"})]
    items = []
    for number, plan in enumerate(plans):
        (tmp_path / f"source{number}").write_bytes(bytes(shift) + plan.to_bytes())
        fd = os.open(tmp_path / f"source{number}", os.O_RDONLY)
        items.append(Item("t", f"x{number}", plan.meta, fd=fd, offset=shift))
    writes = Writes(monkeypatch)
    try:
        results = write_group(tmp_path / "checkpoints", "00000001-0.0-000000001.h5", items, direct_from=MIB)
    finally:
        for item in items:
            assert item.fd is not None
            os.close(item.fd)
    if has_direct_io(tmp_path):
        assert (writes.total(True) >= 5 * MIB) == (shift % 4096 == 0)
    for plan, one in zip(plans, results, strict=True):
        assert one.checksum == serialize.checksum(plan.meta, plan.to_bytes())
        assert checkpoint.read(tmp_path, one.file, one.entry, one.checksum)[1] == plan.to_bytes()
