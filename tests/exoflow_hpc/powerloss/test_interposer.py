"""The instrument itself: what is logged is what happened, and the power goes when it should."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

from .disk import SECTOR, Disk, read_image, write_image
from .preload import Op, Power
from .scripts import run_script

__all__: list[str] = []

#: every call that the log can express
ALL_CALLS = r"""
import os, shutil
import h5py, numpy as np
os.chdir(disk)
os.mkdir("a")
fd = os.open("a/f", os.O_RDWR | os.O_CREAT)
os.write(fd, b"x" * 1000)
os.pwrite(fd, b"y" * 10, 2000)
os.writev(fd, [b"1", b"", b"23"])
os.pwritev(fd, [b"4", b"5"], 3000)
os.ftruncate(fd, 2500)
os.posix_fallocate(fd, 1000, 5000)
os.lseek(fd, 100, os.SEEK_SET)
os.write(fd, b"here")
os.fsync(fd)
os.write(fd, b"and here")
os.fdatasync(fd)
os.close(fd)
with open("a/f", "ab") as file:
    file.write(b"appended")
os.rename("a/f", "a/g")
os.link("a/g", "a/h")
directory = os.open("a", os.O_RDONLY)
os.unlink("g", dir_fd=directory)
os.rename("h", "i", src_dir_fd=directory, dst_dir_fd=directory)
os.fsync(directory)
Path("a/j").write_bytes(b"first")
Path("a/j").write_bytes(b"second")
Path("a/k").write_bytes(b"over it")
os.replace("a/k", "a/j")
os.makedirs("b/c/d")
Path("b/c/e").touch()
shutil.rmtree("b/c")
with h5py.File("a/array.h5", "w", libver=("v110", "v110")) as file:
    file["x"] = np.arange(3000.0)
    file["y"] = np.arange(10)
"""


def test_log_is_what_happened(power: Power) -> None:
    """After each of the calls, HDF5's own among them, the directory is what the log makes of it."""
    run_script(power, ALL_CALLS)
    events = power.events()
    assert {event.op for event in events} == set(Op) - {Op.NOTE, Op.UNKNOWN}
    assert Disk(power.root, events).everything() == read_image(power.root)
    hdf5 = [event for event in events if event.name == "array.h5"]
    assert len(events) - events.index(hdf5[0]) > 5


@pytest.mark.parametrize("call", [1, 9, 30])
def test_power_goes_before_the_call(power: Power, call: int) -> None:
    run_script(power, ALL_CALLS, call=call, expected=-signal.SIGKILL)
    assert power.lost
    assert power.calls == call
    events = power.events()
    assert len(events) >= call - 1  # the parts of one writev are several lines
    assert Disk(power.root, events).everything() == read_image(power.root)
    before = len(events)
    run_script(power, ALL_CALLS, expected=-signal.SIGKILL)  # without power nothing starts
    assert len(power.events()) == before


def test_kill_leaves_the_power_on(power: Power) -> None:
    run_script(power, ALL_CALLS, call=1, mode="kill", expected=-signal.SIGKILL)
    assert not power.lost
    run_script(power, ALL_CALLS)
    assert Disk(power.root, power.events()).everything() == read_image(power.root)


def test_other_processes_stop(power: Power) -> None:
    """A process that has nothing to do with the directory dies by its next write."""
    other = subprocess.Popen(
        [sys.executable, "-c", "import sys\nfor line in sys.stdin:\n  print(line, end='', flush=True)"],
        env={**os.environ, **power.environment()},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with other:
        assert other.stdin is not None and other.stdout is not None
        other.stdin.write("a\n")
        other.stdin.flush()
        assert other.stdout.readline() == "a\n"
        run_script(power, "(disk / 'x').touch()", call=1, expected=-signal.SIGKILL)
        other.stdin.write("b\n")
        other.stdin.flush()
        assert other.stdout.readline() == ""
    assert other.returncode == -signal.SIGKILL


def test_call_that_the_log_cannot_express(power: Power) -> None:
    run_script(power, "(disk / 'x').write_bytes(b'abc'); import os; os.truncate(disk / 'x', 1)")
    with pytest.raises(AssertionError, match=re.escape(f"truncate of {power.root}/x")):
        power.events()


def test_disk_that_was_not_empty(power: Power) -> None:
    run_script(power, ALL_CALLS)
    done = len(power.events())
    disk = Disk.holding(power.root)
    assert disk.nothing() == read_image(power.root)
    change = "import shutil; shutil.rmtree(disk / 'b'); (disk / 'a' / 'i').write_bytes(b'new'); (disk / 'b').touch()"
    before = disk.nothing()
    run_script(power, change)
    for event in power.events()[done:]:
        disk.apply(event)
    assert disk.nothing() == before
    assert disk.everything() == read_image(power.root)


def test_what_is_not_fsynced_is_not_there(power: Power) -> None:
    """A name needs the directory's fsync, bytes need the file's, and neither is the other."""
    run_script(
        power,
        """
import os
def put(name, sync):
    fd = os.open(disk / name, os.O_WRONLY | os.O_CREAT)
    os.write(fd, name.encode())
    if sync:
        os.fsync(fd)
    os.close(fd)
def sync():
    fd = os.open(disk, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
put("both", True)
put("only the name", False)
put("renamed", True)
sync()
put("only bytes", True)
os.rename(disk / "renamed", disk / "renamed again")
""",
    )
    disk = Disk(power.root, power.events())
    assert disk.nothing() == {"both": b"both", "only the name": b"", "renamed": b"renamed"}
    assert set(disk.everything()) == {"both", "only the name", "only bytes", "renamed again"}
    names = {frozenset(disk.mixture(seed)) for seed in range(40)}
    assert len(names) == 4  # both of the two changes of names, each done or not


def test_writes_are_torn_at_sectors(power: Power) -> None:
    run_script(power, "(disk / 'x').write_bytes(b'a' * 2000)")
    disk = Disk(power.root, power.events())
    found = {content for seed in range(2000) if (content := disk.mixture(seed).get("x")) is not None}
    assert {b"", b"a" * 2000, b"a" * 512, bytes(2000), b"a" * 512 + bytes(512) + b"a" * 512} <= found
    for content in found:
        for start in range(0, len(content), SECTOR):
            assert len(set(content[start : start + SECTOR])) == 1


def test_image_is_written_as_it_was(power: Power) -> None:
    image = {"d": None, "d/e": None, "d/f": b"x" + bytes(5000), "d-g": b"", "h": bytes(3)}
    write_image(image, power.root)
    assert read_image(power.root) == image
