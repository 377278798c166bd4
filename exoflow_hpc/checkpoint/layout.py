"""How an output lies in an HDF5 file.

An array is the contiguous dataset ``/<entry>``, with its own type and shape wherever HDF5 has that type, else its bytes
as uint8. A container (see `exoflow_hpc.serialize`) is the group ``/<entry>`` with a uint8 dataset for each of its
parts: header, pickle, buffer_0, ... Task, meta and checksum are attributes of the dataset or group.

HDF5 only lays the file out. The data are written to and read from the datasets' places in the file directly: without
h5py's lock, without conversion (padding and NaN payloads stay what they are), and with plain errors when the disk is
full.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np

from exoflow_hpc import serialize
from hoplite_mpi.meta import Meta

__all__ = ["Region", "Stored", "create_file", "define", "find", "label", "linked_files", "open_file"]

#: the version-3 superblock and version-2 object headers carry checksums, so a flipped bit in HDF5's own bytes is an
#: error and not a guess
_VERSIONS = ("v110", "v110")
_TASK, _META, _CHECKSUM, _FORMAT = "exoflow_task", "exoflow_meta", "exoflow_checksum", "exoflow_format"
#: attribute of a file that links to others: their names, as JSON
_LINKS = "exoflow_links"
#: HDF5 allows no more dimensions
_MAX_RANK = 32


@dataclass(frozen=True, slots=True)
class Region:
    """Bytes [start, start + nbytes) of an output are at *position* of the file."""

    position: int
    start: int
    nbytes: int


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
    file = h5py.File(path, "x", libver=_VERSIONS, locking=False)
    file.attrs[_FORMAT] = 1
    return file


def open_file(path: str) -> h5py.File:
    """Open an HDF5 file for reading. OSError, also if it isn't one."""
    return h5py.File(path, "r", libver=_VERSIONS, locking=False)


def define(file: h5py.File, entry: str, meta: Meta, view: memoryview) -> tuple[str, list[Region]]:
    """Reserve room in *file* for an output whose bytes are *view*; return its name and where its bytes are to go."""
    name = base = entry.replace("/", ":").replace("\0", "?").strip(".") or "entry"
    number = 1
    while name in file:
        number += 1
        name = f"{base}~{number}"
    if meta.kind == "ndarray":
        assert meta.dtype is not None
        kind = _hdf5_type(meta.dtype) if len(meta.shape) <= _MAX_RANK else None
        if kind is None:
            return name, [_dataset(file, name, _UINT8, (meta.nbytes,), 0, meta.nbytes)]
        return name, [_dataset(file, name, kind, meta.shape, 0, meta.nbytes)]
    parts = serialize.parts(view)
    if parts is None:  # plain bytes that somebody put
        return name, [_dataset(file, name, _UINT8, (meta.nbytes,), 0, meta.nbytes)]
    group = file.create_group(name)
    return name, [_dataset(group, part.name, _UINT8, (part.nbytes,), part.offset, part.nbytes) for part in parts]


def label(file: h5py.File, entry: str, task_id: str, meta: Meta, checksum: str) -> None:
    """Write the attributes of an entry."""
    attributes = file[entry].attrs
    for name, text in ((_TASK, task_id), (_META, json.dumps(meta.to_wire())), (_CHECKSUM, checksum)):
        data = text.encode() or b" "
        # of fixed length: those of variable length go to HDF5's global heap, which has no checksum
        attributes.create(name, np.bytes_(data), dtype=h5py.string_dtype("utf-8", len(data)))


def find(file: h5py.File, entry: str) -> Stored:
    """Return an entry. Damage raises whatever h5py does for it (KeyError, OSError, RuntimeError, ValueError, ...)."""
    item = file[entry]
    meta = Meta.from_wire(json.loads(_text(item, _META)))
    if isinstance(item, h5py.Dataset):
        regions = [_region(item, 0)]
    else:
        regions, start = [], 0
        for part in _container_parts(item):
            start = -(-start // 64) * 64
            regions.append(_region(part, start))
            start += regions[-1].nbytes
    if (regions[-1].start + regions[-1].nbytes if regions else 0) != meta.nbytes:
        raise ValueError(f"the datasets of entry {entry!r} don't add up to its {meta.nbytes} bytes")
    return Stored(_text(item, _TASK), meta, _text(item, _CHECKSUM), regions)


def linked_files(file: h5py.File) -> list[str]:
    """Return the names of the files that *file* links to."""
    return json.loads(_text(file, _LINKS)) if _LINKS in file.attrs else []


def _container_parts(group: h5py.Group) -> list[h5py.Dataset]:
    return [group["header"], group["pickle"], *(group[f"buffer_{index}"] for index in range(len(group) - 2))]


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


def _hdf5_type(dtype: np.dtype[Any]) -> Any:
    """Return the HDF5 type whose bytes are exactly those of *dtype*, or None."""
    try:
        kind = h5py.h5t.py_create(dtype, logical=True)
        exact = kind.dtype == dtype and kind.get_size() == dtype.itemsize
    except (TypeError, ValueError):
        return None
    return kind if exact else None


def _dataset(where: Any, name: str, kind: Any, shape: tuple[int, ...], start: int, nbytes: int) -> Region:
    space = h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_layout(h5py.h5d.CONTIGUOUS)
    plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    plan.set_obj_track_times(False)
    dataset = h5py.h5d.create(where.id, name.encode(), kind, space, dcpl=plan)
    return Region(dataset.get_offset() or 0, start, nbytes)
