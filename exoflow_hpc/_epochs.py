"""Epochs of a workflow: taken by exclusive creation of a journal file, announced in FENCE."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from exoflow_hpc.durable import fsync_directory, write_all
from exoflow_hpc.errors import FencedError

__all__ = ["append_fence", "epoch_name", "list_epochs", "read_fence", "take_epoch"]


def list_epochs(directory: Path) -> list[int]:
    """Return the epochs that have a file in a journal directory, sorted. OSError."""
    return sorted(int(name) for name in os.listdir(directory) if name.isdecimal())


def epoch_name(epoch: int) -> str:
    """Return the file name of an epoch."""
    return f"{epoch:08d}"


def take_epoch(directory: Path, after: int | None = None) -> tuple[int, int]:
    """Create the file of the next epoch, durably, and return the epoch and its descriptor. OSError.

    With *after*, only the epoch that follows it: FencedError if another controller has that one.
    """
    while True:
        newest = max(list_epochs(directory), default=0)
        if after is not None and newest != after:
            raise FencedError(f"{directory}: another controller has taken epoch {newest} meanwhile")
        epoch = newest + 1
        try:
            fd = os.open(directory / epoch_name(epoch), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:  # another controller was faster: it has that epoch, we take the next
            continue
        try:
            fsync_directory(directory)
        except BaseException:
            os.close(fd)
            raise
        return epoch, fd


def append_fence(path: Path, epoch: int) -> None:
    """Say in FENCE that *epoch* has been taken; durable on return. OSError."""
    # Appended, not replaced: a slow epoch must not hide a newer one. The newline in front ends what a full disk may
    # have left of another's.
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        write_all(fd, b"\n%d\n" % epoch)
        os.fsync(fd)
    finally:
        os.close(fd)


def read_fence(path: Path) -> int:
    """Return the newest epoch that FENCE knows, 0 if none. OSError."""
    with open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 4096))
        lines = file.read().split(b"\n")
    numbers = [0]
    for line in lines:
        with contextlib.suppress(ValueError):  # half a line, at the cut
            numbers.append(int(line))
    return max(numbers)
