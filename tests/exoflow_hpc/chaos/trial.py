"""Carries out one trial: runs the workflow, does to its processes what the plan says, resumes it, and looks at what stands in the end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exoflow_hpc import ExoFlowError
from hoplite_mpi.launch import _sweep as sweep_directories
from hoplite_mpi.memory import sweep
from hoplite_mpi.testing import fault
from tests.chaos.counts import BaseOutcome
from tests.exoflow_hpc.chaos import flow
from tests.exoflow_hpc.chaos.plan import Fault, Trial
from tests.exoflow_hpc.chaos.points import POINTS
from tests.exoflow_hpc.chaos.processes import Processes, send
from tests.exoflow_hpc.chaos.verify import Evidence, verify
from tests.exoflow_hpc.end_to_end.conftest import Cli, Process, Result

__all__ = ["Outcome", "carry_out"]

_POLL = 0.02
#: seconds until somebody who was to be killed, and is not there, is looked for again
_PATIENCE = 0.2
#: seconds for a command; several times what the slowest takes on a busy machine
_DEADLINE = 90.0
#: commands with faults; after these there is one more without
_WITH_FAULTS = 6
#: commands in all
_MOST_COMMANDS = 10
#: seconds for what ended to be gone from the process table
_LEFT_PATIENCE = 10.0
#: what a command may end with if the workflow is to go on: RESUMABLE, or killed
_TO_GO_ON = (3, -signal.SIGKILL)


@dataclass
class Outcome(BaseOutcome):
    """What became of a trial."""

    tasks: int = 0
    #: tasks that were started, effects that were undone, commits that became void, epochs, commands
    starts: int = 0
    undone: int = 0
    void: int = 0
    epochs: int = 0
    commands: int = 0
    #: processes that were stopped for a while
    stops: int = 0


class _Runner:
    def __init__(self, trial: Trial, directory: Path) -> None:
        self.trial = trial
        self.directory = directory
        self.cli = Cli(directory)
        self.outcome = Outcome(trial.seed, trial.kind, trial.ranks, tasks=len(trial.steps))
        self.fired_at, self.temporary = directory / "fired", directory / "tmp"
        self.fired_at.mkdir()
        self.temporary.mkdir()
        (directory / flow.STEPS).write_text(json.dumps([asdict(step) for step in trial.steps]))
        #: faults at a moment that are to come, points that have not been passed
        self.timed = [f for f in trial.faults if f.point is None]
        self.awaited = [f for f in trial.faults if f.point is not None]
        #: fault → when its task was started
        self.since: dict[Fault, float] = {}
        #: (when, pid) of those that are stopped
        self.stopped: list[tuple[float, int]] = []
        #: ids of the runs of all commands
        self.runs: set[str] = set()
        self.results: list[Result] = []

    # -- the run -----------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        start = time.monotonic()
        try:
            result = self._commands()
            if result is not None:
                self._verify(result)
                self._delete()
        finally:
            self._go_on(time.monotonic() + 3600)
            self.cli.kill_all()
        self._check_left()
        self.outcome.seconds = round(time.monotonic() - start, 2)

    def _commands(self) -> Result | None:
        """Run and resume until the workflow is SUCCESSFUL; return that result, None if something is wrong."""
        for number in range(_MOST_COMMANDS):
            ranks = ["--ranks", str(self.trial.sizes[min(number, len(self.trial.sizes) - 1)]), "--json"]
            # who is killed before the workflow is there has nothing to resume
            if (self.cli.storage / "workflows" / "w").exists():
                process = self._start(number, "resume", "w", *ranks)
            else:
                inputs = ["--input", f"directory={self.directory}"]
                process = self._start(number, "run", flow.__file__, "--id", "w", *inputs, *ranks)
            result = self._watch(process)
            if result is None:
                return None
            self.results.append(result)
            if result.code == 0:
                return result
            if result.code not in _TO_GO_ON:
                self.outcome.wrong.append(f"command {number + 1} ended with exit code {result.code}")
                return None
        self.outcome.wrong.append(f"not SUCCESSFUL after {_MOST_COMMANDS} commands")
        return None

    def _start(self, number: int, *args: str) -> Process:
        self.outcome.commands += 1
        if number >= _WITH_FAULTS:
            self.timed, self.awaited = [], []
        rules = ";".join(f"{f.point}={f.how}@{f.at}#*" for f in self.awaited)
        self.cli.environment |= self.trial.settings | {
            "HOPLITE_FAULT": rules,
            "HOPLITE_FAULT_FIRED": str(self.fired_at),
        }
        self.cli.environment["TMPDIR"] = str(self.temporary)
        self.began = time.monotonic()
        self.process = self.cli.start(*args)
        return self.process

    def _watch(self, process: Process) -> Result | None:
        """Do what the plan says until the command and all that it has started has ended; None if it hangs."""
        end = time.monotonic() + _DEADLINE
        while (code := process.popen.poll()) is None:
            now = time.monotonic()
            if now > end:
                self.outcome.wrong.append(f"hang: command {self.outcome.commands} is not over after {_DEADLINE:g} s")
                self.outcome.wrong += self._alive()
                self.cli.kill_all()
                self.results.append(process.wait(10.0))
                return None
            self._look(now)
            time.sleep(_POLL)
        self._take_fired()
        self._go_on(time.monotonic() + 3600)
        end = time.monotonic() + _LEFT_PATIENCE
        while (left := self.cli.processes()) and time.monotonic() < end:
            time.sleep(0.05)
        if left:
            self.outcome.wrong.append(f"processes are left after command {self.outcome.commands}")
            self.outcome.wrong += self._alive()
        result = process.wait(1.0)
        assert result.code == code
        return result

    def _look(self, now: float) -> None:
        self._take_fired()
        self._go_on(now)
        self.runs.update(name.split("-")[2] for name in os.listdir(self.temporary) if name.startswith("hoplite-run-"))
        if not self.timed:
            return
        starts = self._starts()
        for what in list(self.timed):
            if starts >= what.starts:
                since = self.since.setdefault(what, now if what.starts else self.began)
                if now < since + what.after:
                    continue
                if self._do(what):
                    self.timed.remove(what)
                else:
                    self.since[what] = now + _PATIENCE - what.after

    def _starts(self) -> int:
        log = self.directory / flow.LOG
        return log.read_text().count('"what": "start"') if log.exists() else 0

    def _busy(self) -> set[int]:
        """Return the workers that are in a task."""
        log = self.directory / flow.LOG
        busy: set[int] = set()
        for line in map(json.loads, log.read_text().splitlines() if log.exists() else []):
            if line["what"] == "start":
                busy.add(line["pid"])
            elif line["what"] == "end":
                busy.discard(line["pid"])
        return busy

    def _do(self, what: Fault) -> bool:
        """Return whether there was somebody to do it to."""
        if what.role == "everything":
            self.cli.kill_all()
        elif what.role == "launcher":
            if not send(self.process.popen.pid, signal.SIGKILL):
                return False
        else:
            pid = Processes(self.cli).find(what.role, what.rank, self._busy())
            if pid is None or not send(pid, signal.SIGKILL if what.how == "kill" else signal.SIGSTOP):
                return False
            if what.how == "stop":
                self.outcome.stops += 1
                self.stopped.append((time.monotonic() + what.seconds, pid))
                return True
        self.outcome.kills += 1
        self.outcome.roles[what.role] = self.outcome.roles.get(what.role, 0) + 1
        return True

    def _take_fired(self) -> None:
        for entry in fault.fired(self.fired_at):
            found = next((f for f in self.awaited if f.point == entry.point), None)
            if found is not None:
                self.awaited.remove(found)
                self.outcome.kills += 1
                role = POINTS[entry.point].role
                self.outcome.points[entry.point] = self.outcome.points.get(entry.point, 0) + 1
                self.outcome.roles[role] = self.outcome.roles.get(role, 0) + 1

    def _go_on(self, now: float) -> None:
        for entry in [entry for entry in self.stopped if entry[0] <= now]:
            self.stopped.remove(entry)
            send(entry[1], signal.SIGCONT)

    # -- the end -----------------------------------------------------------------------------------------------------------

    def _verify(self, result: Result) -> None:
        evidence = Evidence.read(self.directory, self.cli.storage / "workflows" / "w", self.trial.steps)
        self.outcome.starts = sum(line["what"] == "start" for line in evidence.lines)
        self.outcome.undone = len(evidence.of("task_rolled_back"))
        self.outcome.void = len(evidence.of("task_voided"))
        self.outcome.epochs = max(epoch for epoch, _ in evidence.journal)
        self.outcome.wrong += verify(evidence, result.json["output"])

    def _delete(self) -> None:
        """Delete the workflow, by as many commands as it takes; then nothing of it may be left."""
        while (self.cli.storage / "workflows" / "w").exists():
            result = self._watch(self._start(0, "delete", "w"))
            if result is None or result.code not in (0, -signal.SIGKILL):
                self.outcome.wrong.append("the workflow can't be deleted")
                return
        storage = self.cli.storage
        for path in (*storage.glob(".tmp-*"), *(storage / "workflows").glob(".new-*")):
            os.utime(path, (1, 1))  # what is fresh may be somebody's who is just at it
        self.cli("list", HOPLITE_FAULT="")  # what a killed command left goes when the storage is next opened
        left = [str(path) for path in storage.rglob("*") if path.name not in ("FORMAT", "workflows")]
        if left:
            self.outcome.wrong.append(f"left in the storage: {left}")

    def _alive(self) -> list[str]:
        found = []
        for pid in self.cli.processes():
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
                found.append(f"process {pid} ({state}): {command[:200]}")
        return found

    def _check_left(self) -> None:
        end = time.monotonic() + _LEFT_PATIENCE
        while (left := self._left()) and time.monotonic() < end:  # what another trial is sweeping just now is not left
            time.sleep(0.1)
        self.outcome.wrong += left

    def _left(self) -> list[str]:
        sweep()
        sweep_directories(self.temporary)  # as the next start of ranks does
        memory = [name for name in os.listdir("/dev/shm") if any(run in name for run in self.runs)]
        files = os.listdir(self.temporary)
        return [f"left in {where}: {names}" for where, names in (("shared memory", memory), ("tmp", files)) if names]


def carry_out(trial: Trial) -> Outcome:
    """Carry a trial out and return what became of it."""
    directory = Path(tempfile.mkdtemp(prefix="hoplite-chaos-"))
    try:
        runner = _Runner(trial, directory)
        runner.run()
        outcome = runner.outcome
        if outcome.wrong:
            outcome.output = _tell(runner)
        return outcome
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _tell(runner: _Runner) -> str:
    lines: list[Any] = [f"faults: {[asdict(f) for f in runner.trial.faults]}"]
    lines += [f"{step}" for step in runner.trial.steps]
    for result in runner.results:
        lines += [f"--- a command: exit code {result.code}", result.text[-6000:]]
    for path in (runner.directory / flow.LOG,):
        lines += [f"--- {path.name}", path.read_text() if path.exists() else ""]
    with contextlib.suppress(OSError, ExoFlowError):
        evidence = Evidence.read(runner.directory, runner.cli.storage / "workflows" / "w", ())
        lines.append("--- journal")
        for epoch, record in evidence.journal:
            shown = {key: value for key, value in record.items() if key not in ("location", "meta", "inputs", "error")}
            lines.append(f"{epoch}: {shown}")
        lines.append(f"--- records: {Counter(record['type'] for _, record in evidence.journal)}")
    return "\n".join(map(str, lines))
