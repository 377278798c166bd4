"""Carries out one trial: starts the ranks, does to them what the plan says, replaces who ends, and looks at what all of them say."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hoplite_mpi.launch import REPLACE_ME, LocalRanks, processes_of_run
from hoplite_mpi.memory import sweep
from hoplite_mpi.testing import POINTS, EmulatedHosts, fault
from tests.chaos.counts import BaseOutcome
from tests.hoplite_mpi.chaos.plan import Fault, Trial
from tests.hoplite_mpi.chaos.verify import Process, Story, verify

__all__ = ["Outcome", "carry_out"]

ROOT = Path(__file__).resolve().parents[3]
_POLL = 0.01
#: seconds for a trial; twice what the slowest takes on a busy machine
_DEADLINE = 60.0
#: seconds after the load has begun, and after the last fault, when nobody waits any more for a point that is not passed
_PATIENCE = 3.0
#: replacements of one rank in a trial
_MAX_INCARNATIONS = 6
#: seconds for what ended to be gone from the process table
_LEFT_PATIENCE = 5.0


@dataclass
class Outcome(BaseOutcome):
    """What became of a trial."""

    #: seconds from each death of a process, and of a host, to the view without it, at each survivor
    process_seconds: list[float] = field(default_factory=list)
    host_seconds: list[float] = field(default_factory=list)
    #: seconds from the last answer for a shard in the smaller part of a cut to the first one in the other; below 0: at the same time
    handover_seconds: list[float] = field(default_factory=list)


class _Runner:
    def __init__(self, trial: Trial, directory: Path, hosts: EmulatedHosts | None) -> None:
        self.trial = trial
        self.directory = directory
        self.hosts = hosts
        self.outcome = Outcome(trial.seed, trial.kind, trial.ranks)
        self.fired_at = directory / "fired"
        self.fired_at.mkdir()
        self.story = Story(directory)
        #: process → when it was killed, or its host cut off
        self.killed: dict[Process, float] = {}
        #: faults at a time that are to come, points that have not been passed
        self.timed = sorted((f for f in trial.faults if f.point is None), key=lambda f: f.after)
        self.awaited = [f for f in trial.faults if f.point is not None]
        #: (when, what) that is still to be done
        self.later: list[tuple[float, Any]] = []
        self.began: float | None = None
        self.last = time.monotonic()
        #: ranks that can't be started, since their host has no cable
        self.dark: set[int] = set()
        rules = {early: ";".join(map(_rule, (f for f in self.awaited if f.early is early))) for early in (False, True)}
        order = {
            "seed": trial.seed,
            "rules": rules[False],
            "early": rules[True],
            "cut": trial.kind == "hosts cut",
            "pressed": trial.pressed,
        }
        (directory / "trial.json").write_text(json.dumps(order))
        env = {
            "HOPLITE_FAULT": "",
            "HOPLITE_FAULT_FIRED": str(self.fired_at),
            "HOPLITE_SPILL_DIRECTORY": str(directory / "spill"),
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            **trial.settings,
        }
        nodes = {rank: {"HOPLITE_NODE": f"node{node}"} for rank, node in enumerate(trial.nodes)}
        self.local = LocalRanks(
            trial.ranks,
            ["-m", "tests.hoplite_mpi.chaos.rank", str(directory)],
            env=env,
            rank_env=None if hosts else nodes,
            output=directory,
            hosts=None if hosts is None else _OnHosts(hosts, trial.nodes),
            cwd=ROOT,
        )

    # -- the run -----------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        start = time.monotonic()
        try:
            self.local.start()
            while not self._over():
                if self.outcome.wrong or time.monotonic() > start + _DEADLINE:
                    self._give_up()
                    break
                self._look()
                time.sleep(_POLL)
        finally:
            self._check_left()
            self.local.terminate()
        self.outcome.seconds = time.monotonic() - start
        self.story.read()
        verify(self.story, self.trial, self.killed, self.outcome)

    def _over(self) -> bool:
        return all(code is not None for code in self.local.poll().values()) and not self.dark and not self._replace()

    def _look(self) -> None:
        self.story.read()
        now = time.monotonic()
        if self.began is None and all((rank, 0) in self.story.loaded for rank in range(self.trial.ranks)):
            self.began = self.last = now
        self._take_fired()
        if self.began is None and self.killed:  # it will not begin as planned: a founder is dead
            self.began = self.last = now
        while self.began is not None and self.timed and now >= self.began + self.timed[0].after:
            self._do(self.timed.pop(0))
        for entry in [entry for entry in self.later if entry[0] <= now]:
            self.later.remove(entry)
            entry[1]()
        self._replace()
        if self.began is not None and not self.timed and not self.later and not self.dark:
            out_of_time = now > self.last + _PATIENCE
            if (not self.awaited or out_of_time) and self.story.settled(self.local.incarnations, self.last):
                (self.directory / "finish").touch()

    def _take_fired(self) -> None:
        for entry in fault.fired(self.fired_at):
            found = next((f for f in self.awaited if _rule(f) == entry.rule), None)
            if found is None:
                continue
            self.awaited.remove(found)
            self.last = time.monotonic()
            if found.how == "stop":
                self._stopped((entry.rank, entry.incarnation), entry.time, found.seconds)
                continue
            self._killed((entry.rank, entry.incarnation), entry.time)
            self.outcome.points[entry.point] = self.outcome.points.get(entry.point, 0) + 1
            role = POINTS[entry.point].role
            self.outcome.roles[role] = self.outcome.roles.get(role, 0) + 1

    def _killed(self, process: Process, when: float) -> None:
        self.killed[process] = when
        self.outcome.kills += 1

    def _stopped(self, process: Process, when: float, seconds: float) -> None:
        self.story.stopped[process] = (when, when + seconds)
        self.later.append((when + seconds, lambda: self._go_on(process)))

    def _do(self, what: Fault) -> None:
        assert what.rank is not None
        rank, now = what.rank, time.monotonic()
        self.last = now
        process = (rank, self.local.incarnations[rank])
        if what.how == "kill":
            if self.local.kill(rank):
                self._killed(process, now)
                role = "membership coordinator" if process == self.story.most_senior() else "any"
                self.outcome.roles[role] = self.outcome.roles.get(role, 0) + 1
        elif what.how == "stop":
            if self.local.kill(rank, signal.SIGSTOP):
                self._stopped(process, now, what.seconds)
        else:
            assert self.hosts is not None
            host = self.trial.nodes[rank]
            mates = [r for r, node in enumerate(self.trial.nodes) if node == host]
            self.dark.update(mates)
            getattr(self.hosts, what.how)(host)
            for mate in mates:
                self._killed((mate, self.local.incarnations[mate]), now)
                self.story.cut.add((mate, self.local.incarnations[mate]))
                self.outcome.roles["host"] = self.outcome.roles.get("host", 0) + 1
            self.later.append((now + what.seconds, lambda: self._plug_in(host, mates)))

    def _go_on(self, process: Process) -> None:
        self.last = time.monotonic()
        if self.local.incarnations[process[0]] == process[1]:
            self.local.kill(process[0], signal.SIGCONT)

    def _plug_in(self, host: int, mates: list[int]) -> None:
        assert self.hosts is not None
        self.hosts.plug_in(host)
        self.dark.difference_update(mates)
        self.last = time.monotonic()

    def _replace(self) -> bool:
        """Start the next incarnation of those who have ended and are to come again; return whether there are any."""
        again = False
        for rank, code in self.local.poll().items():
            if code in (None, 0) or rank in self.dark:
                continue
            process = (rank, self.local.incarnations[rank])
            if process not in self.story.ended:
                self._ended(process, code)
            if self.local.incarnations[rank] < _MAX_INCARNATIONS and not self.outcome.wrong:
                self.local.respawn(rank)
                self.last, again = time.monotonic(), True
        return again

    def _ended(self, process: Process, code: int | None) -> None:
        self.story.read()
        self.story.ended[process] = time.monotonic()
        self._take_fired()
        if process in self.killed and code == -signal.SIGKILL:
            return
        if code == REPLACE_ME:
            text = self.story.evicted.get(process, "a join got stuck")
            self.outcome.left.append("{}.{}: {}".format(*process, text))
        elif code is not None and code < 0 and self.story.may_crash(process, self.killed):
            self.outcome.left.append("{}.{}: signal {} in a connect to somebody who died".format(*process, -code))
        else:
            self.outcome.wrong.append("rank {}.{} ended with exit code {}".format(*process, code))

    def _give_up(self) -> None:
        """Let those who still run say what they are doing."""
        if not self.outcome.wrong:
            self.outcome.wrong.append(f"hang: not over after {_DEADLINE:g} s")
        for rank, code in self.local.poll().items():
            if code is None:
                self.local.kill(rank, signal.SIGCONT)
                self.local.kill(rank, signal.SIGUSR1)
        time.sleep(1.0)

    # -- what is left ------------------------------------------------------------------------------------------------------

    def _check_left(self) -> None:
        run, end = self.local.run, time.monotonic() + _LEFT_PATIENCE
        if any(code is None for code in self.local.poll().values()):
            return
        while processes_of_run(run) and time.monotonic() < end:
            time.sleep(0.05)
        for pid in processes_of_run(run):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            self.outcome.wrong.append(f"process {pid} is left: {command}")
        # what another trial is sweeping just now is not left
        while (left := self._left_in_memory()) and time.monotonic() < end:
            time.sleep(0.05)
        self.outcome.wrong += left

    def _left_in_memory(self) -> list[str]:
        found = []
        for where, names in self._shared_memory():
            left = [n for n in names if self.local.run in n or (where != "here" and n.startswith("mpich_shm_"))]
            if left:
                found.append(f"left in shared memory {where}: {left}")
        return found

    def _shared_memory(self) -> list[tuple[str, list[str]]]:
        """Return what is in /dev/shm of each host once the next start has swept it."""
        if self.hosts is None:
            sweep()
            return [("here", os.listdir("/dev/shm"))]
        found = []
        code = "import os; from hoplite_mpi.memory import sweep; sweep(); print('\\n'.join(os.listdir('/dev/shm')))"
        for host in range(self.hosts.n):
            command = [*self.hosts.command_prefix(host), sys.executable, "-c", code]
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True, cwd=ROOT)
            found.append((f"on host {host}", done.stdout.split()))
        return found


class _OnHosts:
    def __init__(self, hosts: EmulatedHosts, nodes: tuple[int, ...]) -> None:
        self._hosts, self._nodes = hosts, nodes

    def command_prefix(self, rank: int) -> list[str]:
        return self._hosts.command_prefix(self._nodes[rank])


def _rule(what: Fault) -> str:
    who = "" if what.rank is None else f"{what.rank}:"
    return f"{who}{what.point}={what.how}@{what.at}#*"


def carry_out(trial: Trial) -> Outcome:
    """Carry a trial out and return what became of it."""
    directory = Path(tempfile.mkdtemp(prefix="hoplite-chaos-"))
    try:
        with contextlib.ExitStack() as stack:
            hosts = stack.enter_context(EmulatedHosts(max(trial.nodes) + 1)) if trial.on_hosts else None
            runner = _Runner(trial, directory, hosts)
            runner.run()
        outcome = runner.outcome
        if outcome.wrong:
            outcome.output = _tell(trial, directory)
        return outcome
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _tell(trial: Trial, directory: Path) -> str:
    lines = [f"faults: {[asdict(f) for f in trial.faults]}"]
    for path in sorted(directory.glob("rank.*.out")):
        lines += [f"--- {path.name}", path.read_text(errors="replace")[-20000:]]
    for path in sorted(directory.glob("log.*")):
        lines += [f"--- {path.name}", *path.read_text().splitlines()[-12:]]
    return "\n".join(lines)
