"""What the tasks of a trial said, what its journal says and what stands outside, and whether all of it fits together."""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from exoflow_hpc import history
from exoflow_hpc._frames import scan
from exoflow_hpc.spec import WorkflowSpec
from exoflow_hpc.storage import Storage
from tests.exoflow_hpc.chaos.flow import LOG, OUTSIDE, digest
from tests.exoflow_hpc.chaos.plan import Step

__all__ = ["Evidence", "verify"]

#: combinations of drawn values that are tried to find out which of them a sum is of
_MOST_SUMS = 100_000


@dataclass
class Evidence:
    """All that a trial has left."""

    steps: Sequence[Step]
    #: lines of the log, in the order in which they were written
    lines: list[dict[str, Any]]
    #: (epoch, record), in order
    journal: list[tuple[int, dict[str, Any]]]
    #: key → (inputs, value) of what stands outside
    effects: dict[str, tuple[list[int], int]] = field(default_factory=dict)
    conflicts: list[tuple[str, str]] = field(default_factory=list)
    #: task → its output, of those that are committed
    outputs: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path, workflow_dir: Path, steps: Sequence[Step]) -> Evidence:
        """Read all there is, of a trial that has ended."""
        log = directory / LOG
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        journal = []
        for path in sorted((workflow_dir / "journal").iterdir()):
            if path.name.isdigit():
                found = scan(int(path.name), path.read_bytes()).records
                journal += [(int(path.name), record) for record in found if record["type"] != "seal"]
        effects, conflicts = {}, []
        if (directory / OUTSIDE).exists():
            db = sqlite3.connect(directory / OUTSIDE)
            for key, given, value in db.execute("select key, given, value from effects"):
                effects[key] = json.loads(given), value
            conflicts = db.execute("select key, text from conflicts").fetchall()
            db.close()
        return cls(steps, lines, journal, effects, conflicts, _outputs(workflow_dir, journal))

    def of(self, *types: str) -> list[tuple[int, dict[str, Any]]]:
        """Return (epoch, record) of all records of these types."""
        return [(epoch, record) for epoch, record in self.journal if record["type"] in types]


def _outputs(workflow_dir: Path, journal: list[tuple[int, dict[str, Any]]]) -> dict[str, np.ndarray]:
    spec = WorkflowSpec.from_bytes(Storage(workflow_dir.parent.parent, create=False).spec(workflow_dir.name))
    facts = history.facts_of(spec, (record for _, record in journal))
    return {
        spec.tasks[index].name: np.asarray(history.load_output(workflow_dir, record))
        for index, record in facts.committed.items()
    }


def verify(evidence: Evidence, output: Any) -> list[str]:
    """Return what is wrong; *output*: what the command said that the workflow's is."""
    wrong = [f"outside: {key} {text}" for key, text in evidence.conflicts]
    wrong += [f"task {line['task']}: {line['text']}" for line in evidence.lines if line["what"] == "wrong"]
    wrong += _epochs_pass(evidence)
    wrong += [f"{record['message']}" for _, record in evidence.of("task_deviated")]
    wrong += _one_effect_each(evidence)
    wrong += _no_second_run(evidence)
    wrong += _voids_have_a_reason(evidence)
    wrong += _undone_in_time(evidence)
    values = _Values(evidence)
    values.collect()
    return wrong + values.wrong + _as_without_failures(evidence, values, output)


def _epochs_pass(evidence: Evidence) -> list[str]:
    """Nobody does anything for an older epoch once a newer one has begun to run tasks (R10)."""
    newest, wrong = 0, []
    for line in evidence.lines:
        if line["epoch"] < newest:
            wrong.append(f"{line} after epoch {newest} had begun")
        newest = max(newest, line["epoch"])
    return wrong


def _one_effect_each(evidence: Evidence) -> list[str]:
    """There is one effect of each external task, that of its last life."""
    lives = {step.name: 0 for step in evidence.steps if step.effect}
    for _, record in evidence.of("task_rolled_back"):
        lives[record["task_id"]] = record["incarnation"]
    expected = {f"w/{name}/{life}" for name, life in lives.items()}
    found = set(evidence.effects)
    return [f"no effect {key}" for key in sorted(expected - found)] + [
        f"a superfluous effect {key}" for key in sorted(found - expected)
    ]


def _no_second_run(evidence: Evidence) -> list[str]:
    """What was committed, and not void since, is neither started nor committed anew (R6)."""
    wrong = []
    #: task → (epoch, attempt) of its commit, of those that stand
    standing: dict[str, tuple[int, int]] = {}
    #: task → [(epoch and attempt of a commit, epoch of the void, or None)]
    lives: dict[str, list[tuple[tuple[int, int], int | None]]] = {}
    for epoch, record in evidence.of("task_committed", "task_voided"):
        task = record["task_id"]
        if record["type"] == "task_voided":
            if task in standing:
                lives.setdefault(task, []).append((standing.pop(task), epoch))
        elif task not in standing:
            standing[task] = (epoch, record["attempt"])
        elif standing[task] != (epoch, record["attempt"]) and standing[task][0] < epoch:
            wrong.append(
                f"task {task}: committed as (epoch, attempt) {standing[task]}, and again as {epoch, record['attempt']}"
            )
    for task, when in standing.items():
        lives.setdefault(task, []).append((when, None))
    for line in evidence.lines:
        if line["what"] != "start":
            continue
        now = (line["epoch"], line["attempt"])
        for commit, voided in lives.get(line["task"], []):
            if commit < now and (voided is None or voided > now[0]):
                wrong.append(f"task {line['task']} is started as (epoch, attempt) {now} after its commit as {commit}")
    return wrong


def _voids_have_a_reason(evidence: Evidence) -> list[str]:
    """What is void was computed from a task that varies and is not committed (R5)."""
    steps = {step.name: step for step in evidence.steps}
    above = _above(evidence.steps)
    standing: set[str] = set()
    wrong = []
    for epoch, record in evidence.of("task_committed", "task_voided"):
        task = record["task_id"]
        if record["type"] == "task_committed":
            standing.add(task)
            continue
        standing.discard(task)
        if not record["lost"]:
            wrong.append(f"task {task} is void in epoch {epoch}, and no value is lost: {record['message']}")
        if not any(not steps[name].deterministic and name not in standing for name in above[task]):
            wrong.append(f"task {task} is void in epoch {epoch}, and all that varies above it is committed")
    return wrong


def _undone_in_time(evidence: Evidence) -> list[str]:
    """An effect is undone before what it was computed from varies anew, and after the effects that were computed from its own (R5)."""
    steps = {step.name: step for step in evidence.steps}
    above = _above(evidence.steps)
    #: key → (task, place of the first act) of effects that stand at a place of the log
    standing: dict[str, tuple[str, int]] = {}
    #: effects undone since the last start of a task: task → place of its act
    undone: dict[str, int] = {}
    wrong = []
    for place, line in enumerate(evidence.lines):
        task = line["task"]
        if line["what"] == "act":
            standing.setdefault(line["key"], (task, place))
        elif line["what"] == "start":
            undone.clear()
            if not steps[task].deterministic:
                wrong += [
                    f"task {task} runs again (epoch {line['epoch']}, attempt {line['attempt']}) while effect {key} stands"
                    for key, (other, _) in standing.items()
                    if task in above[other]
                ]
        elif line["what"] == "undo" and line["key"] in standing:
            _, acted = standing.pop(line["key"])
            early = [other for other, when in undone.items() if other in above[task] and when < acted]
            wrong += [f"the effect of task {other} is undone before effect {line['key']}" for other in early]
            undone[task] = acted
    return wrong


def _above(steps: Sequence[Step]) -> dict[str, set[str]]:
    """Return task → all that its output is computed from."""
    above: dict[str, set[str]] = {}
    for step in steps:
        above[step.name] = set(step.data).union(*(above[name] for name in step.data))
    return above


class _Values:
    """The value of each task that whatever stands was made from: there may be only one of each."""

    def __init__(self, evidence: Evidence) -> None:
        self._evidence = evidence
        self._steps = {step.name: step for step in evidence.steps}
        #: task → its value, and who says so
        self.known: dict[str, tuple[int, str]] = {}
        #: task → {value: (number drawn, inputs)} of all that it ever gave
        self.traced: dict[str, dict[int, tuple[int, list[int]]]] = {}
        self.wrong: list[str] = []
        for line in evidence.lines:
            if line["what"] == "value":
                self.traced.setdefault(line["task"], {})[line["value"]] = line["nonce"], line["given"]

    def collect(self) -> None:
        """Begin with what is committed and what stands outside, and go back from there to all that it was made from."""
        for name, array in self._evidence.outputs.items():
            if array.size != max(1, self._steps[name].size) or array.min() != array.max():
                self.wrong.append(f"task {name}: its committed output is not what it returned: {array}")
            self._see(name, int(array.flat[0]), "the journal")
        for key, (given, value) in self._evidence.effects.items():
            name = key.split("/")[1]
            for source, one in zip(self._steps[name].data, given, strict=True):
                self._see(source, one, f"effect {key}")
            if self._steps[name].effect == "rollback":
                self._see(name, value, f"effect {key}")
        for step in reversed(self._evidence.steps):
            if step.name not in self.known:
                self.wrong.append(f"task {step.name}: nothing that stands has seen a value of it")
                continue
            took = self._inputs(step, self.known[step.name][0])
            if took is None:
                self.wrong.append(f"task {step.name}: no run of it has given {self.known[step.name]}")
                continue
            for source, one in zip(step.data, took, strict=True):
                self._see(source, one, f"task {step.name}")

    def _see(self, name: str, value: int, who: str) -> None:
        before = self.known.setdefault(name, (value, who))
        if before[0] != value:
            self.wrong.append(f"two values of task {name}: {who} has {value}, {before[1]} has {before[0]}")

    def _inputs(self, step: Step, value: int) -> Sequence[int] | None:
        if step.kind == "task":
            found = self.traced.get(step.name, {}).get(value)
            return None if found is None else found[1]
        candidates = [list(self.traced.get(name, {})) for name in step.data]
        sums = itertools.islice(itertools.product(*candidates), _MOST_SUMS)
        return next((given for given in sums if sum(given) == value), None)


def _as_without_failures(evidence: Evidence, values: _Values, output: Any) -> list[str]:
    """The same numbers drawn, a run in which nothing fails would end just so."""
    result: dict[str, int] = {}
    wrong: list[str] = []
    for step in evidence.steps:
        if step.name not in values.known:
            return wrong  # said already
        value = values.known[step.name][0]
        given = [result[name] for name in step.data]
        if step.kind == "reduce":
            result[step.name] = sum(given)
        else:
            nonce = values.traced.get(step.name, {}).get(value, (0, []))[0]
            if step.deterministic and nonce:
                wrong.append(f"task {step.name} has drawn a number")
            result[step.name] = digest(step.name, nonce, given)
        if result[step.name] != value:
            wrong.append(f"task {step.name} is {value}, and without failures {result[step.name]}")
    end = evidence.steps[-1].name
    if output != result[end]:
        wrong.append(f"the output is {output}, and without failures {result[end]}")
    return wrong
