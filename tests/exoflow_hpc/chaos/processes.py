"""Which processes a trial has, and as what: found by what they are called and whose children they are."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.exoflow_hpc.end_to_end.conftest import Cli

__all__ = ["Processes", "send"]


class Processes:
    """The live processes of a trial at a moment."""

    def __init__(self, cli: Cli) -> None:
        #: rank → pid
        self.ranks: dict[int, int] = {}
        #: role → rank → pids
        self._others: dict[str, dict[int, list[int]]] = {"worker": {}, "checkpoint writer": {}, "forkserver": {}}
        commands, parents = {}, {}
        for pid in cli.processes():
            with contextlib.suppress(OSError, IndexError):
                commands[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                parents[pid] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                if commands[pid][1:3] == [b"-m", b"exoflow_hpc.rank"]:
                    rank = re.search(rb"(?:^|\0)HOPLITE_RANK=(\d+)", Path(f"/proc/{pid}/environ").read_bytes())
                    assert rank is not None
                    self.ranks[int(rank[1])] = pid
        of_rank = {pid: rank for rank, pid in self.ranks.items()}
        for pid, command in commands.items():
            parent, text = parents.get(pid, 0), b" ".join(command[1:3])
            grandparent = parents.get(parent, 0)
            if b"_boot.py" in text and parent in of_rank:
                self._add("checkpoint writer", of_rank[parent], pid)
            elif b"worker.forkserver" in text and parent in of_rank:
                self._add("forkserver", of_rank[parent], pid)
            elif b"worker.forkserver" in text and grandparent in of_rank:
                self._add("worker", of_rank[grandparent], pid)

    def _add(self, role: str, rank: int, pid: int) -> None:
        self._others[role].setdefault(rank, []).append(pid)

    def find(self, role: str, rank: int, busy: set[int]) -> int | None:
        """Return the pid of a process in that role, of that rank if it has one; of workers one that is *busy* first."""
        if role in ("rank", "head"):
            return self.ranks.get(rank)
        of_rank = self._others[role]
        mine = sorted(of_rank.get(rank, []))
        everybody = sorted(pid for pids in of_rank.values() for pid in pids)
        for group in ([pid for pid in mine if pid in busy], [pid for pid in everybody if pid in busy], mine, everybody):
            if group:
                return group[-1]
        return None


def send(pid: int, number: signal.Signals) -> bool:
    """Send a signal; return whether the process was there."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
