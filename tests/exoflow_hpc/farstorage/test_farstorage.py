"""The instrument itself: what a host has seen it goes on seeing, until it forgets; what it asks the server for is true."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.exoflow_hpc.durability import ROOT

from .preload import FarHost

__all__: list[str] = []

_PREAMBLE = """
import json, os, sys, time
from pathlib import Path
far = Path(sys.argv[1])
def listing():
    return [sorted(os.listdir(far)), sorted(entry.name for entry in os.scandir(far) if entry.is_file()), listing_fd()]
def listing_fd():
    fd = os.open(far, os.O_RDONLY)
    try:
        return sorted(os.listdir(fd))
    finally:
        os.close(fd)
def there(name):
    found = {os.path.exists(far / name), os.access(far / name, os.F_OK), opens(name, os.O_RDONLY) != "no"}
    assert len(found) == 1, found
    return found.pop()
def opens(name, flags):
    try:
        os.close(os.open(far / name, flags))
        return "yes"
    except FileNotFoundError:
        return "no"
    except FileExistsError:
        return "exists"
"""


@pytest.fixture
def host(far_library: Path, tmp_path: Path) -> FarHost:
    (tmp_path / "far").mkdir()
    return FarHost(far_library, (tmp_path / "far").resolve(), tmp_path / "cache", stale=1000)


def look(host: FarHost, code: str) -> Any:
    """Return what the expression *code* is in a new process of the host."""
    environment = {**os.environ, **host.environment(), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", f"{_PREAMBLE}\nprint(json.dumps({code}))", str(host.root)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_names_that_were_not_there(host: FarHost) -> None:
    assert look(host, "[there('a'), there('d/b')]") == [False, False]
    (host.root / "a").write_bytes(b"1")
    (host.root / "d").mkdir()
    (host.root / "d" / "b").touch()
    (host.root / "c").touch()
    # in the same process and in others; what nobody looked for is asked for
    assert look(host, "[there('a'), there('d/b'), there('a'), there('c'), there('d')]") == [
        False,
        False,
        False,
        True,
        True,
    ]
    assert look(host, "opens('a', os.O_RDWR | os.O_CREAT | os.O_EXCL)") == "exists"
    assert look(host, "[there('a'), there('d/b')]") == [True, False]
    host.forget()
    assert look(host, "there('d/b')") is True


def test_listings(host: FarHost) -> None:
    (host.root / "a").touch()
    assert look(host, "listing()") == [["a"]] * 3
    (host.root / "b").touch()
    (host.root / "a").unlink()
    assert look(host, "listing()") == [["a"]] * 3
    # what it does itself it knows
    assert look(host, "[(far / 'c').write_bytes(b'1'), os.rename(far / 'c', far / 'e'), listing()[0]][-1]") == [
        "a",
        "e",
    ]
    assert look(host, "[os.unlink(far / 'e'), listing()[0]][-1]") == ["a"]
    assert look(host, "there('b')") is True, "a name that isn't listed can be asked for"
    host.forget()
    assert look(host, "listing()") == [["b"]] * 3


def test_attributes_are_old_and_bytes_are_not(host: FarHost) -> None:
    file = host.root / "a"
    file.write_bytes(b"1")
    size = "os.stat(far / 'a').st_size"
    assert look(host, size) == 1
    file.write_bytes(b"12345")
    assert look(host, f"[{size}, os.lstat(far / 'a').st_size]") == [1, 1]
    assert look(host, f"[(far / 'a').read_text(), {size}]") == ["12345", 5]
    file.unlink()
    assert look(host, f"[{size}, opens('a', os.O_RDONLY)]") == [5, "no"]


def test_it_is_remembered_for_so_long(far_library: Path, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    host = FarHost(far_library, (tmp_path / "far").resolve(), tmp_path / "cache", stale=0.2)
    assert look(host, "[there('a'), listing()[0]]") == [False, []]
    (host.root / "a").touch()
    assert look(host, "[time.sleep(0.2), there('a'), listing()[0]]") == [None, True, ["a"]]


def test_other_directories_are_near(host: FarHost, tmp_path: Path) -> None:
    other = tmp_path / "other"
    code = f"[os.path.exists({str(other)!r}), sorted(os.listdir({str(tmp_path)!r}))]"
    assert look(host, code)[0] is False
    other.touch()
    exists, listed = look(host, code)
    assert exists is True
    assert "other" in listed


def test_answers_are_late(host: FarHost, tmp_path: Path) -> None:
    late = FarHost(host.library, host.root, tmp_path / "late", delay=300)
    began, _, ended = look(late, "[time.monotonic(), os.path.exists(far / 'a'), time.monotonic()]")
    assert ended - began >= 0.3
    assert look(late, "listing()") == [[]] * 3


@pytest.mark.parametrize("hours", [-5, 5])
def test_the_wall_clock_is_wrong(host: FarHost, tmp_path: Path, hours: int) -> None:
    wrong = FarHost(host.library, host.root, tmp_path / "wrong", clock=hours * 3600)
    code = "[__import__('threading').Event().wait(0.01), [time.monotonic(), time.time(), time.time_ns() / 1e9]]"
    waited, (monotonic, *walls) = look(wrong, code)
    assert waited is False
    assert monotonic - time.monotonic() < 60
    for wall in walls:
        assert abs(wall - time.time() - hours * 3600) < 60
