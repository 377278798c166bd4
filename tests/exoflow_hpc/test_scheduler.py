"""The scheduler's rules, one by one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from exoflow_hpc import semantics
from exoflow_hpc.scheduler import _AHEAD, Scheduler, TaskState
from exoflow_hpc.scheduler_events import (
    Cancel,
    CancelAttempt,
    Commit,
    CommitFailed,
    Dispatch,
    Finish,
    Input,
    ObjectsLost,
    RankJoined,
    RankLost,
    RankShared,
    Recall,
    Release,
    Rollback,
    Start,
    TaskCommitted,
    TaskFailed,
    TaskFinished,
)
from exoflow_hpc.settings import Settings
from exoflow_hpc.spec import WorkflowSpec
from exoflow_hpc.task_table import TaskTable
from tests.exoflow_hpc.semantics.world import make_spec


def spec_of(*rows: dict[str, Any]) -> WorkflowSpec:
    return make_spec(rows, max_retries=3)


def started(
    spec: WorkflowSpec, committed: Any = (), ranks: Any = ((0, 0, 4),), **settings: Any
) -> tuple[Scheduler, list]:
    # waits before retries have tests of their own
    scheduler = Scheduler(spec, committed, ranks, settings=Settings(**{"retry_backoff": 0.0, **settings}))
    return scheduler, scheduler.handle(Start())


def dispatched(instructions: list) -> list[int]:
    return [instruction.task for instruction in instructions if isinstance(instruction, Dispatch)]


@pytest.mark.parametrize(("mode", "at_once"), [("sync", False), ("async", True), ("skip", True)])
def test_consumers_wait_for_the_commit_with_sync_only(mode: str, at_once: bool) -> None:
    scheduler, out = started(spec_of({"checkpoint": mode}, {"data": (0,)}))
    assert dispatched(out) == [0]
    out = scheduler.handle(TaskFinished(0, 0, 0, 8))
    assert (Commit(0, 0) in out) == (mode != "skip")
    assert dispatched(out) == ([1] if at_once else [])
    if not at_once:
        assert dispatched(scheduler.handle(TaskCommitted(0, 0))) == [1]


def test_success_waits_for_every_promise() -> None:
    scheduler, _ = started(spec_of({"checkpoint": "async"}, {"data": (0,)}))
    scheduler.handle(TaskFinished(0, 0, 0))
    scheduler.handle(TaskFinished(1, 0, 0))
    assert not any(isinstance(i, Finish) for i in scheduler.handle(TaskCommitted(1, 0)))
    out = scheduler.handle(TaskCommitted(0, 0))
    assert out == [Release(0, 0), Finish("SUCCESSFUL", 1)]
    assert scheduler.is_finished
    assert scheduler.handle(Cancel()) == []


def test_the_output_is_committed_even_with_skip() -> None:
    scheduler, _ = started(spec_of({"checkpoint": "skip"}))
    assert scheduler.handle(TaskFinished(0, 0, 0)) == [Commit(0, 0)]
    assert scheduler.handle(TaskCommitted(0, 0)) == [Finish("SUCCESSFUL", 0)]


def test_control_edges_wait_for_the_end_and_barriers_for_the_commit() -> None:
    scheduler, out = started(spec_of({"checkpoint": "async"}, {"after": (0,)}, {"barriers": (0,)}, {"data": (1, 2)}))
    assert dispatched(out) == [0]
    assert dispatched(scheduler.handle(TaskFinished(0, 0, 0))) == [1]
    assert dispatched(scheduler.handle(TaskCommitted(0, 0))) == [2]


def test_resume_stops_at_committed_tasks_and_reads_their_checkpoints() -> None:
    spec = spec_of({}, {"data": (0,), "checkpoint": "sync"}, {}, {"data": (1, 2)})
    scheduler, out = started(spec, committed={1})
    assert dispatched(out) == [2]
    out = scheduler.handle(TaskFinished(2, 0, 0))
    assert out == [Dispatch(3, 0, 0, (Input(1, "checkpoint", -1), Input(2, "memory", 0)))]
    assert scheduler.wanted == (2, 3)
    assert (scheduler.counters.run, scheduler.counters.skipped) == (2, 2)


def test_resume_of_what_is_finished_finishes() -> None:
    scheduler, out = started(spec_of({}, {"data": (0,)}), committed={1}, ranks=())
    assert out == [Finish("SUCCESSFUL", 1)]
    assert scheduler.counters.skipped == 2


def test_attempts_of_earlier_epochs_are_not_used_again() -> None:
    scheduler = Scheduler(spec_of({}), ranks=[(0, 0, 1)], attempts={0: 4})
    assert scheduler.handle(Start()) == [Dispatch(0, 5, 0, ())]


def test_a_lost_rank_runs_its_attempts_elsewhere_and_its_late_results_are_dropped() -> None:
    scheduler, out = started(spec_of({}), ranks=[(0, 3, 1), (1, 0, 1)])
    assert out == [Dispatch(0, 0, 0, ())]
    assert scheduler.handle(RankLost(0, 2)) == [], "of an older incarnation"
    assert scheduler.handle(RankLost(0, 3)) == [Dispatch(0, 1, 1, ())]
    assert scheduler.handle(TaskFinished(0, 0, 0)) == [Release(0, 0)]
    assert scheduler.handle(TaskFailed(0, 0, "exception", "late")) == []
    assert scheduler.handle(TaskFinished(0, 1, 1)) == [Commit(0, 1)]
    assert scheduler.handle(TaskFinished(0, 1, 1)) == [], "said twice"
    assert scheduler.counters.rerun == 1


def test_lost_ranks_do_not_use_up_retries_but_have_a_limit() -> None:
    scheduler, _ = started(spec_of({"max_retries": 0}), max_rank_losses=2)
    for incarnation in range(2):
        assert dispatched(scheduler.handle(RankJoined(0, incarnation + 1, 1))) == [0], (
            "a newer incarnation is a loss of the older"
        )
    out = scheduler.handle(RankLost(0, 2))
    assert out[-1].status == "FAILED"
    assert "incarnation 2" in out[-1].error


@pytest.mark.parametrize(
    ("kind", "retryable", "starts"),
    [
        ("exception", False, 1),
        ("exception", True, 3),
        ("crash", False, 3),
        ("timeout", False, 3),
        ("memory", False, 3),
        ("canceled", False, 3),
    ],
)
def test_retries(kind: str, retryable: bool, starts: int) -> None:
    scheduler, out = started(spec_of({"max_retries": 2}))
    count = 0
    while dispatched(out):
        out = scheduler.handle(TaskFailed(0, count, kind, "why", retryable))
        count += 1
    assert count == starts
    assert out == [Finish("FAILED", 0, kind, "why")]


def test_a_failure_cancels_the_rest_and_waits_for_writes_under_way() -> None:
    scheduler, _ = started(spec_of({"checkpoint": "async"}, {}, {}, {"data": (0, 1, 2)}))
    scheduler.handle(TaskFinished(0, 0, 0))
    assert scheduler.handle(TaskFailed(1, 0, "exception", "boom")) == [CancelAttempt(2, 0, 0)]
    assert scheduler.handle(TaskFinished(2, 0, 0)) == [Release(2, 0)]
    assert scheduler.handle(RankJoined(5, 0, 1)) == []
    assert scheduler.handle(TaskCommitted(0, 0)) == [Finish("FAILED", 1, "exception", "boom")]
    assert scheduler.committed == {0}


def test_cancel() -> None:
    scheduler, _ = started(spec_of({}, {"data": (0,)}))
    assert scheduler.handle(Cancel()) == [CancelAttempt(0, 0, 0), Finish("CANCELED", 1)]
    assert Scheduler(spec_of({})).handle(Cancel()) == [Finish("CANCELED", 0)]


def test_a_failed_write_is_tried_again_and_then_leaves_the_run_resumable() -> None:
    scheduler, _ = started(spec_of({}), max_commit_retries=1)
    scheduler.handle(TaskFinished(0, 0, 0))
    assert scheduler.handle(CommitFailed(0, 0, "no space")) == [Commit(0, 0)]
    assert scheduler.handle(CommitFailed(0, 0, "no space")) == [Finish("RESUMABLE", 0, "commit", "no space")]


def test_a_broken_journal_ends_the_run_at_once() -> None:
    scheduler, _ = started(spec_of({"checkpoint": "async"}, {"checkpoint": "async"}, {"data": (0, 1)}))
    scheduler.handle(TaskFinished(0, 0, 0))
    scheduler.handle(TaskFinished(1, 0, 0))
    assert scheduler.handle(CommitFailed(0, 0, "fsync", retryable=False)) == [
        CancelAttempt(2, 0, 0),
        Finish("RESUMABLE", 0, "commit", "fsync"),
    ]


def test_a_lost_output_runs_the_smallest_closure_again() -> None:
    # 0 → 1 → 3, 2 → 3; 0 was released when 1 was done
    scheduler, _ = started(spec_of({}, {"data": (0,)}, {}, {"data": (1, 2)}))
    scheduler.handle(TaskFinished(0, 0, 0))
    assert scheduler.handle(TaskFinished(1, 0, 0)) == [Release(0, 0)]
    assert dispatched(scheduler.handle(ObjectsLost(((1, 0),)))) == [0]
    assert scheduler.handle(ObjectsLost(((1, 0),))) == [], "known already"
    assert dispatched(scheduler.handle(TaskFinished(0, 1, 0))) == [1]
    scheduler.handle(TaskFinished(2, 0, 0))
    assert scheduler.handle(TaskFinished(1, 1, 0))[-1] == Dispatch(
        3, 0, 0, (Input(1, "memory", 1), Input(2, "memory", 0))
    )
    assert scheduler.counters.rerun == 2


def test_a_lost_output_that_is_committed_is_read_from_its_checkpoint() -> None:
    scheduler, _ = started(spec_of({"checkpoint": "sync"}, {}, {"data": (0, 1)}))
    scheduler.handle(TaskFinished(0, 0, 0))
    scheduler.handle(TaskCommitted(0, 0))
    assert scheduler.handle(ObjectsLost(((0, 0),))) == []
    out = scheduler.handle(TaskFinished(1, 0, 0))
    assert out[-1].inputs == (Input(0, "checkpoint", -1), Input(1, "memory", 0))


def test_an_input_that_is_gone_when_it_is_read_is_made_again() -> None:
    scheduler, _ = started(spec_of({}, {"data": (0,)}))
    scheduler.handle(TaskFinished(0, 0, 0))
    assert dispatched(scheduler.handle(TaskFailed(1, 0, "lost-input", missing=((0, 0),)))) == [0]
    assert scheduler.handle(TaskFinished(0, 1, 0))[-1] == Dispatch(1, 1, 0, (Input(0, "memory", 1),))


def test_an_input_that_is_never_there_does_not_loop_for_ever() -> None:
    scheduler, out = started(spec_of({}, {"data": (0,)}), committed={0}, max_rank_losses=2)
    count = 0
    while dispatched(out):
        out = scheduler.handle(TaskFailed(1, count, "lost-input", "checksum", missing=((0, 0),)))
        count += 1
    assert count == 3
    assert out == [Finish("FAILED", 1, "lost-input", "checksum")]


def test_a_storage_that_cannot_be_read_ends_the_run_but_fails_no_workflow() -> None:
    scheduler, out = started(spec_of({}, {"data": (0,)}), committed={0}, max_rank_losses=2)
    count = 0
    while dispatched(out):
        out = scheduler.handle(TaskFailed(1, count, "storage", "stale file handle"))
        count += 1
    assert count == 3
    assert out == [Finish("RESUMABLE", 1, "storage", "stale file handle")]


def test_a_record_that_got_through_late_counts_and_stops_the_rerun() -> None:
    scheduler, _ = started(spec_of({}, {"data": (0,), "checkpoint": "async"}, {}, {"data": (1, 2)}))
    scheduler.handle(TaskFinished(0, 0, 0))
    scheduler.handle(TaskFinished(1, 0, 0))
    assert dispatched(scheduler.handle(ObjectsLost(((1, 0),)))) == [0]
    scheduler.handle(TaskFinished(0, 1, 0))
    assert scheduler.state(1) is TaskState.RUNNING
    assert scheduler.handle(TaskCommitted(1, 0)) == [CancelAttempt(1, 1, 0), Release(0, 1)]
    assert scheduler.handle(TaskFailed(1, 1, "canceled")) == []
    assert scheduler.handle(TaskFinished(2, 0, 0))[-1].inputs[0] == Input(1, "checkpoint", -1)


def test_placement_prefers_the_bytes_then_the_idle_then_the_lowest() -> None:
    spec = spec_of({}, {}, {"data": (0, 1)}, {"kind": "reduce", "op": "sum", "data": (0, 1)}, {"data": (2, 3)})
    scheduler, out = started(spec, ranks=[(0, 0, 1), (1, 0, 2)])
    assert [(i.task, i.rank) for i in out] == [(0, 1), (1, 0)]
    scheduler.handle(TaskFinished(0, 0, 1, 10))
    out = scheduler.handle(TaskFinished(1, 0, 0, 20))
    assert [(i.task, i.rank) for i in out] == [(2, 0), (3, 0)], "rank 0 has more bytes, and a reduce takes no worker"


def test_no_rank_gets_more_than_it_has_workers() -> None:
    scheduler, out = started(spec_of(*[{}] * 5, {"data": (0, 1, 2, 3, 4)}), ranks=())
    assert out == []
    assert not scheduler.has_ranks
    assert len(dispatched(scheduler.handle(RankJoined(0, 0, 2)))) == 2
    assert len(dispatched(scheduler.handle(RankJoined(1, 0, 1)))) == 1
    assert scheduler.handle(TaskFinished(1, 0, 0)) == [Dispatch(3, 0, 0, ())]


def test_an_event_that_can_not_be_tells_the_story() -> None:
    scheduler, _ = started(spec_of({}))
    with pytest.raises(ValueError, match="attempt 7 of task 0 was never dispatched: task 't0' is running"):
        scheduler.handle(TaskFinished(0, 7, 0))
    with pytest.raises(ValueError, match="no such task"):
        scheduler.handle(TaskFinished(9, 0, 0))
    with pytest.raises(ValueError, match="kind 'tired'"):
        scheduler.handle(TaskFailed(0, 0, "tired"))
    with pytest.raises(ValueError, match="before"):
        scheduler.handle(Start())


@pytest.mark.parametrize("shape", ["chain", "fan"])
def test_ten_thousand_tasks_take_a_linear_number_of_steps(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 10_000
    calls = 0

    def counting(function: Any) -> Any:
        def wrapper(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            return function(*args)

        return wrapper

    for name in ("is_usable", "_make_ready", "_release_if_unneeded"):
        monkeypatch.setattr(TaskTable, name, counting(getattr(TaskTable, name)))
    rows: list[dict[str, Any]]
    if shape == "chain":
        rows = [{"data": (i - 1,) if i else (), "checkpoint": "async"} for i in range(count)]
    else:
        rows = [{"checkpoint": "async"}, *[{"data": (0,)} for _ in range(count - 2)], {"data": tuple(range(count - 1))}]
    scheduler, pending = started(spec_of(*rows))
    finish = None
    while pending:
        instruction = pending.pop()
        if isinstance(instruction, Dispatch):
            pending.extend(scheduler.handle(TaskFinished(instruction.task, 0, instruction.rank, 8)))
        elif isinstance(instruction, Commit):
            pending.extend(scheduler.handle(TaskCommitted(instruction.task, 0)))
        elif isinstance(instruction, Finish):
            finish = instruction
    assert finish == Finish("SUCCESSFUL", count - 1)
    assert scheduler.counters.run == count
    assert calls < 20 * count


def test_losing_the_middle_of_a_long_chain_plans_without_recursion() -> None:
    tasks = spec_of(*[{"data": (i - 1,) if i else ()} for i in range(10_000)]).tasks
    again = semantics.must_run_again(tasks, [9_000], is_needed=lambda task: True, is_gone=lambda task: task > 10)
    assert again == list(range(11, 9_001))
    assert semantics.wanted(tasks, [9_999], {5_000}) == list(range(5_001, 10_000))


def test_while_tasks_are_quick_some_wait_on_the_rank_for_a_worker() -> None:
    spec = spec_of(*[{}] * 20, {"after": tuple(range(20))})
    scheduler, out = started(spec, ranks=((0, 0, 1), (1, 0, 1)))
    assert dispatched(out) == [0, 1]
    assert dispatched(scheduler.handle(TaskFinished(0, 0, 0))) == [2], "not quick"
    out = scheduler.handle(TaskFinished(1, 0, 1, quick=True))
    assert len(dispatched(out)) == 1 + 2 * _AHEAD
    ranks = [instruction.rank for instruction in out if isinstance(instruction, Dispatch)]
    assert ranks.count(0) == _AHEAD and ranks.count(1) == 1 + _AHEAD
    assert dispatched(scheduler.handle(TaskFinished(2, 0, 0))) == [], "enough wait"


def test_what_is_returned_has_not_run_and_waits_for_a_free_worker() -> None:
    spec = spec_of(*[{}] * 4, {"after": tuple(range(4))})
    scheduler, out = started(spec, ranks=((0, 0, 1),))
    assert dispatched(out) == [0]
    assert dispatched(scheduler.handle(TaskFinished(0, 0, 0, quick=True))) == [1, 2, 3]
    assert dispatched(scheduler.handle(TaskFailed(3, 0, "returned"))) == []
    assert scheduler.counters.rerun == 0
    assert dispatched(scheduler.handle(TaskFinished(1, 0, 0))) == []
    assert dispatched(scheduler.handle(TaskFinished(2, 0, 0))) == [3]
    assert dispatched(scheduler.handle(TaskFinished(3, 1, 0))) == [4]
    assert scheduler.counters.rerun == 0


def test_what_waits_is_recalled_if_another_rank_has_room() -> None:
    spec = spec_of(*[{}] * 4, {"after": tuple(range(4))})
    scheduler, out = started(spec, ranks=((0, 0, 2), (1, 0, 2)))
    assert dispatched(out) == [0, 1, 2, 3]
    here = [instruction.task for instruction in out if isinstance(instruction, Dispatch) and instruction.rank == 0]
    waiting = tuple((task, 0) for task in here)
    assert scheduler.handle(RankShared(0, 2, 2, waiting)) == [], "no rank has room"
    (there,) = set(range(4)) - set(here) - {max(set(range(4)) - set(here))}
    scheduler.handle(TaskFinished(there, 0, 1))
    (recall,) = scheduler.handle(RankShared(0, 2, 2, waiting))
    assert recall == Recall(here[0], 0, 0)
    (again,) = scheduler.handle(TaskFailed(here[0], 0, "returned"))
    assert isinstance(again, Dispatch) and (again.task, again.rank) == (here[0], 1)
    assert scheduler.counters.rerun == 0


@pytest.mark.parametrize("how", [{"idempotent": True}, {"rollback": "undo"}])
def test_an_effect_that_was_not_begun_is_not_undone(how: dict[str, Any]) -> None:
    scheduler, (order,) = started(spec_of({"external": True, **how}, {"after": (0,)}), ranks=((0, 0, 1), (1, 0, 1)))
    other = 1 - order.rank
    (recall,) = scheduler.handle(RankShared(order.rank, 1, 2, ((0, 0),)))
    assert recall == Recall(0, 0, order.rank)
    assert scheduler.handle(TaskFailed(0, 0, "returned")) == [Dispatch(0, 1, other, ())]
    assert scheduler.counters.rolled_back == scheduler.counters.rerun == 0


def test_nothing_is_recalled_to_where_it_was() -> None:
    """A worker is missing for a moment: by what was dispatched that rank has room, and so it would get the task again."""
    scheduler, (order, _) = started(spec_of({}, {}, {"after": (0, 1)}), ranks=((0, 0, 4), (1, 0, 4)))
    assert scheduler.handle(RankShared(order.rank, 0, 1, ((order.task, 0),))) == []


def test_a_rollback_is_not_recalled() -> None:
    scheduler, _ = started(
        spec_of({"external": True, "rollback": "undo"}, {"after": (0,)}), ranks=((0, 0, 1), (1, 0, 1))
    )
    out = scheduler.handle(TaskFailed(0, 0, "exception", retryable=True))
    (rollback,) = [one for one in out if isinstance(one, Rollback)]
    assert scheduler.handle(RankShared(rollback.rank, 1, 2, ((0, rollback.attempt),))) == []


def test_each_share_is_used_wherever_it_is() -> None:
    """Others fill all ranks, some more than others: half of each is ours all the same, one after the other."""
    scheduler = Scheduler(spec_of(*[{}] * 20, {"after": tuple(range(20))}))
    for rank, others in enumerate((4, 8, 8, 8)):
        scheduler.handle(RankJoined(rank, 0, 2))
        scheduler.handle(RankShared(rank, others, 2))
    ranks = [one.rank for one in scheduler.handle(Start()) if isinstance(one, Dispatch)]
    assert sorted(ranks) == [0, 1, 2, 3]


def test_what_others_have_may_change_for_ever() -> None:
    scheduler, _ = started(spec_of({}, {"after": (0,)}), ranks=((0, 0, 1), (1, 0, 1)))
    for turn in range(10_000):
        scheduler.handle(RankShared(turn % 2, turn % 3, 1 + (turn % 3 > 0)))
    assert len(scheduler._ranks._heap) + len(scheduler._ranks._shares) < 200


def test_workers_are_shared_with_other_workflows() -> None:
    """No more goes where others are at work, but for our share of the workers there, which is used in turns."""
    spec = spec_of(*[{}] * 20, {"after": tuple(range(20))})
    scheduler = Scheduler(spec)
    scheduler.handle(RankJoined(0, 0, 4))
    scheduler.handle(RankJoined(1, 0, 4))
    scheduler.handle(RankShared(0, 4, 2))
    scheduler.handle(RankShared(1, 3, 2))
    ranks = [one.rank for one in scheduler.handle(Start()) if isinstance(one, Dispatch)]
    assert ranks[0] == 1, "where a worker is idle"
    assert Counter(ranks) == {0: 2, 1: 2}, "half of the workers, and not more"
    out = scheduler.handle(RankShared(1, 0, 1))
    assert [one.rank for one in out if isinstance(one, Dispatch)] == [1, 1]


@pytest.mark.parametrize("option", [{"external": True, "idempotent": True}, {"timeout": 1.0}, {"memory": 1 << 30}])
def test_effects_and_limits_wait_for_a_free_worker(option: dict[str, Any]) -> None:
    spec = spec_of({}, {}, option, {}, {"after": (0, 1, 2, 3)})
    scheduler, out = started(spec, ranks=((0, 0, 1),))
    assert dispatched(out) == [0]
    assert dispatched(scheduler.handle(TaskFinished(0, 0, 0, quick=True))) == [1]
    assert dispatched(scheduler.handle(TaskFinished(1, 0, 0, quick=True))) == [2, 3]


def test_what_has_a_large_input_waits_for_a_free_worker() -> None:
    spec = spec_of({}, {}, {"data": (0,)}, {"data": (1,)}, {"after": (2, 3)})
    scheduler, _ = started(spec, ranks=((0, 0, 1),))
    assert dispatched(scheduler.handle(TaskFinished(0, 0, 0, 1 << 20, quick=True))) == [1]
    assert dispatched(scheduler.handle(TaskFinished(1, 0, 0, 8, quick=True))) == [2, 3]
