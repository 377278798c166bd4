"""Memory of a node: the shared arena, and the kernels of reductions."""

from __future__ import annotations

from ._sweep import sweep, unlink_own_segments
from .arena import Arena, ArenaStatistics, arena_directory
from .host import HostMemory
from .interface import Event, Memory
from .kernels import (
    BAND,
    BOR,
    BXOR,
    MAX,
    MEAN,
    MIN,
    PROD,
    SUM,
    ReduceOp,
    as_op,
    finish,
    op_by_name,
    op_of,
    reduce_bytes,
    reduce_into,
)
from .region import ObjectInfo, Pinned, Region
from .spill import Spill, SpillStatistics, spill_directory, sweep_spilled

__all__ = [
    "BAND",
    "BOR",
    "BXOR",
    "MAX",
    "MEAN",
    "MIN",
    "PROD",
    "SUM",
    "Arena",
    "ArenaStatistics",
    "Event",
    "HostMemory",
    "Memory",
    "ObjectInfo",
    "Pinned",
    "ReduceOp",
    "Region",
    "Spill",
    "SpillStatistics",
    "arena_directory",
    "as_op",
    "finish",
    "op_by_name",
    "op_of",
    "reduce_bytes",
    "reduce_into",
    "spill_directory",
    "sweep",
    "sweep_spilled",
    "unlink_own_segments",
]
