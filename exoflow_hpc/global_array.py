"""Reads a global array: the committed `Shard` outputs of a workflow that bear its name, as one array."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from exoflow_hpc import checkpoint, history, journal, records, serialize
from exoflow_hpc.checkpoint.layout import has_type
from exoflow_hpc.durable import fsync_directory, storage_errors
from exoflow_hpc.errors import CorruptCheckpointError, ExoFlowError
from exoflow_hpc.shards import ShardInfo
from hoplite_mpi.meta import Meta
from hoplite_mpi.testing import fault

__all__ = ["TEMPORARY", "GlobalArray", "find"]

#: begin of the names of files that are being written; `gc` removes what a kill leaves
TEMPORARY = ".tmp-array-"

_LOG = logging.getLogger("exoflow_hpc")


@dataclass(frozen=True, slots=True)
class _Block:
    record: records.TaskCommitted
    info: ShardInfo

    @property
    def end(self) -> tuple[int, ...]:
        return tuple(start + size for start, size in zip(self.info.offset, self.info.block, strict=True))


class GlobalArray:
    """A global array in checkpoints. Index it as an array to read any part, on any number of ranks: ``array[:, 10:20]``."""

    def __init__(self, workflow_dir: Path, name: str, blocks: list[_Block]) -> None:
        self._directory = workflow_dir
        self._blocks = blocks
        self.name = name
        self.shape = blocks[0].info.shape
        self.dtype = blocks[0].info.dtype

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def shards(self) -> dict[str, tuple[slice, ...]]:
        """Which part each task has written."""
        return {
            one.record.task_id: tuple(slice(a, b) for a, b in zip(one.info.offset, one.end, strict=True))
            for one in self._blocks
        }

    def __repr__(self) -> str:
        return f"<GlobalArray {self.name!r} of shape {self.shape}, {self.dtype}, in {len(self._blocks)} blocks>"

    def __getitem__(self, key: Any) -> np.ndarray[Any, Any]:
        """Return a part: integers and slices with positive steps; blocks on storage.

        All blocks that have a share in it are read as a whole and checked. ExoFlowError names what is not committed;
        CorruptCheckpointError; IndexError.
        """
        bounds, pick = _bounds(key, self.shape)
        part = np.empty([stop - start for start, stop in bounds], self.dtype)
        filled = 0
        for block in self._blocks:
            common = [
                (max(start, low), min(stop, high))
                for (start, stop), low, high in zip(bounds, block.info.offset, block.end, strict=True)
            ]
            if any(start >= stop for start, stop in common):
                continue
            here = tuple(slice(a - low, b - low) for (a, b), low in zip(common, block.info.offset, strict=True))
            there = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(common, bounds, strict=True))
            part[there] = history.load_output(self._directory, block.record).array[here]
            filled += int(np.prod([b - a for a, b in common], dtype=np.int64)) if common else 1
        if filled != part.size:
            raise ExoFlowError(
                f"global array {self.name!r}: {part.size - filled} of the {part.size} items asked for are in no committed "
                "block that can be read"
            )
        result: np.ndarray[Any, Any] = part[pick]
        return result

    def to_hdf5(self) -> Path:
        """Write a file in the checkpoints with the array as one virtual dataset of its name, and return the path; blocks.

        It refers to the files of the blocks and copies none of the large ones: it goes where the directory goes, and ends with
        the workflow. ExoFlowError: a part is not committed, or HDF5 has no such type. StorageError.
        """
        held = sum(int(np.prod(one.info.block, dtype=np.int64)) for one in self._blocks)
        if held != int(np.prod(self.shape, dtype=np.int64)):
            raise ExoFlowError(f"global array {self.name!r} is not whole: only {held} of its items are committed")
        if not has_type(self.dtype):
            raise ExoFlowError(f"global array {self.name!r}: HDF5 has no type for {self.dtype}, read it by read_global")
        path = self._directory / "checkpoints" / f"array-{self.name}.h5"
        temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
        try:
            with storage_errors("write", path):
                with h5py.File(temporary, "x", libver=("v110", "v110"), locking=False) as file:
                    self._map(file)
                fd = os.open(temporary, os.O_RDONLY)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
                fault.point("array.before_rename")
                os.rename(temporary, path)
                fsync_directory(path.parent)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        return path

    def _map(self, file: h5py.File) -> None:
        layout = h5py.VirtualLayout(self.shape, self.dtype)
        for number, block in enumerate(self._blocks):
            if 0 in block.info.block:
                continue
            place = block.record.location
            if isinstance(place, records.InCheckpoint):
                where, path = place.file, f"/{place.entry}/buffer_0"
            else:  # its bytes are in the journal
                where, path = ".", f"/blocks/{number}"
                file[path] = history.load_output(self._directory, block.record).array
            source = h5py.VirtualSource(where, path, shape=block.info.block, dtype=self.dtype)
            layout[tuple(slice(a, b) for a, b in zip(block.info.offset, block.end, strict=True))] = source
        file.create_virtual_dataset(self.name, layout)


def find(workflow_dir: Path, name: str) -> GlobalArray:
    """Return the global array of that name. ExoFlowError: there is none, or its blocks don't fit together."""
    blocks = sorted((one for one in _blocks(workflow_dir) if one.info.name == name), key=lambda one: one.info.offset)
    if not blocks:
        raise ExoFlowError(f"{workflow_dir.name!r} has no committed block of a global array {name!r}")
    first = blocks[0]
    for one in blocks:
        if (one.info.shape, one.info.dtype) != (first.info.shape, first.info.dtype):
            raise ExoFlowError(
                f"global array {name!r} has shape {first.info.shape} and dtype {first.info.dtype} in task {first.record.task_id}, "
                f"but {one.info.shape} and {one.info.dtype} in task {one.record.task_id}"
            )
    _refuse_overlaps(name, blocks)
    return GlobalArray(workflow_dir, name, blocks)


def _refuse_overlaps(name: str, blocks: list[_Block]) -> None:
    if not blocks[0].info.shape:
        if len(blocks) > 1:
            raise ExoFlowError(f"global array {name!r} has one item and {len(blocks)} blocks")
        return
    low = np.array([one.info.offset for one in blocks])
    high = np.array([one.end for one in blocks])
    for number in range(len(blocks) - 1):
        common = np.minimum(high[number], high[number + 1 :]) - np.maximum(low[number], low[number + 1 :])
        clash = np.flatnonzero((common > 0).all(axis=1))
        if len(clash):
            tasks = blocks[number].record.task_id, blocks[number + 1 + clash[0]].record.task_id
            raise ExoFlowError(f"global array {name!r}: the blocks of tasks {tasks[0]} and {tasks[1]} overlap")


def _blocks(workflow_dir: Path) -> Iterator[_Block]:
    for record in history.standing_outputs(journal.read(workflow_dir).records).values():
        place = record.location
        if isinstance(place, records.Inline):
            info = serialize.shard_info(Meta.from_wire(record.meta), place.data)
        else:
            try:
                info = checkpoint.shard_info(workflow_dir, place.file, place.entry)
            except CorruptCheckpointError as error:  # nobody knows whether it is a block: if so, it is missing below
                _LOG.warning("%s", error)
                continue
        if info is not None:
            yield _Block(record, info)


def _bounds(key: Any, shape: tuple[int, ...]) -> tuple[list[tuple[int, int]], tuple[Any, ...]]:
    """Return the smallest hyperslab that an index is in, and the index in that."""
    keys = list(key) if isinstance(key, tuple) else [key]
    if Ellipsis in keys:
        place = keys.index(Ellipsis)
        keys[place : place + 1] = [slice(None)] * (len(shape) - len(keys) + 1)
    if len(keys) > len(shape):
        raise IndexError(f"{len(keys)} indices for an array of {len(shape)} dimensions")
    keys += [slice(None)] * (len(shape) - len(keys))
    bounds: list[tuple[int, int]] = []
    pick: list[Any] = []
    for one, size in zip(keys, shape, strict=True):
        if isinstance(one, slice):
            start, stop, step = one.indices(size)
            if step < 1:
                raise IndexError("a step has to be positive")
            bounds.append((start, max(start, stop)))
            pick.append(slice(None, None, step))
            continue
        number = range(size)[one]  # IndexError, TypeError
        bounds.append((number, number + 1))
        pick.append(0)
    return bounds, tuple(pick)
