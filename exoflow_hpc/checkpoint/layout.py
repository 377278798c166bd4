"""How an output lies in an HDF5 file.

An array is the contiguous dataset ``/<entry>``, with its own type and shape wherever HDF5 has that type, else its bytes
as uint8. A container (see `exoflow_hpc.serialize`) is the group ``/<entry>`` with a uint8 dataset for each of its
parts: header, pickle, buffer_0, ... Task, meta and checksum are attributes of the dataset or group. A buffer that is the
same as one of an earlier file is an external link to that: a tool that can't follow it says so, where a virtual dataset
would read as zeros. The block of a shard is a dataset of its own type and shape, too, so that a virtual dataset can map it.

HDF5 only lays the file out. The data are written to and read from the datasets' places in the file directly: without
h5py's lock, without conversion (padding and NaN payloads stay what they are), and with plain errors when the disk is
full.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np

from exoflow_hpc import serialize
from exoflow_hpc.shards import ShardInfo
from hoplite_mpi.meta import Meta

__all__ = [
    "ALIGNMENT",
    "ALIGN_FROM",
    "Entry",
    "Link",
    "Region",
    "Stored",
    "create_file",
    "define",
    "find",
    "has_type",
    "label",
    "linked_files",
    "note_links",
    "open_file",
]

#: the version-3 superblock and version-2 object headers carry checksums, so a flipped bit in HDF5's own bytes is an
#: error and not a guess
_VERSIONS = ("v110", "v110")
_TASK, _META, _CHECKSUM, _FORMAT = "exoflow_task", "exoflow_meta", "exoflow_checksum", "exoflow_format"
#: attribute of a file that links to others: their names, as JSON
_LINKS = "exoflow_links"
#: HDF5 allows no more dimensions
_MAX_RANK = 32
#: datasets of at least so many bytes begin at a multiple of the other, as direct I/O needs it
ALIGN_FROM, ALIGNMENT = 1 << 20, 4096


@dataclass(frozen=True, slots=True)
class Link:
    """A dataset of another file in the same directory."""

    file: str
    path: str


@dataclass(frozen=True, slots=True)
class Region:
    """Bytes [start, start + nbytes) of an output are at *position* of the file, or of another in the same directory."""

    position: int
    start: int
    nbytes: int
    file: str = ""


@dataclass(frozen=True, slots=True)
class Stored:
    """An entry of a file."""

    task_id: str
    meta: Meta
    checksum: str
    regions: list[Region]


def create_file(path: str) -> h5py.File:
    """Create a new HDF5 file. OSError, FileExistsError."""
    # No locks: the file is written by one process under a temporary name and never changes after that, and many
    # parallel file systems lack them.
    file = h5py.File(
        path,
        "x",
        libver=_VERSIONS,
        locking=False,
        alignment_threshold=ALIGN_FROM,
        alignment_interval=ALIGNMENT,
    )
    file.attrs[_FORMAT] = 1
    return file


def open_file(path: str) -> h5py.File:
    """Open an HDF5 file for reading. OSError, also if it isn't one."""
    return h5py.File(path, "r", libver=_VERSIONS, locking=False)


def define(
    file: h5py.File, entry: str, meta: Meta, parts: Sequence[serialize.Part], shard: ShardInfo | None = None
) -> Entry:
    """Begin an entry of *file* for an output that consists of *parts*."""
    name = base = entry.replace("/", ":").replace("\0", "?").strip(".") or "entry"
    number = 1
    while name in file:
        number += 1
        name = f"{base}~{number}"
    return Entry(file, name, meta, parts, shard)


class Entry:
    """An output that is being laid out; call `place` for each of its parts, in order."""

    def __init__(
        self, file: h5py.File, name: str, meta: Meta, parts: Sequence[serialize.Part], shard: ShardInfo | None
    ) -> None:
        self.name = name
        self._meta = meta
        self._file = file
        #: None: the output is one dataset
        self._group = file.create_group(name) if parts[0].name else None
        self._shard = shard

    def place(self, part: serialize.Part, link: Link | None = None) -> Region | None:
        """Return where the bytes of a part are to go; None with *link*, where they are already."""
        if self._group is None:
            kind, shape = _type_of(self._meta.dtype, self._meta.shape, part.nbytes)
            return _dataset(self._file, self.name, kind, shape, 0, part.nbytes)
        if link is not None:
            self._group[part.name] = h5py.ExternalLink(link.file, link.path)
            return None
        kind, shape = _UINT8, (part.nbytes,)
        if self._shard is not None and part.name == "buffer_0":
            kind, shape = _type_of(self._shard.dtype, self._shard.block, part.nbytes)
        return _dataset(self._group, part.name, kind, shape, part.offset, part.nbytes)

    def path(self, part: serialize.Part) -> str:
        """Return the path of a part's dataset in the file."""
        return f"/{self.name}/{part.name}" if part.name else f"/{self.name}"


def note_links(file: h5py.File, files: Iterable[str]) -> None:
    """Write which other files *file* links to."""
    _attribute(file, _LINKS, json.dumps(sorted(files)))


def label(file: h5py.File, entry: str, task_id: str, meta: Meta, checksum: str) -> None:
    """Write the attributes of an entry."""
    for name, text in ((_TASK, task_id), (_META, json.dumps(meta.to_wire())), (_CHECKSUM, checksum)):
        _attribute(file[entry], name, text)


def _attribute(where: Any, name: str, text: str) -> None:
    data = text.encode() or b" "
    # of fixed length: those of variable length go to HDF5's global heap, which has no checksum
    where.attrs.create(name, np.bytes_(data), dtype=h5py.string_dtype("utf-8", len(data)))


def find(file: h5py.File, entry: str) -> Stored:
    """Return an entry. Damage raises whatever h5py does for it (KeyError, OSError, RuntimeError, ValueError, ...)."""
    item = file[entry]
    meta = Meta.from_wire(json.loads(_text(item, _META)))
    if isinstance(item, h5py.Dataset):
        regions = [_region(item, 0)]
    else:
        regions, start = [], 0
        for name in _part_names(item):
            start = -(-start // 64) * 64
            link = item.get(name, getlink=True)
            regions.append(
                _linked(file, link, start) if isinstance(link, h5py.ExternalLink) else _region(item[name], start)
            )
            start += regions[-1].nbytes
    if (regions[-1].start + regions[-1].nbytes if regions else 0) != meta.nbytes:
        raise ValueError(f"the datasets of entry {entry!r} don't add up to its {meta.nbytes} bytes")
    return Stored(_text(item, _TASK), meta, _text(item, _CHECKSUM), regions)


def linked_files(file: h5py.File) -> list[str]:
    """Return the names of the files that *file* links to."""
    return json.loads(_text(file, _LINKS)) if _LINKS in file.attrs else []


def _part_names(group: h5py.Group) -> list[str]:
    return ["header", "pickle", *(f"buffer_{index}" for index in range(len(group) - 2))]


def _linked(file: h5py.File, link: h5py.ExternalLink, start: int) -> Region:
    if os.path.basename(link.filename) != link.filename:
        raise ValueError(f"a link to {link.filename!r} is none that exoflow_hpc writes")
    try:
        with open_file(os.path.join(os.path.dirname(file.filename), link.filename)) as other:
            found = _region(other[link.path], start)
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{link.path} of {link.filename}, which it links to: {error}") from error
    return dataclasses.replace(found, file=link.filename)


def _text(item: Any, name: str) -> str:
    value = item.attrs[name]
    return value.decode() if isinstance(value, bytes) else str(value)


def _region(dataset: h5py.Dataset, start: int) -> Region:
    nbytes = dataset.id.get_storage_size()
    position = dataset.id.get_offset()
    if nbytes and position is None:
        raise ValueError(f"dataset {dataset.name} is not contiguous, as exoflow_hpc writes it")
    return Region(position or 0, start, nbytes)


_UINT8 = h5py.h5t.py_create(np.dtype(np.uint8))


def has_type(dtype: np.dtype[Any]) -> bool:
    """Whether arrays of that type are datasets of their own type."""
    return _hdf5_type(dtype) is not None


def _hdf5_type(dtype: np.dtype[Any]) -> Any:
    """Return the HDF5 type whose bytes are exactly those of *dtype*, or None."""
    try:
        kind = h5py.h5t.py_create(dtype, logical=True)
        exact = kind.dtype == dtype and kind.get_size() == dtype.itemsize
    except (TypeError, ValueError):
        return None
    return kind if exact else None


def _type_of(dtype: np.dtype[Any] | None, shape: tuple[int, ...], nbytes: int) -> tuple[Any, tuple[int, ...]]:
    """Return type and shape of the dataset of an array; those of its bytes where HDF5 has no such type."""
    exact = None if dtype is None or len(shape) > _MAX_RANK else _hdf5_type(dtype)
    return (_UINT8, (nbytes,)) if exact is None else (exact, shape)


def _dataset(where: Any, name: str, kind: Any, shape: tuple[int, ...], start: int, nbytes: int) -> Region:
    space = h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_layout(h5py.h5d.CONTIGUOUS)
    plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    plan.set_obj_track_times(False)
    dataset = h5py.h5d.create(where.id, name.encode(), kind, space, dcpl=plan)
    return Region(dataset.get_offset() or 0, start, nbytes)
