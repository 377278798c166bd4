"""One group commit: many outputs to one durable file, all or nothing. Runs in the writer process."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from exoflow_hpc import serialize
from exoflow_hpc.checkpoint import layout
from exoflow_hpc.checkpoint.wire import Written
from exoflow_hpc.durable import fsync_directory, write_all
from hoplite_mpi.meta import Meta
from hoplite_mpi.testing import fault

__all__ = ["Item", "UncleanError", "temporary_name", "write_group"]


class UncleanError(OSError):
    """HDF5 couldn't let go of a file, so this process must not go on to use HDF5. The failure itself is the cause."""


@dataclass(slots=True)
class Item:
    """One output of a group. Its bytes are `data`, or [offset, offset + meta.nbytes) of the file `fd`."""

    task_id: str
    entry: str
    meta: Meta
    data: bytes = b""
    fd: int | None = None
    offset: int = 0

    @contextlib.contextmanager
    def view(self) -> Iterator[memoryview]:
        """Give the bytes, without a copy. OSError if the file is shorter."""
        if self.fd is None or not self.meta.nbytes:
            yield memoryview(self.data)
            return
        size = os.fstat(self.fd).st_size
        if size < self.offset + self.meta.nbytes:  # touching a page past the end would be SIGBUS
            raise OSError(f"the source of task {self.task_id} has {size} bytes, not {self.offset} + {self.meta.nbytes}")
        mapped = mmap.mmap(self.fd, self.offset + self.meta.nbytes, access=mmap.ACCESS_READ)
        try:
            with memoryview(mapped) as whole, whole[self.offset :] as part:
                yield part
        finally:
            # the frames of an error under way may hold slices of it: then it is unmapped when they are gone
            with contextlib.suppress(BufferError):
                mapped.close()


def temporary_name(name: str) -> str:
    """Return the name under which *name* is written before it is whole."""
    return f".tmp-{name}"


def write_group(directory: Path, name: str, items: list[Item]) -> list[Written]:
    """Write *items* to the new file *name* in *directory*; durable on return.

    OSError: nothing is left behind; UncleanError: nothing either, but see there.
    """
    temporary = directory / temporary_name(name)
    fault.point("checkpoint.before_write")
    created = False
    try:
        with contextlib.ExitStack() as stack:
            views = [stack.enter_context(item.view()) for item in items]
            file = layout.create_file(str(temporary))
            created = True
            written = _fill(temporary, file, name, items, views)
        fault.point("checkpoint.after_write")
        fault.point("checkpoint.before_rename")
        os.rename(temporary, directory / name)
        fault.point("checkpoint.after_rename")
        fsync_directory(directory)
    except BaseException:
        if created:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise
    return written


def _fill(path: Path, file: layout.h5py.File, name: str, items: list[Item], views: list[memoryview]) -> list[Written]:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        try:
            with ThreadPoolExecutor(1) as pool:  # the checksums are computed while the disk is at work
                checksums = [
                    pool.submit(serialize.checksum, item.meta, view) for item, view in zip(items, views, strict=True)
                ]
                names = []
                for item, view in zip(items, views, strict=True):
                    entry, regions = layout.define(file, item.entry, item.meta, view)
                    for region in regions:
                        if region.nbytes:
                            write_all(fd, view[region.start : region.start + region.nbytes], region.position)
                    names.append(entry)
                written = [
                    Written(name, e, c.result(), i.meta.nbytes) for i, e, c in zip(items, names, checksums, strict=True)
                ]
            for item, result in zip(items, written, strict=True):
                layout.label(file, result.entry, item.task_id, item.meta, result.checksum)
            file.close()
        except BaseException as error:
            _let_go(fd, file, error)
            raise
        os.fsync(fd)
    finally:
        os.close(fd)
    return written


def _let_go(fd: int, file: layout.h5py.File, error: BaseException) -> None:
    """Close a file that is not going to be used; UncleanError if HDF5 keeps it open."""
    try:
        os.ftruncate(fd, 0)  # frees its space first, as HDF5 writes what it has cached when it closes
        file.close()
    except (OSError, RuntimeError, ValueError):
        raise UncleanError(getattr(error, "errno", None), str(error)) from error
