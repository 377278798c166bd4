"""Object store whose broadcast and reduce trees form from whoever is ready, over MPI point-to-point, and repair themselves.

    import hoplite_mpi as hm

    with hm.init() as store:
        oid = store.put(array)
        view = store.get(oid)

Import this before mpi4py.MPI: some settings have to be there before MPI starts.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from typing import TYPE_CHECKING, Any

from hoplite_mpi import ending
from hoplite_mpi._version import __version__
from hoplite_mpi.config import DEFAULT, Config
from hoplite_mpi.errors import (
    ClosedError,
    CorruptObjectError,
    EvictedError,
    GetTimeoutError,
    HopliteError,
    ObjectDeletedError,
    ObjectExistsError,
    ObjectLostError,
    PeerLostError,
    ReduceError,
    StoreFullError,
)
from hoplite_mpi.ids import ObjectID
from hoplite_mpi.memory import (
    BAND,
    BOR,
    BXOR,
    MAX,
    MEAN,
    MIN,
    PROD,
    SUM,
    ReduceOp,
    sweep,
    sweep_spilled,
    unlink_own_segments,
)
from hoplite_mpi.messaging import Mailbox
from hoplite_mpi.transport import guard, openmpi

if TYPE_CHECKING:
    from hoplite_mpi.store import ObjectStore

__all__ = [
    "BAND",
    "BOR",
    "BXOR",
    "DEFAULT",
    "MAX",
    "MEAN",
    "MIN",
    "PROD",
    "SUM",
    "ClosedError",
    "Config",
    "CorruptObjectError",
    "EvictedError",
    "GetTimeoutError",
    "HopliteError",
    "Mailbox",
    "ObjectDeletedError",
    "ObjectExistsError",
    "ObjectID",
    "ObjectLostError",
    "PeerLostError",
    "ReduceError",
    "ReduceOp",
    "StoreFullError",
    "__version__",
    "cleanup",
    "init",
]

guard.prepare_environment()
openmpi.prepare_environment()
ending.prepare()
guard.load()


def init(comm: Any = None, *, memory_limit: int | None = None, config: Config | None = None) -> ObjectStore:
    """Open the store of this rank; collective over *comm* (default: COMM_WORLD, or all ranks that were started one by one).

    memory_limit: bytes of shared memory that this rank may hold. Says on stderr which fault mode it found, and why (rank 0).
    """
    from mpi4py import MPI

    from hoplite_mpi.runtime import Runtime
    from hoplite_mpi.store import ObjectStore
    from hoplite_mpi.transport.bootstrap import find_place
    from hoplite_mpi.transport.modes import find_mode

    if MPI.Query_thread() < MPI.THREAD_MULTIPLE and ending.any_open():
        # opening one is collective, and the other's engine would call MPI at the same time
        raise HopliteError(
            "a process has one store at a time where MPI is not MPI_THREAD_MULTIPLE: close the other first"
        )
    if MPI.COMM_WORLD.Get_size() == 1:
        unlink_own_segments()
    settings = Config.from_environment(config)
    if memory_limit is not None:
        settings = dataclasses.replace(settings, memory_limit=memory_limit)
    place = find_place(comm)
    mode = find_mode(one_by_one=place.comm is None)
    if place.rank == 0 and place.incarnation == 0:
        print(f"hoplite_mpi: {mode}", file=sys.stderr, flush=True)
    cleanup(settings)
    runtime = Runtime(place, settings)
    store = ObjectStore(runtime, mode)
    runtime.start()
    ending.watch(store, lambda: runtime.ended_cleanly)
    return store


def cleanup(config: Config | None = None) -> list[str]:
    """Remove what dead runs of this user left in this node's shared memory, and where they spilled to; return the names.

    Live runs are safe. config: says where runs spill to (default: the environment's).
    """
    removed = sweep() + sweep_spilled((config or Config.from_environment()).spill_directory)
    if removed:
        logging.getLogger("hoplite_mpi").info("removed what dead runs left: %s", ", ".join(removed))
    return removed
