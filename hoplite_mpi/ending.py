"""How a process ends: with MPI_Finalize where that is safe, without where it could wait for the dead.

mpi4py calls MPI_Finalize whenever the interpreter ends. It is collective over all that are connected, so after a death it may never return.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["any_open", "close_stores", "forget", "prepare", "skip_finalize", "watch"]

log = logging.getLogger("hoplite_mpi")

#: seconds that MPI_Finalize may take
_FINALIZE_TIMEOUT = 5.0

#: stores of this process that have not been closed; one that nobody refers to any more has to leave properly, too
_open: set[Any] = set()
#: asked at the end: whether nothing is left with MPI that could keep it from ending
_clean: list[Callable[[], bool]] = []
#: calls MPI_Finalize when told to; started early, since Python ≥ 3.12 starts no thread at its end
_helper: threading.Thread | None = None
_go = threading.Event()


def prepare() -> None:
    """Take MPI_Finalize over from mpi4py; to be called before mpi4py.MPI is imported, else mpi4py keeps it."""
    # At the end UCX warns of the receives that were cancelled; what matters comes as an MPI error.
    os.environ.setdefault("UCX_LOG_LEVEL", "error")
    import mpi4py

    if "mpi4py.MPI" not in sys.modules and mpi4py.rc.finalize is None:
        mpi4py.rc.finalize = False
        atexit.register(_end)


def watch(store: Any, is_clean: Callable[[], bool]) -> None:
    """Close *store* at the end, unless it has been; *is_clean()* says then whether MPI_Finalize is safe."""
    global _helper
    _open.add(store)
    _clean.append(is_clean)
    if _helper is None:
        _helper = threading.Thread(target=_finalize, name="hoplite-finalize", daemon=True)
        _helper.start()


def any_open() -> bool:
    """Whether a store of this process is open."""
    return bool(_open)


def forget(store: Any) -> None:
    """The store was closed."""
    _open.discard(store)


def skip_finalize() -> None:
    """End without MPI_Finalize: a rank is known to be dead."""
    _clean.append(lambda: False)


def _finalize() -> None:
    from mpi4py import MPI

    # Not MPI.Finalize, which holds the GIL: if it hung nobody could go on without it.
    finalize = ctypes.CDLL(MPI.__file__).MPI_Finalize
    _go.wait()
    finalize()


def close_stores() -> None:
    """Close what has not been closed."""
    for store in list(_open):
        store.close()
        store.runtime.arena.release()  # too late now for what it would register with atexit itself


def _end() -> None:
    close_stores()
    from hoplite_mpi.memory import unlink_own_segments

    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not mpi.Is_initialized() or mpi.Is_finalized():
        return
    # After an error on this rank the others may not come to their end at all.
    if getattr(sys, "last_value", None) is not None or not all(is_clean() for is_clean in _clean):
        unlink_own_segments()  # which MPI_Finalize would have done
        return
    if _helper is None:
        mpi.Finalize()
        return
    # The others may die just now: then this process still ends, with its own exit code.
    _go.set()
    _helper.join(_FINALIZE_TIMEOUT)
    if _helper.is_alive():
        log.warning("MPI_Finalize has not come back after %g s: ending without it", _FINALIZE_TIMEOUT)
