"""Runs a workflow on local ranks, started one by one, replaced when they die; used where no launcher has started ranks."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from exoflow_hpc import exitcodes, journal
from exoflow_hpc.history import Status, ended, last_run
from exoflow_hpc.storage import Storage
from exoflow_hpc.summary import summarize
from hoplite_mpi import cleanup
from hoplite_mpi.launch import LocalRanks

__all__ = ["OUTCOME", "default_ranks", "is_other_rank", "joined_marker", "run_local", "under_launcher"]

#: file in the rendezvous directory by which the rank that controls the run tells the launcher how it ended
OUTCOME = "outcome.json"
#: replacements of one rank, and new starts after the loss of all ranks, before the run is given up
MAX_RESPAWNS, MAX_RESTARTS = 3, 3
#: seconds that the other ranks may take to leave once the run is over; everything is durable, so then they are killed
_LEAVE_TIMEOUT = 10.0
_POLL = 0.02
#: what launchers put into the environment of a rank
_RANK_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")


def joined_marker(rank: int, incarnation: int) -> str:
    """Return the name of the file in the rendezvous directory by which a rank tells the launcher that it is one of them."""
    return f"joined.{rank}.{incarnation}"


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

    A rank that dies is replaced; if all die, all start again and go on from what is committed.
    """
    started = lost = 0
    place = Storage(storage, create=False)
    directory = place.directory(workflow_id)
    before = last_run(journal.read(directory).records)
    try:
        for attempt in range(MAX_RESTARTS + 1):
            summary, code, count = _run_once(workflow_id, storage, ranks, quiet)
            if summary is None and (end := ended(directory, workflow_id, before)) is not None:  # nobody could say so
                summary = summarize(place, end)
                summary["ranks"].update(started=count, lost=count)
            if summary is not None:
                summary["ranks"]["started"] += started
                summary["ranks"]["lost"] += lost
                return summary
            started, lost = started + count, lost + count
            if code in exitcodes.ALL:  # it ended by itself, and would do the same again
                break
            if not quiet and attempt < MAX_RESTARTS:
                print(
                    f"[{workflow_id}] no rank is left: all start again from what is committed",
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
        "error": "no rank is left; what they printed says why",
    }


def _run_once(workflow_id: str, storage: Path, ranks: int, quiet: bool) -> tuple[dict[str, Any] | None, int, int]:
    """Start ranks and watch over them.

    Return the summary, None if nobody is left to tell one, an exit code, and how many processes were started.
    """
    argv = ["-m", "exoflow_hpc.rank", workflow_id, "--storage", str(storage)]
    if quiet:
        argv.append("--quiet")
    if sys.stderr.isatty():
        argv.append("--terminal")
    respawned = dict.fromkeys(range(ranks), 0)
    began = False
    # what ranks and mpiexec print goes to stderr: stdout is the program's own
    with LocalRanks(ranks, argv, stdout=2) as local:
        outcome = local.rendezvous / OUTCOME
        while True:
            codes = local.poll()
            if outcome.exists():
                break
            members = _members(local, codes)
            began = began or bool(members)
            if not members and (began or codes[0] is not None):
                ended = [code for code in codes.values() if code in exitcodes.ALL and code]
                return None, ended[0] if ended else -1, ranks + sum(respawned.values())
            for rank, code in codes.items():
                # who ended by itself would do the same again
                if code is not None and code not in exitcodes.ALL and respawned[rank] < MAX_RESPAWNS:
                    respawned[rank] += 1
                    local.respawn(rank)
            time.sleep(_POLL)
        told = json.loads(outcome.read_text())
        _wait_for_members(local, told["members"])
        summary: dict[str, Any] = told["summary"]
        return summary, 0, ranks + sum(respawned.values())


def _members(local: LocalRanks, codes: Mapping[int, int | None]) -> list[int]:
    """Return the live ranks that are in the view, so that others can join them."""
    return [
        rank
        for rank, code in codes.items()
        if code is None and (local.rendezvous / joined_marker(rank, local.incarnations[rank])).exists()
    ]


def _wait_for_members(local: LocalRanks, members: Iterable[list[int]]) -> None:
    """Wait until those that took part have left; a replacement that had not joined yet would look for the others for long."""
    ranks = [rank for rank, incarnation in members if local.incarnations[rank] == incarnation]
    deadline = time.monotonic() + _LEAVE_TIMEOUT
    while time.monotonic() < deadline and any(local.poll()[rank] is None for rank in ranks):
        time.sleep(_POLL)
