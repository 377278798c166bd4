"""The rules, one by one, on the smallest workflows that show them."""

from __future__ import annotations

from typing import Any

import pytest

import exoflow_hpc as ef
from exoflow_hpc.compile import compile_workflow
from exoflow_hpc.errors import IllegalAnnotationError
from exoflow_hpc.scheduler import Scheduler
from exoflow_hpc.scheduler_events import (
    AttemptsOver,
    Catch,
    Commit,
    Dispatch,
    Finish,
    ObjectsLost,
    RankLost,
    Rollback,
    RollbackEnded,
    RollbackFailed,
    RolledBack,
    Start,
    TaskCaught,
    TaskCommitted,
    TaskFailed,
    TaskFinished,
    Void,
    Voided,
)
from exoflow_hpc.semantics import Plan, gates, is_worth_writing, plan

from .world import SETTINGS, make_spec

__all__: list[str] = []

VARIES: dict[str, Any] = {"deterministic": False}
FOR_GOOD: dict[str, Any] = {"external": True, "idempotent": True, "checkpoint": "sync"}
UNDOABLE: dict[str, Any] = {"external": True, "rollback": "r", "checkpoint": "sync"}


def of(rows: list[dict[str, Any]], committed: Any = (), effects: Any = (), deviant: Any = ()) -> Plan:
    spec = make_spec(rows)
    return plan(spec.tasks, spec.output, committed, effects, deviant)


def guards(rows: list[dict[str, Any]], committed: Any = ()) -> dict[int, set[int]]:
    spec = make_spec(rows)
    return {end: set(found) for end, found in gates(spec.tasks, spec.output, range(len(rows)), committed).items()}


# -- R4 -----------------------------------------------------------------------------------------------------------------
@ef.task
def step(x: Any = None) -> Any:
    return x


def undo(key: str, args: Any, result: Any) -> None: ...


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"external": True}, "declare it idempotent=True.*give it a rollback=.*idempotency_key"),
        ({"idempotent": True}, "add external=True"),
        ({"rollback": undo}, "add external=True"),
    ],
)
def test_illegal_annotations_are_refused_at_submit(options: dict[str, Any], text: str) -> None:
    with pytest.raises(IllegalAnnotationError, match=f"(?s)task 'charge'.*{text}"):
        compile_workflow(step.options(name="charge", **options).bind())


@pytest.mark.parametrize("options", [{"idempotent": True}, {"rollback": undo}, {"idempotent": True, "rollback": undo}])
def test_legal_annotations(options: dict[str, Any]) -> None:
    spec = compile_workflow(step.options(external=True, deterministic=False, **options).bind())
    task = spec.tasks[0]
    assert (task.external, task.deterministic, task.idempotent) == (True, False, options.get("idempotent", False))
    assert bool(task.rollback) == ("rollback" in options)
    if task.rollback:
        assert spec.blob(task.rollback)("key", (), None) is None
    assert type(spec).from_bytes(spec.to_bytes()).tasks == spec.tasks


def test_another_annotation_is_another_workflow() -> None:
    one = compile_workflow(step.bind(1))
    assert one.fingerprint != compile_workflow(step.options(deterministic=False).bind(1)).fingerprint
    two = compile_workflow(step.options(external=True, rollback=undo).bind(1))
    assert two.fingerprint != compile_workflow(step.options(external=True, rollback=print).bind(1)).fingerprint


# -- R3 -----------------------------------------------------------------------------------------------------------------
def test_what_varies_is_committed_before_an_effect_for_good() -> None:
    assert guards([VARIES, {"data": (0,), **FOR_GOOD}]) == {1: {0}}
    assert guards([VARIES, {"data": (0,)}, {"data": (1,), **FOR_GOOD}]) == {2: {0}}
    assert guards([VARIES, {"data": (0,), **UNDOABLE}]) == {}
    assert guards([{}, {"data": (0,), **FOR_GOOD}]) == {}


def test_what_is_behind_a_commit_need_not_be_committed() -> None:
    cut = [VARIES, {"data": (0,), "checkpoint": "sync"}, {"data": (1,), **FOR_GOOD}]
    assert guards(cut) == {}
    assert guards([cut[0], {"data": (0,), "checkpoint": "async"}, cut[2]]) == {2: {0}}


def test_the_narrow_cut() -> None:
    """Case 9: another consumer may still need it."""
    rows = [VARIES, {"data": (0,), "checkpoint": "sync"}, {"data": (1,), **FOR_GOOD}, {"data": (0,)}, {"data": (2, 3)}]
    assert guards(rows) == {2: {0}}


# -- R5, R6: what a run begins with -----------------------------------------------------------------------------------------
def test_diamond() -> None:
    """Case 1: B is committed, C has not run; A will be another one, so B is void."""
    rows = [VARIES, {"data": (0,), "checkpoint": "sync"}, {"data": (0,)}, {"data": (1, 2)}]
    begin = of(rows, committed={1})
    assert (begin.void, begin.wanted, begin.undo) == ((1,), (0, 1, 2, 3), frozenset())
    assert of([{}, *rows[1:]], committed={1}).void == ()
    assert of(rows, committed={1, 2}).wanted == (3,)


def test_effects_are_undone_before_what_they_stand_on_runs_again() -> None:
    """Case 3."""
    rows = [VARIES, {"data": (0,), **UNDOABLE}, {"data": (1,)}]
    begin = of(rows, effects=[1])
    assert (begin.void, begin.undo, begin.wanted) == ((), {1}, (0, 1, 2))
    assert begin.hold == {0, 1}
    assert begin.conflict is None
    assert of(rows, committed={1}, effects=[1]).wanted == (2,), "nobody needs A any more"


def test_an_effect_that_nobody_needs_any_more_comes_again_once_it_is_undone() -> None:
    """X waited for V, and is committed; what V stands on is lost."""
    rows = [VARIES, {"data": (0,), **UNDOABLE}, {"after": (1,), "checkpoint": "sync"}, {"data": (0, 2)}]
    assert of(rows, committed={1, 2}, effects=[1]).wanted == (0, 1, 3)


def test_what_may_not_be_repeated_is_undone_first() -> None:
    assert of([UNDOABLE, {"data": (0,)}], effects=[0]).undo == {0}
    assert of([{**UNDOABLE, "idempotent": True}, {"data": (0,)}], effects=[0]).undo == frozenset()
    assert of([UNDOABLE, {"data": (0,)}], committed={0}, effects=[0]).undo == frozenset()


def test_an_effect_for_good_on_a_value_that_is_lost_is_a_conflict() -> None:
    rows = [{}, {"data": (0,), **FOR_GOOD}, {"data": (0, 1)}]
    assert of(rows, committed={1}, effects=[1], deviant={0}).conflict == (0, 1)
    assert of(rows, committed={1}, effects=[1]).conflict is None


def test_a_control_edge_does_not_make_run_again_what_has_happened() -> None:
    """T ran, since B is committed; V only waits for it."""
    rows = [VARIES, {"data": (0,), "checkpoint": "sync"}, {"data": (1,), "after": (0,)}]
    assert of(rows, committed={1}).wanted == (2,)
    assert of(rows).wanted == (0, 1, 2)


# -- the scheduler ----------------------------------------------------------------------------------------------------------
def started(rows: list[dict[str, Any]], **facts: Any) -> tuple[Scheduler, list[Any]]:
    scheduler = Scheduler(make_spec(rows), ranks=[(0, 0, 2)], settings=SETTINGS, **facts)
    return scheduler, scheduler.handle(Start())


def test_effects_are_undone_one_by_one_the_latest_first() -> None:
    rows = [VARIES, {"data": (0,), **UNDOABLE}, {"data": (1,), **UNDOABLE}, {"data": (0, 2)}]
    scheduler, out = started(rows, committed={1, 2}, effects=[1, 2], attempts={1: 0, 2: 0})
    assert out == [Void(1, 0), Void(2, 0)]
    assert scheduler.handle(Voided(1)) == []
    assert scheduler.handle(Voided(2)) == [Rollback(2, 1, 0)]
    assert scheduler.handle(RollbackFailed(2, 1, "no")) == [Rollback(2, 2, 0)]
    assert scheduler.handle(RolledBack(2, 2)) == [Rollback(1, 1, 0)]
    assert scheduler.handle(RolledBack(1, 1)) == [Dispatch(0, 0, 0, ())]
    assert scheduler.counters.rolled_back == 2


def test_a_rollback_that_always_fails_ends_the_run() -> None:
    scheduler, out = started([{**UNDOABLE, "max_retries": 1}], effects=[0])
    assert out == [Rollback(0, 0, 0)]
    scheduler.handle(RollbackFailed(0, 0, "no"))
    assert scheduler.handle(RollbackFailed(0, 1, "no")) == [Finish("FAILED", 0, "rollback", "no")]


def test_a_lost_value_that_varies_takes_along_what_was_made_of_it() -> None:
    rows = [VARIES, {"data": (0,), "checkpoint": "async"}, {"data": (1,), **UNDOABLE}, {"data": (0, 2)}]
    scheduler, _ = started(rows)
    scheduler.handle(TaskFinished(0, 0, 0))
    assert Commit(1, 0) in scheduler.handle(TaskFinished(1, 0, 0))
    scheduler.handle(TaskFinished(2, 0, 0))
    out = scheduler.handle(ObjectsLost(((0, 0),)))
    assert Void(1, 0) in out and Void(2, 0) in out
    assert not [what for what in out if isinstance(what, (Dispatch, Rollback))]
    assert scheduler.handle(TaskCommitted(1, 0)) == [], "the record of what is void does not count"
    scheduler.handle(Voided(1))
    assert scheduler.handle(Voided(2)) == [Rollback(2, 1, 0)]
    assert scheduler.handle(RolledBack(2, 1)) == [Dispatch(0, 1, 0, ())]


def test_an_effect_waits_for_the_lease_of_who_may_still_be_at_it() -> None:
    scheduler, out = started([FOR_GOOD])
    assert [type(what) for what in out] == [Dispatch]
    scheduler._ranks.join(1, 0, 1)
    assert scheduler.handle(RankLost(0, 0, certain=False)) == []
    assert scheduler.handle(AttemptsOver(((0, 0),))) == [Dispatch(0, 1, 1, ())]
    assert scheduler.handle(RankLost(1, 0, certain=True)) == []


def test_a_task_without_effects_does_not_wait() -> None:
    scheduler, _ = started([{}])
    scheduler._ranks.join(1, 0, 1)
    assert scheduler.handle(RankLost(0, 0, certain=False)) == [Dispatch(0, 1, 1, ())]


def test_a_failed_attempt_with_an_effect_is_undone_before_the_next() -> None:
    scheduler, _ = started([UNDOABLE])
    assert scheduler.handle(TaskFailed(0, 0, "crash")) == [Rollback(0, 1, 0)]
    assert scheduler.handle(RolledBack(0, 1)) == [Dispatch(0, 2, 0, ())]


def test_a_large_input_of_what_can_be_undone_is_committed_first() -> None:
    scheduler, _ = started([{}, {"data": (0,), **UNDOABLE}])
    assert scheduler.handle(TaskFinished(0, 0, 0, 1 << 20)) == [Commit(0, 0)]
    out = scheduler.handle(TaskCommitted(0, 0))
    assert [what.task for what in out if isinstance(what, Dispatch)] == [1]


def test_a_caught_failure_has_no_effect() -> None:
    """Half of one would be neither the effect nor its failure."""
    scheduler, _ = started([{**UNDOABLE, "max_retries": 0, "catch_exceptions": True}])
    assert scheduler.handle(TaskFailed(0, 0, "crash", "gone")) == [Rollback(0, 1, 0)]
    assert scheduler.handle(RolledBack(0, 1)) == [Catch(0, 1, "gone")]
    assert scheduler.handle(TaskCaught(0, 1, 0, 1)) == [Commit(0, 1)]


# -- what is undone comes again -----------------------------------------------------------------------------------------------
def test_what_was_undone_comes_again_in_the_next_run_too() -> None:
    """V was undone, then all died; X had waited for V, and is committed."""
    rows = [VARIES, {"data": (0,), **UNDOABLE}, {"after": (1,), "checkpoint": "sync"}, {"data": (0, 2)}]
    spec = make_spec(rows)
    begin = plan(spec.tasks, spec.output, {2}, (), (), {1})
    assert begin.wanted == (0, 1, 3)
    assert 1 not in begin.happened


def test_what_was_undone_comes_again_though_its_output_is_not_needed_any_more() -> None:
    """V and D are lost together; D's commit gets through, so nobody needs V: but it is being undone."""
    rows = [{**UNDOABLE, "checkpoint": "skip"}, {"data": (0,), "checkpoint": "sync"}, {"data": (1,)}]
    scheduler, _ = started(rows)
    scheduler.handle(TaskFinished(0, 0, 0))
    assert Commit(1, 0) in scheduler.handle(TaskFinished(1, 0, 0))
    assert scheduler.handle(ObjectsLost(((0, 0), (1, 0)))) == [Rollback(0, 1, 0)]
    out = scheduler.handle(TaskCommitted(1, 0))
    assert [what.task for what in out if isinstance(what, Dispatch)] == [2]
    assert not any(isinstance(what, Finish) for what in scheduler.handle(TaskFinished(2, 0, 0)))
    assert not any(isinstance(what, Finish) for what in scheduler.handle(TaskCommitted(2, 0)))
    scheduler.handle(RollbackEnded(0, 1))
    assert [what.task for what in scheduler.handle(RolledBack(0, 1)) if isinstance(what, Dispatch)] == [0]


def test_what_waits_for_an_effect_waits_while_it_is_undone() -> None:
    rows = [{**UNDOABLE, "checkpoint": "skip"}, {"data": (0,)}, {"after": (0,), **FOR_GOOD}, {"data": (1, 2)}]
    scheduler = Scheduler(make_spec(rows), ranks=[(0, 0, 1)], settings=SETTINGS)
    scheduler.handle(Start())
    scheduler.handle(TaskFinished(0, 0, 0))
    assert scheduler.handle(ObjectsLost(((0, 0),))) == []
    out = scheduler.handle(TaskFailed(1, 0, "lost-input", missing=((0, 0),)))
    assert out == [Rollback(0, 1, 0)], "and nothing that waits for it"
    begin = of([UNDOABLE, {"after": (0,), "checkpoint": "sync"}, {"after": (0,)}, {"data": (0, 1, 2)}], {1}, [0])
    assert begin.undo == {0}
    assert 0 not in begin.happened


def test_a_rollback_that_has_ended_is_not_called_again_when_its_rank_is_lost() -> None:
    scheduler, _ = started([UNDOABLE], effects=[0])
    scheduler._ranks.join(1, 0, 1)
    scheduler.handle(RollbackEnded(0, 0))
    assert scheduler.handle(RankLost(0, 0)) == []
    assert [type(what) for what in scheduler.handle(RolledBack(0, 0))] == [Dispatch]


def test_a_rollback_on_a_rank_that_is_cut_off_is_waited_for() -> None:
    scheduler, out = started([UNDOABLE], effects=[0])
    assert out == [Rollback(0, 0, 0)]
    scheduler._ranks.join(1, 0, 1)
    assert scheduler.handle(RankLost(0, 0, certain=False)) == []
    assert scheduler.handle(AttemptsOver(((0, 0),))) == [Rollback(0, 1, 1)]


def test_a_loss_while_a_caught_failure_is_undone() -> None:
    """The rollback goes on, the failure counts no more, and the task runs again on what is made anew."""
    rows = [VARIES, {"data": (0,), **UNDOABLE, "max_retries": 0, "catch_exceptions": True}, {"data": (0, 1)}]
    scheduler, _ = started(rows)
    scheduler.handle(TaskFinished(0, 0, 0))
    assert scheduler.handle(TaskFailed(1, 0, "crash", "gone")) == [Rollback(1, 1, 0)]
    assert scheduler.handle(ObjectsLost(((0, 0),))) == []
    scheduler.handle(RollbackEnded(1, 1))
    assert scheduler.handle(RolledBack(1, 1)) == [Dispatch(0, 1, 0, ())]


def test_a_commit_that_is_given_up_is_void_up_to_its_own_attempt() -> None:
    """The next attempt is dispatched in the same breath, and counts."""
    scheduler, _ = started([{**VARIES, "checkpoint": "async"}, {"data": (0,)}])
    assert Commit(0, 0) in scheduler.handle(TaskFinished(0, 0, 0))
    out = scheduler.handle(ObjectsLost(((0, 0),)))
    assert Void(0, 0) in out
    again = [what for what in out if isinstance(what, Dispatch) and what.task == 0]
    assert [what.attempt for what in again] in ([1], [])


# -- checkpoint="auto" --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("seconds", "write_seconds", "consumers", "varies", "worth"),
    [
        (1.0, 10.0, 1, False, True),
        (1.0, 10.1, 1, False, False),
        (1.0, 10.1, 2, False, True),
        (1.0, 10.1, 1, True, True),
        (1.0, 10.0, 0, False, True),
        (0.0, 0.1, 3, True, False),
    ],
)
def test_what_is_worth_writing(seconds: float, write_seconds: float, consumers: int, varies: bool, worth: bool) -> None:
    task = make_spec([{"deterministic": not varies, "checkpoint": "auto"}]).tasks[0]
    assert is_worth_writing(task, seconds, write_seconds, consumers) is worth


@pytest.mark.parametrize(
    ("nbytes", "seconds", "committed"), [(1, 0.0, True), (1 << 20, 0.0, False), (1 << 20, 1.0, True)]
)
def test_auto_commits_what_is_small_or_took_long(nbytes: int, seconds: float, committed: bool) -> None:
    scheduler, _ = started([{"checkpoint": "auto"}, {"data": (0,), "checkpoint": "auto"}])
    out = scheduler.handle(TaskFinished(0, 0, 0, nbytes, seconds, 1.0))
    assert (Commit(0, 0) in out) is committed
    assert [what.task for what in out if isinstance(what, Dispatch)] == [1]


@pytest.mark.parametrize(
    "rows",
    [
        [{"checkpoint": "auto"}],
        [{"checkpoint": "auto"}, {"barriers": (0,)}],
        [{"checkpoint": "auto", **VARIES}, {"data": (0,), **FOR_GOOD}],
    ],
)
def test_auto_commits_what_somebody_waits_for(rows: list[dict[str, Any]]) -> None:
    """The workflow's output, what another task waits for the commit of, and what the rules ask for."""
    scheduler, _ = started(rows)
    assert Commit(0, 0) in scheduler.handle(TaskFinished(0, 0, 0, 1 << 20, 0.0, 1.0))
