"""Epochs of a workflow: taken by exclusive creation of a journal file, announced in FENCE.

What each step stands on where hosts cache what they saw of the storage (NFS) is that the server decides about an exclusive
creation, and that a file that is there is looked at anew when it is opened (close-to-open). Nothing else is trusted:

- A *listing* may be old. An epoch that it does not show is found in FENCE, or by its exclusive creation, which fails.
- A *name* that was looked for before it was there may seem absent. FENCE is there from the beginning, so it is what says that an
  epoch was taken; the file of the next epoch is only looked for as well.
- *Writers of FENCE* may overlap. Each epoch has a place of its own there, so that none writes a byte that is another's: appending
  would, since a host appends where it believes the end to be.
- A *writer that was stopped* before it wrote its place may do so when it is continued. Places of later epochs stay as they are.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from exoflow_hpc.durable import fsync_directory, write_all
from exoflow_hpc.errors import FencedError, StorageError

__all__ = ["announce", "epoch_name", "known_epochs", "newest_announced", "take_epoch"]

#: bytes of an epoch's place in FENCE, at this times its number (the first one is nobody's): whole sectors and pages, so that neither
#: a disk nor a page cache has to write another's bytes along
_PLACE = 4096


def epoch_name(epoch: int) -> str:
    """Return the file name of an epoch."""
    return f"{epoch:08d}"


def _listed(directory: Path) -> int:
    """Return the newest epoch of which a listing of a journal directory knows, 0 if none. OSError."""
    return max((int(name) for name in os.listdir(directory) if name.isdecimal()), default=0)


def known_epochs(directory: Path, fence: Path) -> int:
    """Return the newest epoch of which a listing of the journal directory knows, or FENCE: it and all before it have files. OSError.

    StorageError if there is no FENCE: a listing alone may be old.
    """
    newest = _listed(directory)
    try:
        return newest_announced(fence, newest)
    except FileNotFoundError:
        raise StorageError(
            f"{fence}, which says what epochs there are, is missing: restore it from a backup",
            errno.ENOENT,
            str(fence),
        ) from None


def take_epoch(directory: Path, fence: Path, after: int | None = None) -> tuple[int, int]:
    """Create the file of the next epoch, durably, and return the epoch and its descriptor. OSError.

    FileNotFoundError if the file of an earlier one can't be seen, before anybody is fenced. With *after*, only the epoch that
    follows it: FencedError if another controller has that one.
    """
    newest = max(known_epochs(directory, fence), after or 0)
    for epoch in range(1, newest + 1):
        os.close(os.open(directory / epoch_name(epoch), os.O_RDONLY | os.O_CLOEXEC))
    while True:
        if after is not None and newest != after:
            raise FencedError(f"{directory}: another controller has taken epoch {newest} meanwhile")
        epoch = newest + 1
        try:
            fd = os.open(directory / epoch_name(epoch), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:  # taken, by one that was faster or that the listing does not show yet
            newest = epoch
            continue
        try:
            fsync_directory(directory)
        except BaseException:
            os.close(fd)
            raise
        return epoch, fd


def announce(fence: Path, epoch: int) -> None:
    """Say in FENCE that *epoch* has been taken; durable on return. OSError."""
    # O_DSYNC: else an NFS client may send the whole page, with what it believes to be in the rest; its pages can be larger than a place
    fd = os.open(fence, os.O_WRONLY | os.O_CREAT | os.O_DSYNC | os.O_CLOEXEC, 0o666)
    try:
        write_all(fd, (b"%d\n" % epoch).ljust(_PLACE, b"\0"), epoch * _PLACE)
        os.fsync(fd)
    finally:
        os.close(fd)


def newest_announced(fence: Path, after: int) -> int:
    """Return the newest epoch that FENCE knows and that is newer than *after*; *after* if there is none. OSError.

    Opens the file, which makes a network file system ask its server, and reads to its end, as the size it says may be old.
    """
    newest, offset = after, (after + 1) * _PLACE
    fd = os.open(fence, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while data := os.pread(fd, 1 << 20, offset):
            if filled := len(data.rstrip(b"\0")):  # whatever is there: only an epoch's controller writes
                newest = (offset + filled - 1) // _PLACE
            offset += len(data)
    finally:
        os.close(fd)
    return newest
