"""One group commit: many outputs to one durable file, all or nothing. Runs in the writer process."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from exoflow_hpc import serialize
from exoflow_hpc.checkpoint import layout
from exoflow_hpc.checkpoint.known import LINK_MIN, Known, Stamp
from exoflow_hpc.checkpoint.sink import Sink
from exoflow_hpc.checkpoint.wire import Written
from exoflow_hpc.checksums import THREADS, Tree
from exoflow_hpc.durable import fsync_directory
from exoflow_hpc.shards import ShardInfo
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


def write_group(
    directory: Path,
    name: str,
    items: list[Item],
    known: Known | None = None,
    direct_from: int = 0,
    mapped: contextlib.ExitStack | None = None,
) -> list[Written]:
    """Write *items* to the new file *name* in *directory*; durable on return. No file is made if all are in *known* files.

    known: what this process has written, which this call adds to. direct_from: bytes from which arrays go by direct I/O; 0:
    none. mapped: closing it lets go of the sources; None: that is done here, but for 1 GiB it takes another 40 ms.
    OSError: nothing is left behind; UncleanError: nothing either, but see there.
    """
    fault.point("checkpoint.before_write")
    with contextlib.ExitStack() as stack:
        views = [(stack if mapped is None else mapped).enter_context(item.view()) for item in items]
        # the checksums are computed while the disk is at work
        pool = stack.enter_context(_pool())
        group = _Group(directory, name, Known(0) if known is None else known, direct_from)
        jobs = [
            _Job(item, view, serialize.begin_checksum(item.meta, view, pool), serialize.shard_info(item.meta, view))
            for item, view in zip(items, views, strict=True)
        ]
        written = [group.same(job) for job in jobs]
        new = [job for job, result in zip(jobs, written, strict=True) if result is None]
        made = iter(group.write(new) if new else [])
        return [next(made) if result is None else result for result in written]


@contextlib.contextmanager
def _pool() -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(THREADS)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(slots=True)
class _Job:
    item: Item
    view: memoryview
    checksum: Tree | Future[str]
    shard: ShardInfo | None
    #: parts that were written, with their places: they may be linked to from now on
    datasets: list[tuple[int, layout.Link]] = field(default_factory=list)

    def kind(self, part: serialize.Part) -> str:
        """Return what another dataset has to be like to stand for this one: buffers of containers are all alike."""
        if self.shard is not None:
            return f"block {self.shard.dtype!r} {self.shard.block}"
        return "buffer" if part.name else json.dumps(self.item.meta.to_wire())


class _Group:
    """One file being written."""

    def __init__(self, directory: Path, name: str, known: Known, direct_from: int) -> None:
        self._directory = directory
        self._name = name
        self._temporary = directory / temporary_name(name)
        self._epoch = name.partition("-")[0]
        self._known = known
        self._direct_from = direct_from
        #: names of other files that this one links to
        self._linked: set[str] = set()

    def same(self, job: _Job) -> Written | None:
        """Return where an array is already, if it is."""
        parts = serialize.pieces(job.item.meta, job.view)
        link = None if parts[0].name else self._find(job, 0, parts[0])
        if link is None:
            return None
        return Written(link.file, link.path.removeprefix("/"), job.checksum.result(), job.item.meta.nbytes)

    def write(self, jobs: list[_Job]) -> list[Written]:
        """Write the file; durable on return. OSError, see `write_group`."""
        created = False
        try:
            file = layout.create_file(str(self._temporary))
            created = True
            written = self._fill(file, jobs)
            fault.point("checkpoint.after_write")
            fault.point("checkpoint.before_rename")
            os.rename(self._temporary, self._directory / self._name)
            fault.point("checkpoint.after_rename")
            fsync_directory(self._directory)
        except BaseException:
            if created:
                with contextlib.suppress(OSError):
                    os.unlink(self._temporary)
            raise
        self._remember(jobs)
        return written

    def _fill(self, file: layout.h5py.File, jobs: list[_Job]) -> list[Written]:
        with Sink(self._temporary, self._direct_from) as sink:
            try:
                names = [self._place(file, sink, job) for job in jobs]
                written = []
                for job, entry in zip(jobs, names, strict=True):
                    checksum = job.checksum.result()
                    layout.label(file, entry, job.item.task_id, job.item.meta, checksum)
                    written.append(Written(self._name, entry, checksum, job.item.meta.nbytes))
                if self._linked:
                    layout.note_links(file, self._linked)
                file.close()
            except BaseException as error:
                _let_go(sink, file, error)
                raise
            sink.sync()
        return written

    def _place(self, file: layout.h5py.File, sink: Sink, job: _Job) -> str:
        """Write the bytes of an output, or link to those that are the same; return the name of its entry."""
        parts = serialize.pieces(job.item.meta, job.view)
        entry = layout.define(file, job.item.entry, job.item.meta, parts, job.shard)
        for index, part in enumerate(parts):
            link = self._find(job, index, part) if part.name.startswith("buffer") else None
            region = entry.place(part, link)
            if link is not None:
                self._linked.add(link.file)
            if region is not None and region.nbytes:
                sink.write(job.view[region.start : region.start + region.nbytes], region.position)
                job.datasets.append((index, layout.Link(self._name, entry.path(part))))
        return entry.name

    def _find(self, job: _Job, index: int, part: serialize.Part) -> layout.Link | None:
        if not isinstance(job.checksum, Tree) or part.nbytes < LINK_MIN:
            return None
        return self._known.find(self._directory, self._epoch, job.kind(part), part.nbytes, job.checksum, index)

    def _remember(self, jobs: list[_Job]) -> None:
        stamp = Stamp.of(self._directory / self._name)
        for job in jobs:
            if not isinstance(job.checksum, Tree) or stamp is None:
                continue
            parts = serialize.pieces(job.item.meta, job.view)
            for index, link in job.datasets:
                part = parts[index]
                if part.nbytes >= LINK_MIN:
                    self._known.add(
                        self._directory, self._epoch, job.kind(part), part.nbytes, job.checksum, index, link, stamp
                    )


def _let_go(sink: Sink, file: layout.h5py.File, error: BaseException) -> None:
    """Close a file that is not going to be used; UncleanError if HDF5 keeps it open."""
    try:
        sink.truncate()  # frees its space first, as HDF5 writes what it has cached when it closes
        file.close()
    except (OSError, RuntimeError, ValueError):
        raise UncleanError(getattr(error, "errno", None), str(error)) from error
