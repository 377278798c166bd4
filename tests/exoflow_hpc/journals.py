"""Journals that the tests write and read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from exoflow_hpc import _frames, journal
from exoflow_hpc.journal import Journal

__all__ = ["make", "numbers", "rec", "strip", "write_epoch"]


def make(path: Path) -> Path:
    (path / "journal").mkdir(parents=True)
    (path / "FENCE").touch()
    return path


def write_epoch(workflow: Path, *numbers: int) -> None:
    """Commit one record after the other in an epoch of their own."""
    opened, _ = Journal.open(workflow)
    with opened:
        for number in numbers:
            opened.append(rec(number)).result(10)


def rec(number: int) -> dict[str, Any]:
    return {"type": "r", "n": number, "data": b"x" * (number % 50)}


def numbers(workflow: Path) -> list[int]:
    return [record["n"] for record in journal.read(workflow).records]


def strip(workflow: Path, epoch: int = 1) -> bytes:
    """Cut the preallocated zeros off a file and return its bytes."""
    path = workflow / "journal" / f"{epoch:08d}"
    found = _frames.scan(epoch, path.read_bytes())
    os.truncate(path, found.accepted)
    return path.read_bytes()
