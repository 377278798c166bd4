"""Fault modes: what this process's MPI can survive, found out by looking, and the line to type for a better one."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from mpi4py import MPI

from hoplite_mpi.transport import guard, openmpi

__all__ = ["FaultMode", "find_mode"]

_SHARED_MEMORY = re.compile(r"(?<!\^)\b(posix|sysv|cma|knem|xpmem|mm|shm|sm|all)\b")


@dataclass(frozen=True)
class FaultMode:
    """What a run survives.

    ``federated``: the rest go on when a rank or node dies, and new processes can join. ``restart``: the step ends, and is
    started again. ``ulfm``: the rest go on when a rank dies; nobody joins, and the death of a node ends the run.
    """

    name: str
    why: str
    #: how to get a better one; empty if this is the best
    advice: str = ""

    def __str__(self) -> str:
        return f"fault mode {self.name}: {self.why}" + (f"; {self.advice}" if self.advice else "")


def find_mode(one_by_one: bool) -> FaultMode:
    """Return the fault mode of this process; *one_by_one*: its rank was started apart from the others."""
    library = MPI.Get_library_version()
    if library.startswith("Open MPI"):
        return _open_mpi(library, one_by_one)
    if not library.startswith("MPICH"):
        return FaultMode(
            "restart", f"{library.split(',')[0].splitlines()[0]} is not known to survive the death of a rank"
        )
    netmod = os.environ.get("MPIR_CVAR_CH4_NETMOD", "")
    if "ucx" not in library or netmod not in ("", "ucx"):
        return FaultMode("restart", "MPICH without the UCX netmod aborts the others when a rank dies")
    state = guard.load()
    if not state.loaded:
        return FaultMode(
            "restart", f"the guard is not there ({state.why})", "install a C compiler and reinstall exoflow-hpc"
        )
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        return FaultMode("restart", "MPI was initialised without MPI_THREAD_MULTIPLE", "let mpi4py initialise MPI")
    tls = os.environ.get("UCX_TLS", "")
    if not tls or (not tls.startswith("^") and _SHARED_MEMORY.search(tls)):
        return FaultMode(
            "restart",
            f"UCX_TLS={tls or '(unset)'} lets UCX use shared memory, which a kill can leave hanging",
            "import hoplite_mpi before mpi4py.MPI, or export UCX_TLS=tcp,self",
        )
    if not one_by_one and "SLURM_STEP_ID" not in os.environ:
        return FaultMode(
            "restart",
            "mpiexec ends all of its ranks when one dies",
            "start with `python -m exoflow_hpc run --ranks N`, which starts them one by one",
        )
    return FaultMode("federated", "the others go on when a rank dies, and replacements can join")


def _open_mpi(library: str, one_by_one: bool) -> FaultMode:
    if one_by_one:
        return FaultMode(
            "restart",
            "Open MPI's ranks don't survive one another if they were started one by one",
            "start with `mpiexec --with-ft ulfm -n N ...`, or install the extra `mpich`",
        )
    reason = openmpi.why_not(library, os.environ)
    if reason is not None:
        return FaultMode("restart", *reason)
    if MPI.Query_thread() != MPI.THREAD_SERIALIZED:  # see `openmpi.prepare_environment`
        return FaultMode(
            "restart",
            "MPI was not initialised with MPI_THREAD_SERIALIZED, with which alone Open MPI outlives a peer",
            "import hoplite_mpi before mpi4py.MPI, and let mpi4py initialise MPI",
        )
    return FaultMode("ulfm", "the others go on when a rank dies; none can join, and the death of a node ends the run")
