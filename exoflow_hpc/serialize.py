"""Values to one flat run of bytes and back: at most one copy of large arrays on the way in, none on the way out.

An exact ndarray is its C-order bytes. Anything else is a container: pickle protocol 5 and its out-of-band buffers,
each aligned to 64 bytes::

    magic (8) | kind (u32) | buffers (u32) | bytes of the pickle (u64) | bytes of each buffer (u64 each) | pickle |
    buffer 0 | ...

A `Shard` is a container whose payload says in msgpack where its only buffer, the block, belongs.
"""

from __future__ import annotations

import dataclasses
import pickle
import struct
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from typing import Any

import msgpack
import numpy as np

from exoflow_hpc import checksums
from exoflow_hpc.pickling import PROTOCOL, dumps
from exoflow_hpc.shards import Shard, ShardInfo
from hoplite_mpi.meta import Meta

__all__ = ["Part", "Plan", "begin_checksum", "checksum", "pack", "parts", "pieces", "shard_info", "unpack"]

_MAGIC = b"EXOVAL\x00\x01"
_HEAD = struct.Struct("<8sIIQ")
#: payload of a container: a pickle, one bytes object as it is (pickling it would copy it), or what a shard is of
_PICKLE, _BYTES, _SHARD = 0, 1, 2
_ALIGN = 64
#: between the header and the pickle of a value without buffers
_PADDING = bytes(-_HEAD.size % _ALIGN)
#: types that pickle treats by itself, without a look at what cloudpickle would do
_SIMPLE = frozenset({type(None), bool, int, float, str})


def _align(offset: int) -> int:
    return -(-offset // _ALIGN) * _ALIGN


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """A run of bytes of a container: the header, the pickle, or a buffer. What lies between parts is zero."""

    name: str
    offset: int
    nbytes: int


def _layout(lengths: list[int]) -> tuple[list[Part], int]:
    """Return the parts of a container whose pickle and buffers have these lengths, and its size."""
    header = _HEAD.size + 8 * (len(lengths) - 1)
    found = [Part("header", 0, header)]
    end = header
    for index, length in enumerate(lengths):
        offset = _align(end)
        found.append(Part("pickle" if index == 0 else f"buffer_{index - 1}", offset, length))
        end = offset + length
    return found, end


def parts(buffer: Any) -> list[Part] | None:
    """Return the parts of a container, in order; None if these bytes aren't one."""
    view = memoryview(buffer).cast("B") if memoryview(buffer).nbytes else memoryview(b"")
    if len(view) < _HEAD.size:
        return None
    magic, kind, count, pickled = _HEAD.unpack_from(view)
    if magic != _MAGIC or kind not in (_PICKLE, _BYTES, _SHARD) or count > (len(view) - _HEAD.size) // 8:
        return None
    lengths = [pickled, *struct.unpack_from(f"<{count}Q", view, _HEAD.size)]
    found, end = _layout(lengths)
    return found if end == len(view) else None


class Plan:
    """A value ready to be written. It refers to the value's own memory: don't change the value before `write_into`."""

    def __init__(self, meta: Meta, array: np.ndarray[Any, Any] | None, chunks: list[memoryview], kind: int) -> None:
        self.meta = meta
        self._array = array
        self._chunks = chunks
        self._kind = kind

    @property
    def nbytes(self) -> int:
        """Bytes that `write_into` fills."""
        return self.meta.nbytes

    def write_into(self, target: memoryview) -> None:
        """Fill *target*: a writable buffer of exactly `nbytes` bytes, of which nothing is left as it was."""
        target = memoryview(target)
        if target.nbytes != self.nbytes:
            raise ValueError(f"the target has {target.nbytes} bytes, {self.nbytes} are needed")
        if not self.nbytes:
            return
        target = target.cast("B")
        if self._array is not None:
            if self._array.dtype.fields:
                np.frombuffer(target, np.uint8)[:] = 0  # NumPy copies fields, not the padding between them
            np.copyto(np.ndarray(self._array.shape, self._array.dtype, target), self._array)
            return
        layout, _ = _layout([chunk.nbytes for chunk in self._chunks])
        header = _HEAD.pack(_MAGIC, self._kind, len(self._chunks) - 1, self._chunks[0].nbytes)
        header += struct.pack(f"<{len(self._chunks) - 1}Q", *(chunk.nbytes for chunk in self._chunks[1:]))
        end = 0
        for part, chunk in zip(layout, [memoryview(header), *self._chunks], strict=True):
            # recycled memory isn't zero, and equal values have to give equal bytes
            target[end : part.offset] = bytes(part.offset - end)
            # through NumPy, which lets other threads run while it copies much
            if part.nbytes:
                np.frombuffer(target, np.uint8, part.nbytes, part.offset)[:] = np.frombuffer(chunk, np.uint8)
            end = part.offset + part.nbytes

    def to_bytes(self) -> bytes:
        """Return the packed bytes (a copy)."""
        if self._array is None and len(self._chunks) == 1:  # most small values: as `write_into` lays them out
            chunk = self._chunks[0]
            return _HEAD.pack(_MAGIC, self._kind, 0, chunk.nbytes) + _PADDING + chunk.tobytes()
        data = bytearray(self.nbytes)
        self.write_into(memoryview(data))
        return bytes(data)


def pack(value: Any) -> Plan:
    """Return the plan of packing *value*. TypeError names the part of it that can't be pickled."""
    if type(value) is np.ndarray and _plain(value.dtype):
        return Plan(Meta.of_array(value), value, [], _PICKLE)
    buffers: list[pickle.PickleBuffer] = []
    if type(value) is Shard:
        if not _plain(value.array.dtype):
            raise TypeError(f"a shard of dtype {value.array.dtype} can't be stored: use a dtype of NumPy's own")
        block = np.asarray(value.array, order="C")
        info = [value.name, value.offset, value.shape, Meta.of_array(block).to_wire()]
        chunks, kind = [memoryview(msgpack.packb(info)), _raw(block)], _SHARD
    elif type(value) is bytes:
        chunks, kind = [memoryview(value)], _BYTES
    else:
        try:
            data = pickle.dumps(value, PROTOCOL) if type(value) in _SIMPLE else dumps(value, buffers.append)
        except Exception as error:  # a user's __reduce__ can raise anything
            raise TypeError(_explain(value, error)) from error
        chunks, kind = [memoryview(data), *(buffer.raw() for buffer in buffers)], _PICKLE
    nbytes = _ALIGN + chunks[0].nbytes if len(chunks) == 1 else _layout([chunk.nbytes for chunk in chunks])[1]
    return Plan(Meta.of_bytes(nbytes), None, chunks, kind)


def _plain(dtype: np.dtype[Any]) -> bool:
    """Whether a Meta says all about arrays of this type (not about Python objects, metadata or items of no bytes)."""
    if dtype.hasobject or dtype.itemsize == 0 or dtype.metadata:
        return False
    if dtype.isbuiltin == 1:
        return True
    try:
        return bool(Meta.from_wire(msgpack.unpackb(msgpack.packb(Meta("ndarray", 0, dtype).to_wire()))).dtype == dtype)
    except (TypeError, ValueError, KeyError, IndexError, ImportError):
        return False


def unpack(meta: Meta, buffer: Any) -> Any:
    """Return the value in *buffer*, which it refers to and which must not change; arrays are read-only.

    ValueError if the bytes aren't what `pack` wrote; whatever the value's own unpickling raises.
    """
    view = memoryview(buffer).toreadonly()
    if view.nbytes < meta.nbytes:
        raise ValueError(f"the value has {meta.nbytes} bytes, the buffer only {view.nbytes}")
    view = view.cast("B")[: meta.nbytes] if view.nbytes else memoryview(b"")
    if meta.kind == "ndarray":
        array: np.ndarray[Any, Any] = np.ndarray(meta.shape, meta.dtype, view if meta.nbytes else None)
        array.flags.writeable = False
        return array
    found = parts(view)
    if found is None:
        raise ValueError(f"these {meta.nbytes} bytes aren't a packed value")
    chunks = [view[part.offset : part.offset + part.nbytes] for part in found[1:]]
    kind = _HEAD.unpack_from(view)[1]
    if kind == _BYTES:
        return bytes(chunks[0])
    if kind == _SHARD:
        info = _shard_info(chunks[0])
        block: np.ndarray[Any, Any] = np.ndarray(info.block, info.dtype, chunks[1] if len(chunks[1]) else None)
        block.flags.writeable = False
        return Shard(block, info.offset, info.shape, info.name)
    return pickle.loads(chunks[0], buffers=chunks[1:])


def shard_info(meta: Meta, buffer: Any) -> ShardInfo | None:
    """Return what a packed `Shard` says of itself, None if this is something else. Its block need not be in *buffer*."""
    view = memoryview(buffer)
    if meta.kind == "ndarray" or view.nbytes < _HEAD.size:
        return None
    magic, kind, count, size = _HEAD.unpack_from(view)
    if magic != _MAGIC or kind != _SHARD:
        return None
    start = _align(_HEAD.size + 8 * count)
    return _shard_info(view[start : start + size])


def _shard_info(data: memoryview) -> ShardInfo:
    name, offset, shape, wire = msgpack.unpackb(data)
    meta = Meta.from_wire(wire)
    assert meta.dtype is not None
    return ShardInfo(name, tuple(offset), tuple(shape), tuple(meta.shape), meta.dtype)


def _raw(block: np.ndarray[Any, Any]) -> memoryview:
    """Return the bytes of a contiguous array, whatever its dtype: some have no buffer format."""
    return block.reshape(-1).view(np.uint8).data if block.nbytes else memoryview(b"")


def checksum(meta: Meta, buffer: Any, like: str = "") -> str:
    """Return the checksum of *meta* and the bytes of *buffer*, see `exoflow_hpc.checksums`. Lets other threads run meanwhile.

    like: an earlier one, which says by its form how it was made.
    """
    view = memoryview(buffer)
    wire = msgpack.packb(meta.to_wire())
    if view.nbytes <= checksums.LEAF or (like and not like.startswith(checksums.TREE)):
        return checksums.linear(wire, view)
    view = view.cast("B")
    return checksums.tree(wire, view, [(part.offset, part.nbytes) for part in pieces(meta, view)])


def begin_checksum(meta: Meta, view: memoryview, pool: Executor) -> checksums.Tree | Future[str]:
    """Have *pool* compute the checksum; a `Tree`, for each of the `pieces`, if the output is a large one."""
    wire = msgpack.packb(meta.to_wire())
    if view.nbytes <= checksums.LEAF:
        return pool.submit(checksums.linear, wire, view)
    return checksums.Tree(wire, view, [(part.offset, part.nbytes) for part in pieces(meta, view)], pool)


def pieces(meta: Meta, view: memoryview) -> list[Part]:
    """Return the parts of any output: those of a container, else all of it as one without a name."""
    found = None if meta.kind == "ndarray" else parts(view)
    return [Part("", 0, meta.nbytes)] if found is None else found


def _explain(value: Any, error: BaseException) -> str:
    path, part, reason = _blame(value, "value", error, 0)
    return f"can't pickle {path} ({type(part).__module__}.{type(part).__qualname__}): {type(reason).__name__}: {reason}"


def _blame(value: Any, path: str, error: BaseException, depth: int) -> tuple[str, Any, BaseException]:
    """Return path, value and error of the innermost part that can't be pickled by itself."""
    if depth < 20:
        for step, child in _children(value):
            try:
                dumps(child, lambda _: None)
            except Exception as inner:
                return _blame(child, path + step, inner, depth + 1)
    return path, value, error


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, child in value.items():
            yield f"[{key!r}]", child
    elif isinstance(value, (list, tuple)):
        for index, child in enumerate(value):
            yield f"[{index}]", child
    elif isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, type):
        for name, child in vars(value).items():
            yield f".{name}", child
