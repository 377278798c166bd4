"""What limits the memory that can be taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from hoplite_mpi.memory import _room

GIB = 1 << 30


def group(directory: Path, **files: object) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name.replace("_", ".", 1)).write_text(f"{content}\n")


def test_every_limit_above_the_process_counts(tmp_path: Path) -> None:
    """As Slurm sets it: the limit is that of the job, above the step's group."""
    group(tmp_path / "job", memory_max=4 * GIB, memory_current=3 * GIB, memory_stat=f"anon 5\ninactive_file {GIB // 2}")
    group(tmp_path / "job" / "step", memory_max="max", memory_current=GIB, memory_stat="inactive_file 0")
    (tmp_path / "own").write_text("0::/job/step\n")
    (limit,) = _room._control_groups(str(tmp_path), str(tmp_path / "own"))
    assert limit[0] == GIB + GIB // 2 - _room._MARGIN // 4
    assert "/job" in limit[1]


def test_first_version_of_control_groups(tmp_path: Path) -> None:
    group(
        tmp_path / "memory" / "job",
        memory_limit_in_bytes=GIB,
        memory_usage_in_bytes=2 * GIB,
        memory_stat="inactive_file 0",
    )
    (tmp_path / "own").write_text("5:devices:/\n4:cpu,memory:/job\n")
    assert [limit[0] for limit in _room._control_groups(str(tmp_path), str(tmp_path / "own"))] == [0]


def test_no_limit_and_hidden_groups(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/not/visible/here\n")
    assert list(_room._control_groups(str(tmp_path), str(tmp_path / "own"))) == []


def test_smallest_limit_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_room, "_control_groups", lambda: iter([(7, "left by the job")]))
    assert _room.room("/dev/shm") == (7, "left by the job")
    monkeypatch.undo()
    free, what = _room.room("/dev/shm")
    assert 0 < free < 1 << 50
    assert what
