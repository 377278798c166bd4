"""A short campaign from a seed that nobody chose, and what a campaign counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from hoplite_mpi.testing import POINTS
from hoplite_mpi.transport import guard
from tests.chaos.counts import Needs, lacking
from tests.chaos.short import check_short_campaign
from tests.hoplite_mpi.chaos.plan import KINDS, plan
from tests.hoplite_mpi.chaos.summary import summary
from tests.hoplite_mpi.chaos.trial import Outcome
from tests.hoplite_mpi.chaos.verify import Story, verify

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.skipif(not guard.load().loaded, reason=f"the guard is not there: {guard.load().why}")
def test_a_short_campaign(tmp_path: Path) -> None:
    """`make chaos ARGS='--seed S'` repeats one of its trials."""
    check_short_campaign("tests.hoplite_mpi.chaos", tmp_path / "results", "--without", "hosts")


def test_a_seed_says_it_all() -> None:
    assert plan(7) == plan(7)
    trials = [plan(seed) for seed in range(300)]
    assert {trial.kind for trial in trials} == set(KINDS)
    assert {fault.point for trial in trials for fault in trial.faults if fault.point} == set(POINTS)
    for trial in trials:
        assert trial.ranks == len(trial.nodes)
        assert all(fault.rank is None or fault.rank < trial.ranks for fault in trial.faults)


def test_what_has_been_killed_too_rarely_is_asked_for() -> None:
    needs = Needs(kills=10, each=2, each_role=2, kinds={"point"}, points=POINTS)
    enough = Outcome(0, "point", 3, kills=10, points=dict.fromkeys(POINTS, 2))
    enough.roles = {point.role: 2 for point in POINTS.values()}
    trials = [enough] * 3
    assert lacking(trials, needs) == []
    few = Outcome(1, "point", 3, kills=10, points=dict.fromkeys(POINTS, 1) | {"put.sealed": 0}, roles=enough.roles)
    assert lacking([few], needs)[0] == "kills at put.sealed: 0 of 2"
    trial = next(trial for trial in map(plan, range(300)) if trial.faults[0].point == "put.sealed")
    assert needs.wants(trial, [few] * 3)
    assert not needs.wants(trial, trials)
    assert f"| put.sealed | {POINTS['put.sealed'].role} | 0 | 6 |" in summary(trials, needs)


def _story(tmp_path: Path, **lines: list[str]) -> Story:
    for process, said in lines.items():
        name = process.replace("_", ".").replace("p", "log.")
        (tmp_path / name).write_text("".join(line + "\n" for line in said))
    story = Story(tmp_path)
    story.read()
    return story


def _reduced(time: float, sources: str) -> str:
    return f'{{"time": {time}, "what": "reduced", "rid": "x", "sources": {sources}}}'


def test_survivors_who_disagree_are_found_out(tmp_path: Path) -> None:
    story = _story(tmp_path, p0_0=[_reduced(1.0, "[0]")], p1_0=[_reduced(2.0, "[0, 1]")])
    outcome = Outcome(0, "point", 2)
    verify(story, plan(0), {}, outcome)
    assert len(outcome.wrong) == 1 and "reduced ('x',)" in outcome.wrong[0]


def test_what_only_the_dead_have_seen_may_be_made_anew(tmp_path: Path) -> None:
    story = _story(tmp_path, p0_0=[_reduced(1.0, "[0]")], p1_0=[_reduced(2.0, "[0, 1]")])
    outcome = Outcome(0, "point", 2)
    verify(story, plan(0), {(0, 0): 1.5}, outcome)
    assert outcome.wrong == []


def test_two_sides_that_answer_at_once_are_found_out(tmp_path: Path) -> None:
    def answer(time: float, owner: str, view: int) -> str:
        return f'{{"time": {time}, "what": "answer", "home": 1, "owner": {owner}, "view": {view}}}'

    early = [answer(3.0, "[0, 0]", 2)]
    story = _story(tmp_path, p0_0=early, p1_0=[answer(1.0, "[1, 0]", 1), answer(3.5, "[1, 0]", 1)])
    story.cut = {(1, 0)}
    outcome = Outcome(0, "hosts cut", 2)
    verify(story, plan(0), {(1, 0): 0.5}, outcome)
    assert outcome.wrong == ["both parts of a cut answered for the shard of rank 1 for 0.5 s"]
