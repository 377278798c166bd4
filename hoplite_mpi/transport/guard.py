"""Keeps this process alive when an MPI peer is gone: loads the guard, sets what UCX has to know before MPI starts.

MPICH's UCX netmod crashes a process that sends to a dead peer; `_ucx_guard.c` says why, and stands in between.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import os
import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = ["GuardState", "load", "prepare_environment"]


@dataclass(frozen=True)
class GuardState:
    """Whether the guard stands in this process, and why not."""

    loaded: bool
    #: why it isn't loaded, and what to do about it; empty if it is
    why: str = ""
    #: the library that was loaded; None if none was
    path: Path | None = None


@functools.cache
def load() -> GuardState:
    """Load the guard into this process, once; to be called before the first MPI send. Never raises.

    Does nothing where there is no UCX, nor under Open MPI. ``HOPLITE_GUARD=0`` in the environment leaves it out.
    """
    if os.environ.get("HOPLITE_GUARD") == "0":
        return GuardState(False, "switched off by HOPLITE_GUARD=0")
    path = _library()
    if path is None:
        why = "not built: there was no C compiler at install time; install gcc, then exoflow-hpc again"
        return GuardState(False, why)
    try:
        # Global: libmpi has to find the guard's names before those of libucp.
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return GuardState(False, f"could not be loaded: {error}")
    return GuardState(True, path=path)


def _library() -> Path | None:
    """Return the built guard of this interpreter, wherever this package's parts were installed."""
    import hoplite_mpi.transport

    for directory in hoplite_mpi.transport.__path__:
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            path = Path(directory, f"_ucx_guard{suffix}")
            if path.exists():
                return path
    return None


def prepare_environment() -> None:
    """Keep UCX off shared memory, which hangs survivors of a kill, unless ``UCX_TLS`` is set. Call it before MPI_Init.

    Everything else (TCP, InfiniBand, ...) stays. Payload on one node goes through the arena, so nothing is lost.
    Where MPI has begun without it, it is left unset: UCX has not seen it, and the fault mode goes by it.
    """
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized():
        return
    os.environ.setdefault("UCX_TLS", _transports())


def _transports(infiniband: str = "/sys/class/infiniband") -> str:
    """Return UCX transports that outlive a peer: without InfiniBand plain TCP, since there is nothing else to gain."""
    return "^sm" if os.path.isdir(infiniband) and os.listdir(infiniband) else "tcp,self"
