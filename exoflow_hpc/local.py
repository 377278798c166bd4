"""Runs a workflow on local ranks, started one by one, replaced when they die; used where no launcher has started ranks."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exoflow_hpc.history import Status
from hoplite_mpi.launch import LocalRanks

__all__ = ["Interrupted", "default_ranks", "run_local", "under_launcher"]

log = logging.getLogger("exoflow_hpc.local")

#: replacements of one rank, and new starts of all ranks after the loss of the head, before the run is given up
MAX_RESPAWNS, MAX_RESTARTS = 3, 3
#: seconds that the other ranks may take to leave once the head has ended
_LEAVE_TIMEOUT = 15.0
_POLL = 0.02


class Interrupted(Exception):
    """A signal asked the run to stop; what was committed stays."""


def under_launcher() -> bool:
    """Return whether this process was started as a rank, by mpiexec, srun or our own launcher."""
    names = ("HOPLITE_RENDEZVOUS", "PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")
    return any(name in os.environ for name in names)


def default_ranks() -> int:
    """Return the number of local ranks where none is said: as many as cores."""
    return len(os.sched_getaffinity(0))


def run_local(workflow_id: str, storage: Path, ranks: int, *, quiet: bool = False) -> dict[str, Any]:
    """Run a workflow that is in the storage to its end and return its summary; blocks.

    A rank that dies is replaced; if the head dies, all start again and go on from what is committed. Interrupted: by SIGINT or SIGTERM.
    """
    with _signals():
        for _ in range(MAX_RESTARTS + 1):
            summary, code = _run_once(workflow_id, storage, ranks, quiet)
            if summary is not None:
                return summary
            if code >= 0:  # it was not killed: it would do the same again
                break
            if not quiet:
                print(f"[{workflow_id}] the rank that controls the run is gone: starting again from what is committed", file=sys.stderr)
    return {
        "workflow_id": workflow_id,
        "status": Status.RESUMABLE,
        "output": None,
        "tasks": {"run": 0, "skipped": 0, "rerun": 0, "rolled_back": 0},
        "ranks": {"started": 0, "lost": 0, "rejoined": 0},
        "seconds": 0.0,
        "error": "the rank that controls the run died; what it printed says why",
    }


def _run_once(workflow_id: str, storage: Path, ranks: int, quiet: bool) -> tuple[dict[str, Any] | None, int]:
    """Start ranks and watch over them; return the head's summary, None if it died without one, and its exit code."""
    argv = ["-m", "exoflow_hpc.rank", workflow_id, "--storage", str(storage)]
    if quiet:
        argv.append("--quiet")
    if sys.stderr.isatty():
        argv.append("--terminal")
    respawned = dict.fromkeys(range(ranks), 0)
    with LocalRanks(ranks, argv) as local:
        outcome = local.rendezvous / "outcome.json"
        while (codes := local.poll())[0] is None:
            for rank, code in codes.items():
                if code in (None, 0) or rank == 0 or outcome.exists():
                    continue
                if respawned[rank] < MAX_RESPAWNS:
                    respawned[rank] += 1
                    local.respawn(rank)
            time.sleep(_POLL)
        if not outcome.exists():
            return None, codes[0]
        summary: dict[str, Any] = json.loads(outcome.read_text())
        with contextlib.suppress(TimeoutError):
            local.wait(_LEAVE_TIMEOUT)
        return summary, codes[0]


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into Interrupted, where that can be done (in the main thread)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise Interrupted(signal.Signals(number).name)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
