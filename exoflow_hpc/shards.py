"""Global arrays: tasks on any ranks each return one block, and the blocks are read as one array (E17)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Shard", "ShardInfo"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """What a stored block says of itself."""

    name: str
    offset: tuple[int, ...]
    #: of the global array
    shape: tuple[int, ...]
    block: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True, eq=False)
class Shard:
    """A block of a global array, to be returned from a task: *array* is what belongs at *offset* of an array of *shape*.

    name: of the global array, unique in the workflow; all its blocks have the same shape and dtype given, and none overlaps
    another. `exoflow_hpc.read_global` reads it back. ValueError, TypeError: the block doesn't fit.
    """

    array: np.ndarray[Any, Any]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    name: str = "array"

    def __post_init__(self) -> None:
        if not isinstance(self.array, np.ndarray) or self.array.dtype.hasobject:
            raise TypeError(f"a shard needs an array of numbers or bytes, not {type(self.array).__name__}")
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ValueError(
                f"{self.name!r} can't be the name of a global array: use letters, digits, '.', '_' and '-'"
            )
        object.__setattr__(self, "offset", tuple(int(each) for each in self.offset))
        object.__setattr__(self, "shape", tuple(int(each) for each in self.shape))
        block = self.array.shape
        fits = len(self.offset) == len(self.shape) == len(block) and all(
            start >= 0 and start + size <= whole
            for start, size, whole in zip(self.offset, block, self.shape, strict=True)
        )
        if not fits:
            raise ValueError(
                f"a block of shape {block} at {self.offset} is not within global array {self.name!r} of shape {self.shape}"
            )

    @property
    def index(self) -> tuple[slice, ...]:
        """Where the block is in the global array."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.array.shape, strict=True))
