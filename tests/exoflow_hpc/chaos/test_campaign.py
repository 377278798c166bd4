"""A short campaign from a seed that nobody chose, and what a campaign finds out."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import exoflow_hpc
from tests.chaos.counts import Needs, lacking
from tests.chaos.short import check_short_campaign
from tests.exoflow_hpc.chaos.flow import digest
from tests.exoflow_hpc.chaos.plan import KINDS, Step, plan
from tests.exoflow_hpc.chaos.points import POINTS, ROLES
from tests.exoflow_hpc.chaos.summary import summary
from tests.exoflow_hpc.chaos.trial import Outcome
from tests.exoflow_hpc.chaos.verify import Evidence, verify


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_short_campaign(tmp_path: Path) -> None:
    """`make chaos-workflows ARGS='--seed S'` repeats one of its trials."""
    check_short_campaign("tests.exoflow_hpc.chaos", tmp_path / "results")


def test_a_seed_says_it_all() -> None:
    assert plan(7) == plan(7)
    trials = [plan(seed) for seed in range(300)]
    assert {trial.kind for trial in trials} == set(KINDS)
    assert {fault.point for trial in trials for fault in trial.faults if fault.point} == set(POINTS)
    assert {fault.role for trial in trials for fault in trial.faults if fault.role} == set(ROLES)
    for trial in trials:
        assert 6 <= len(trial.steps) <= 25
        assert all(fault.rank < trial.ranks for fault in trial.faults)
        assert {step.checkpoint for step in trial.steps} <= {"sync", "async", "skip", "auto"}
    assert {step.effect for trial in trials for step in trial.steps} == {"", "idempotent", "rollback", "both"}


def test_all_points_are_listed() -> None:
    source = Path(exoflow_hpc.__file__).parent
    found = {name for path in source.rglob("*.py") for name in re.findall(r'fault\.point\("([^"]+)"', path.read_text())}
    # of commands that no trial runs, and of annotations that are not true: they are killed at in tests of their own
    others = {name for name in found if name.startswith(("gc.", "array."))} | {"controller.deviated"}
    # only tasks that continue, or put objects, come by: see `end_to_end/test_continuations.py` and `test_references.py`
    others |= {"controller.continued", "worker.before_put"}
    assert found - others == set(POINTS)


def test_what_has_been_killed_too_rarely_is_asked_for() -> None:
    needs = Needs(10, each=2, each_role=2, kinds={"point"}, points=POINTS, more_roles=ROLES)
    enough = Outcome(0, "point", 3, kills=10, points=dict.fromkeys(POINTS, 2), roles=dict.fromkeys(needs.roles, 2))
    trials = [enough] * 3
    assert lacking(trials, needs) == []
    few = Outcome(1, "point", 3, kills=10, points=enough.points, roles=enough.roles | {"forkserver": 1})
    assert lacking([few] * 1, needs)[0] == "kills of a forkserver: 1 of 2"
    trial = next(trial for trial in map(plan, range(300)) if trial.kind == "kill forkserver")
    assert not needs.wants(trial, [*trials, Outcome(2, trial.kind, 1), *[Outcome(3, trial.kind, 1)] * 2])
    assert f"| journal.sealed | {POINTS['journal.sealed'].role} | 6 |" in summary(trials, needs)


# -- what the verifier finds out ------------------------------------------------------------------------------------------------

#: what varies, what is computed from it, an effect of that, and the end
STEPS = (
    Step("a", "task", (), deterministic=False, checkpoint="skip"),
    Step("b", "task", ("a",), checkpoint="sync"),
    Step("v", "task", ("b",), checkpoint="sync", effect="rollback"),
    Step("r", "reduce", ("a", "b"), checkpoint="skip"),
    Step("end", "task", ("v", "r"), size=0),
)


def _run(nonce: int, epoch: int = 1) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Return what a run of all tasks says, and their values."""
    values: dict[str, int] = {}
    lines = []
    for step in STEPS:
        given = [values[name] for name in step.data]
        if step.kind == "reduce":
            values[step.name] = sum(given)
            continue
        drawn = 0 if step.deterministic else nonce
        values[step.name] = digest(step.name, drawn, given)
        line = {"task": step.name, "epoch": epoch, "attempt": 0, "given": given}
        lines += [line | {"what": "start"}, line | {"what": "value", "nonce": drawn, "value": values[step.name]}]
    return lines, values


def _commit(task: str, attempt: int = 0) -> dict[str, Any]:
    return {"type": "task_committed", "task_id": task, "attempt": attempt}


def _good() -> tuple[Evidence, dict[str, int]]:
    lines, values = _run(7)
    journal = [(1, _commit(task)) for task in ("b", "v", "end")]
    outputs = {"b": np.full(8, values["b"]), "v": np.full(8, values["v"]), "end": np.asarray(values["end"])}
    return Evidence(STEPS, lines, journal, {"w/v/0": ([values["b"]], values["v"])}, [], outputs), values


def test_a_run_without_failures_is_in_order() -> None:
    evidence, values = _good()
    assert verify(evidence, values["end"]) == []
    assert len(verify(evidence, 5)) == 1


def test_two_values_of_a_task_are_found_out() -> None:
    evidence, values = _good()
    lines, others = _run(8, epoch=2)
    evidence.lines += [line for line in lines if line["task"] == "a"]
    evidence.effects = {"w/v/0": ([others["b"]], values["v"])}
    assert any("two values of task b" in text for text in verify(evidence, values["end"]))


def test_two_values_behind_a_reduce_are_found_out() -> None:
    """The sum is of another drawn value than what the committed task was computed from."""
    evidence, values = _good()
    lines, others = _run(8)
    evidence.lines += [line for line in lines if line["task"] in ("a", "b")]
    total = others["a"] + others["b"]
    value = digest("end", 0, [values["v"], total])
    evidence.lines.append(
        {"what": "value", "task": "end", "epoch": 1, "given": [values["v"], total], "nonce": 0, "value": value}
    )
    evidence.outputs["end"] = np.asarray(value)
    assert any("two values of task" in text for text in verify(evidence, value))


def test_a_value_that_nobody_computed_is_found_out() -> None:
    evidence, values = _good()
    evidence.outputs["b"] = np.full(8, 5)
    assert any("no run of it has given" in text for text in verify(evidence, values["end"]))
    evidence.outputs["b"] = np.arange(8)
    assert any("not what it returned" in text for text in verify(evidence, values["end"]))


@pytest.mark.parametrize(
    ("effects", "text"),
    [
        ({}, "no effect w/v/0"),
        ({"w/v/0": 0, "w/v/1": 0}, "a superfluous effect w/v/1"),
        ({"w/v/1": 0}, "no effect w/v/0"),
    ],
)
def test_effects_too_few_or_too_many_are_found_out(effects: dict[str, int], text: str) -> None:
    evidence, values = _good()
    evidence.effects = dict.fromkeys(effects, evidence.effects["w/v/0"])
    assert text in verify(evidence, values["end"])


def test_a_committed_task_that_runs_again_is_found_out() -> None:
    evidence, values = _good()
    again = [line | {"epoch": 2} for line in evidence.lines if line["task"] == "b"]
    evidence.lines += again
    assert any("is started as (epoch, attempt) (2, 0)" in text for text in verify(evidence, values["end"]))
    # the value above is lost, so it is void: then it has to run again
    void = copy.deepcopy(evidence)
    void.journal += [(2, {"type": "task_voided", "task_id": "b", "attempt": 0, "lost": True}), (2, _commit("b"))]
    assert verify(void, values["end"]) == []
    # not so if nothing above it is lost
    void.journal.insert(0, (1, _commit("a")))
    assert any("all that varies above it is committed" in text for text in verify(void, values["end"]))
    evidence.lines = [line for line in evidence.lines if line not in again]
    evidence.journal.append((2, _commit("b", 1)))
    assert any(
        "committed as (epoch, attempt) (1, 0), and again as (2, 1)" in t for t in verify(evidence, values["end"])
    )


def test_a_zombie_is_found_out() -> None:
    evidence, values = _good()
    evidence.lines.append(_effect("act", "v") | {"epoch": 2})
    evidence.lines.append(_effect("act", "v"))
    assert any("after epoch 2 had begun" in text for text in verify(evidence, values["end"]))


def _effect(what: str, task: str) -> dict[str, Any]:
    return {"what": what, "task": task, "epoch": 1, "attempt": 0, "key": f"w/{task}/0"}


def test_an_effect_that_stands_too_long_is_found_out() -> None:
    evidence, values = _good()
    again = [line | {"attempt": 1} for line in evidence.lines if line["task"] == "a"]
    evidence.lines += [_effect("act", "v"), *again, _effect("undo", "v")]
    assert any("a runs again (epoch 1, attempt 1) while effect w/v/0" in t for t in verify(evidence, values["end"]))
    evidence.lines[-len(again) - 1 :] = [_effect("undo", "v"), *again]
    assert not any("while effect" in text for text in verify(evidence, values["end"]))


def test_effects_undone_in_the_wrong_order_are_found_out() -> None:
    evidence, values = _good()
    evidence.steps = [*STEPS[:-1], Step("u", "task", ("v",), effect="rollback"), STEPS[-1]]
    acts = [_effect("act", "v"), _effect("act", "u")]
    evidence.lines += [*acts, _effect("undo", "v"), _effect("undo", "u")]
    assert "the effect of task v is undone before effect w/u/0" in verify(evidence, values["end"])
    evidence.lines[-2:] = reversed(evidence.lines[-2:])
    assert not any("is undone before" in text for text in verify(evidence, values["end"]))
