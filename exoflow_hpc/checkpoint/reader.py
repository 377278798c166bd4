"""Read checkpoints back, checked; find files that nobody refers to."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from exoflow_hpc import serialize
from exoflow_hpc.checkpoint import layout
from exoflow_hpc.durable import storage_errors
from exoflow_hpc.errors import CorruptCheckpointError, StorageError
from exoflow_hpc.shards import ShardInfo
from hoplite_mpi.meta import Meta

__all__ = ["entries", "links", "orphans", "read", "read_into", "shard_info"]

_NAME = re.compile(r"(?:\.tmp-)?(\d+)-\d+\.\d+-\d+\.h5")
#: what h5py raises for a damaged file, besides OSError
_DAMAGE = (
    OSError,
    KeyError,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    AssertionError,
    MemoryError,
)


def read(
    workflow_dir: str | os.PathLike[str], file: str, entry: str, expect_checksum: str | None = None
) -> tuple[Meta, memoryview]:
    """Return meta and bytes (read-only) of an entry; blocks on storage.

    CorruptCheckpointError, naming file and entry: it is missing or damaged, or isn't the output with *expect_checksum*
    (from the journal; None: only what the file itself says is checked). StorageError: it can't be read now.
    """
    with _opened(workflow_dir, file, entry) as (files, stored):
        for region in stored.regions:  # before allocating what a damaged number says
            if region.nbytes > os.fstat(files.fd(region.file)).st_size:
                raise ValueError(f"it says that it has {region.nbytes} bytes, more than the file")
        buffer = memoryview(bytearray(stored.meta.nbytes))
        _load(files, stored, buffer, expect_checksum)
        return stored.meta, buffer.toreadonly()


def read_into(
    workflow_dir: str | os.PathLike[str], file: str, entry: str, target: memoryview, expect_checksum: str | None = None
) -> Meta:
    """Fill *target* (writable, exactly the entry's bytes) from an entry and return its meta.

    Errors as `read`, with the target undefined then; ValueError if it has another size.
    """
    with memoryview(target) as view, _opened(workflow_dir, file, entry) as (files, stored):
        if view.nbytes == stored.meta.nbytes:
            _load(files, stored, view.cast("B") if view.nbytes else view, expect_checksum)
            return stored.meta
        size, expected = view.nbytes, stored.meta.nbytes
    raise ValueError(f"the target has {size} bytes, entry {entry!r} of {file} has {expected}")


def entries(workflow_dir: str | os.PathLike[str], file: str) -> list[str]:
    """Return the names of a file's entries. CorruptCheckpointError, StorageError."""
    path = Path(workflow_dir) / "checkpoints" / file
    with _damage(path, None), layout.open_file(str(path)) as opened:
        return sorted(opened)


def shard_info(workflow_dir: str | os.PathLike[str], file: str, entry: str) -> ShardInfo | None:
    """Return what an entry says of itself if it is a `Shard`, else None; reads no more than that. Errors as `read`, unchecked."""
    with _opened(workflow_dir, file, entry) as (files, stored):
        if stored.meta.kind == "ndarray" or len(stored.regions) != 3:
            return None
        head = bytearray(stored.regions[2].start)
        for region in stored.regions[:2]:
            os.preadv(
                files.fd(region.file), [memoryview(head)[region.start : region.start + region.nbytes]], region.position
            )
        return serialize.shard_info(stored.meta, head)


def links(workflow_dir: str | os.PathLike[str], file: str) -> list[str]:
    """Return the names of the files that a file's entries have bytes in, besides itself. CorruptCheckpointError, StorageError."""
    path = Path(workflow_dir) / "checkpoints" / file
    with _damage(path, None), layout.open_file(str(path)) as opened:
        return layout.linked_files(opened)


def orphans(
    workflow_dir: str | os.PathLike[str], referenced: Collection[str], before_epoch: int | None = None
) -> list[Path]:
    """Return the checkpoint files that were never finished or aren't in *referenced* (names from the journal), sorted.

    With *before_epoch*, only those of older epochs: the files of an epoch at work may be about to be named. Others'
    files are left alone. StorageError.
    """
    directory = Path(workflow_dir) / "checkpoints"
    found = []
    with storage_errors("list", directory):
        for name in os.listdir(directory):
            match = _NAME.fullmatch(name)
            if match and name not in referenced and (before_epoch is None or int(match[1]) < before_epoch):
                found.append(directory / name)
    return sorted(found)


@contextlib.contextmanager
def _damage(path: Path, entry: str | None) -> Iterator[None]:
    """Turn what the body raises into CorruptCheckpointError, or StorageError where not the file is at fault."""
    what = f"{path}" if entry is None else f"{path}, entry {entry!r}"
    try:
        yield
    except (CorruptCheckpointError, StorageError):
        raise
    except FileNotFoundError as error:
        raise CorruptCheckpointError(
            f"checkpoint {what} is missing: it is recomputed, or restore it from a backup"
        ) from error
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno in (
            errno.EACCES,
            errno.EPERM,
            errno.ESTALE,
            errno.EMFILE,
            errno.ENFILE,
            errno.ENOMEM,
        ):
            raise StorageError(
                f"can't read checkpoint {what}: {error.strerror or error}", error.errno, str(path)
            ) from error
        raise CorruptCheckpointError(
            f"checkpoint {what} is damaged ({error}): it is recomputed, or restore it from a backup"
        ) from error


class _Files:
    """The files that an entry's bytes are in, open."""

    def __init__(self, directory: Path, name: str, stack: contextlib.ExitStack) -> None:
        self._directory = directory
        self._name = name
        self._stack = stack
        self._open: dict[str, int] = {}

    def fd(self, name: str = "") -> int:
        """Return the descriptor of a file; of the entry's own without a name. OSError."""
        name = name or self._name
        if name not in self._open:
            fd = os.open(self._directory / name, os.O_RDONLY | os.O_CLOEXEC)
            self._stack.callback(os.close, fd)
            self._open[name] = fd
        return self._open[name]


@contextlib.contextmanager
def _opened(workflow_dir: str | os.PathLike[str], name: str, entry: str) -> Iterator[tuple[_Files, layout.Stored]]:
    directory = Path(workflow_dir) / "checkpoints"
    path = directory / name
    with _damage(path, entry), contextlib.ExitStack() as stack:
        files = _Files(directory, name, stack)
        files.fd()  # first, for the plain error of the system if that fails
        with layout.open_file(str(path)) as file:
            stored = layout.find(file, entry)
        yield files, stored


def _load(files: _Files, stored: layout.Stored, target: memoryview, expect_checksum: str | None) -> None:
    end = 0
    for region in stored.regions:
        target[end : region.start] = bytes(region.start - end)
        end = region.start + region.nbytes
        fd = files.fd(region.file)
        done = 0
        while done < region.nbytes:
            count = os.preadv(fd, [target[region.start + done : end]], region.position + done)
            if count == 0:
                raise ValueError(f"{region.file or 'the file'} ends {region.nbytes - done} bytes too early")
            done += count
    found = serialize.checksum(stored.meta, target, stored.checksum)
    if found != stored.checksum or (expect_checksum is not None and found != expect_checksum):
        linked = sorted({region.file for region in stored.regions} - {""})
        where = f", with bytes that it links to in {', '.join(linked)}" if linked else ""
        raise ValueError(f"its checksum is {found}{where}; {expect_checksum or stored.checksum} was recorded")
