"""Runs a workflow on local ranks, started one by one, replaced when they die; used where no launcher has started ranks."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from exoflow_hpc import exitcodes
from exoflow_hpc.history import Status
from hoplite_mpi import cleanup
from hoplite_mpi.launch import LocalRanks

__all__ = ["OUTCOME", "default_ranks", "is_other_rank", "run_local", "under_launcher"]

#: file in the rendezvous directory by which the head tells the launcher how the run ended
OUTCOME = "outcome.json"
#: replacements of one rank, and new starts of all ranks after the loss of the head, before the run is given up
MAX_RESPAWNS, MAX_RESTARTS = 3, 3
#: seconds that the other ranks may take to leave once the head has ended; everything is durable, so then they are killed
_LEAVE_TIMEOUT = 10.0
_POLL = 0.02
#: what launchers put into the environment of a rank
_RANK_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")


def under_launcher() -> bool:
    """Return whether this process was started as a rank, by mpiexec, srun or our own launcher."""
    return "HOPLITE_RENDEZVOUS" in os.environ or any(name in os.environ for name in _RANK_VARIABLES)


def is_other_rank() -> bool:
    """Return whether this process was started as a rank that is not the first."""
    return any(os.environ.get(name, "0") != "0" for name in ("HOPLITE_RANK", *_RANK_VARIABLES))


def default_ranks() -> int:
    """Return the number of local ranks where none is said: as many as cores."""
    return len(os.sched_getaffinity(0))


def run_local(workflow_id: str, storage: Path, ranks: int, *, quiet: bool = False) -> dict[str, Any]:
    """Run a workflow that is in the storage to its end and return its summary; blocks.

    A rank that dies is replaced; if the head dies, all start again and go on from what is committed.
    """
    started = lost = 0
    try:
        for attempt in range(MAX_RESTARTS + 1):
            summary, code, count = _run_once(workflow_id, storage, ranks, quiet)
            if summary is not None:
                summary["ranks"]["started"] += started
                summary["ranks"]["lost"] += lost
                return summary
            started, lost = started + count, lost + 1
            if code in exitcodes.ALL:  # it ended by itself, and would do the same again
                break
            if not quiet and attempt < MAX_RESTARTS:
                print(
                    f"[{workflow_id}] the rank that controls the run is gone: all start again from what is committed",
                    file=sys.stderr,
                )
    finally:
        cleanup()  # what ranks that were killed have left in /dev/shm
    return {
        "workflow_id": workflow_id,
        "status": Status.RESUMABLE,
        "output": None,
        "tasks": {"run": 0, "skipped": 0, "rerun": 0, "rolled_back": 0},
        "ranks": {"started": started, "lost": lost, "rejoined": 0},
        "seconds": 0.0,
        "error": "the rank that controls the run died; what it printed says why",
    }


def _run_once(workflow_id: str, storage: Path, ranks: int, quiet: bool) -> tuple[dict[str, Any] | None, int, int]:
    """Start ranks and watch over them.

    Return the head's summary, None if it died without one, its exit code, and how many processes were started.
    """
    argv = ["-m", "exoflow_hpc.rank", workflow_id, "--storage", str(storage)]
    if quiet:
        argv.append("--quiet")
    if sys.stderr.isatty():
        argv.append("--terminal")
    respawned = dict.fromkeys(range(ranks), 0)
    # what ranks and mpiexec print goes to stderr: stdout is the program's own
    with LocalRanks(ranks, argv, stdout=2) as local:
        outcome = local.rendezvous / OUTCOME
        while (codes := local.poll())[0] is None:
            for rank, code in codes.items():
                if code in (None, 0) or rank == 0 or outcome.exists():
                    continue
                if respawned[rank] < MAX_RESPAWNS:
                    respawned[rank] += 1
                    local.respawn(rank)
            time.sleep(_POLL)
        started = ranks + sum(respawned.values())
        if not outcome.exists():
            return None, codes[0], started
        told = json.loads(outcome.read_text())
        _wait_for_members(local, told["members"])
        summary: dict[str, Any] = told["summary"]
        return summary, codes[0], started


def _wait_for_members(local: LocalRanks, members: Iterable[list[int]]) -> None:
    """Wait until those that took part have left; a replacement that had not joined yet would look for the others for long."""
    ranks = [rank for rank, incarnation in members if local.incarnations[rank] == incarnation]
    deadline = time.monotonic() + _LEAVE_TIMEOUT
    while time.monotonic() < deadline and any(local.poll()[rank] is None for rank in ranks):
        time.sleep(_POLL)
