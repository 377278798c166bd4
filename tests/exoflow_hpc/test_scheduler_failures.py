"""The scheduler's rules for failures: waiting before a retry, and failures that are caught."""

from __future__ import annotations

from typing import Any

import pytest

from exoflow_hpc.scheduler import Scheduler, TaskState
from exoflow_hpc.scheduler_events import (
    Cancel,
    Catch,
    Commit,
    Dispatch,
    Finish,
    Input,
    ObjectsLost,
    RankLost,
    Release,
    RetryAfter,
    RetryDue,
    Start,
    TaskCaught,
    TaskCommitted,
    TaskFailed,
    TaskFinished,
)
from exoflow_hpc.settings import Settings
from exoflow_hpc.spec import TaskSpec, WorkflowSpec


def spec_of(*rows: dict[str, Any]) -> WorkflowSpec:
    tasks = []
    for index, row in enumerate(rows):
        fields: dict[str, Any] = {"kind": "task", "data": (), "after": (), "barriers": (), "checkpoint": "skip"}
        more: dict[str, Any] = {"max_retries": 3, "op": "", "function": "", "args": b"", "retry": "", "blobs": ()}
        tasks.append(TaskSpec(index=index, name=f"t{index}", **{**fields, **more, **row}))
    return WorkflowSpec(tuple(tasks), len(tasks) - 1, "", {})


def started(*rows: dict[str, Any], seed: str = "s", ranks: Any = ((0, 0, 4),), **settings: Any) -> Scheduler:
    scheduler = Scheduler(spec_of(*rows), ranks=ranks, settings=Settings(**settings), seed=seed)
    scheduler.handle(Start())
    return scheduler


def waits(scheduler: Scheduler, task: int = 0) -> list[float]:
    """Fail *task* until it fails for good; return how long each retry was to wait."""
    found = []
    for attempt in range(100):
        (what, *rest) = scheduler.handle(TaskFailed(task, attempt, "crash"))
        if scheduler.is_finished:
            return found
        assert isinstance(what, RetryAfter) and (what.task, what.attempt) == (task, attempt) and not rest
        found.append(what.delay)
        assert scheduler.state(task) is TaskState.WAITING
        assert scheduler.handle(RetryDue(task, attempt)) == [Dispatch(task, attempt + 1, 0, ())]
    raise AssertionError("it never ends")


def test_waits_grow_up_to_a_limit() -> None:
    longest = [0.0] * 6
    for seed in range(200):
        found = waits(started({"max_retries": 6}, seed=str(seed), retry_backoff=1.0, retry_backoff_max=10.0))
        longest = [max(pair) for pair in zip(longest, found, strict=True)]
        assert all(0 <= wait <= most for wait, most in zip(found, (1, 2, 4, 8, 10, 10), strict=True))
    # full jitter: over the whole range
    assert all(wait > 0.9 * most for wait, most in zip(longest, (1, 2, 4, 8, 10, 10), strict=True))


def test_waits_are_the_same_for_the_same_seed_and_differ_between_tasks() -> None:
    rows: tuple[dict[str, Any], ...] = ({}, {}, {"data": (0, 1)})
    assert waits(started(*rows), 0) == waits(started(*rows), 0)
    assert waits(started(*rows), 0) != waits(started(*rows, seed="other"), 0)
    assert waits(started(*rows), 0) != waits(started(*rows), 1)


def test_wait_of_a_task() -> None:
    assert max(waits(started({"retry_delay": 50.0, "max_retries": 20}, retry_backoff=0.0))) > 30
    scheduler = started({"retry_delay": 0.0}, retry_backoff=1.0)
    assert scheduler.handle(TaskFailed(0, 0, "crash")) == [Dispatch(0, 1, 0, ())]
    assert len(waits(started({"max_retries": 90}))) == 90, "no overflow"


def test_others_run_while_one_waits() -> None:
    scheduler = started({}, {}, {"data": (0, 1)}, ranks=[(0, 0, 1)])
    out = scheduler.handle(TaskFailed(0, 0, "crash"))
    assert [type(what) for what in out] == [RetryAfter, Dispatch] and out[1].task == 1
    assert scheduler.handle(RetryDue(0, 0)) == [], "the rank has no room"
    assert scheduler.handle(TaskFinished(1, 0, 0)) == [Dispatch(0, 1, 0, ())]


def test_only_the_wait_that_is_on_counts() -> None:
    scheduler = started({})
    scheduler.handle(TaskFailed(0, 0, "crash"))
    assert scheduler.handle(RetryDue(0, 1)) == []
    assert scheduler.handle(RetryDue(0, 0)) == [Dispatch(0, 1, 0, ())]
    assert scheduler.handle(RetryDue(0, 0)) == []
    assert isinstance(scheduler.handle(TaskFailed(0, 1, "crash"))[0], RetryAfter)
    assert scheduler.handle(RetryDue(0, 0)) == [], "of the wait before"
    assert scheduler.handle(RetryDue(0, 1)) == [Dispatch(0, 2, 0, ())]


def test_lost_ranks_wait_for_nothing() -> None:
    scheduler = started({}, ranks=[(0, 0, 1), (1, 0, 1)])
    assert scheduler.handle(RankLost(0, 0)) == [Dispatch(0, 1, 1, ())]
    assert scheduler.handle(TaskFailed(0, 1, "lost-input")) == [Dispatch(0, 2, 1, ())]


def test_input_lost_during_the_wait() -> None:
    scheduler = started({}, {"data": (0,)})
    scheduler.handle(TaskFinished(0, 0, 0))
    scheduler.handle(TaskFailed(1, 0, "crash"))
    assert scheduler.handle(ObjectsLost(((0, 0),))) == [Dispatch(0, 1, 0, ())]
    assert scheduler.handle(TaskFinished(0, 1, 0)) == [], "the input is there again, the time is not over"
    assert scheduler.handle(RetryDue(1, 0)) == [Dispatch(1, 1, 0, (Input(0, "memory", 1),))]


def test_time_is_over_before_the_input_is_there_again() -> None:
    scheduler = started({}, {"data": (0,)})
    scheduler.handle(TaskFinished(0, 0, 0))
    scheduler.handle(TaskFailed(1, 0, "crash"))
    scheduler.handle(ObjectsLost(((0, 0),)))
    assert scheduler.handle(RetryDue(1, 0)) == []
    assert scheduler.handle(TaskFinished(0, 1, 0)) == [Dispatch(1, 1, 0, (Input(0, "memory", 1),))]


def test_cancel_during_the_wait() -> None:
    scheduler = started({})
    scheduler.handle(TaskFailed(0, 0, "crash"))
    assert scheduler.handle(Cancel()) == [Finish("CANCELED", 0)]
    assert scheduler.handle(RetryDue(0, 0)) == []


def test_late_commit_during_the_wait() -> None:
    """The record of an attempt whose rank was lost got through: nothing has to run again, whatever else is due."""
    scheduler = started({}, ranks=[(0, 0, 1), (1, 0, 1)])
    scheduler.handle(TaskFinished(0, 0, 0))
    scheduler.handle(RankLost(0, 0))
    scheduler.handle(ObjectsLost(((0, 0),)))
    assert isinstance(scheduler.handle(TaskFailed(0, 1, "crash"))[0], RetryAfter)
    assert scheduler.handle(TaskCommitted(0, 0)) == [Finish("SUCCESSFUL", 0)]


# --- caught ---


@pytest.mark.parametrize("kind", ["exception", "crash", "timeout", "memory"])
def test_caught_failure_is_an_output_like_any_other(kind: str) -> None:
    scheduler = started({"catch_exceptions": True, "checkpoint": "sync", "max_retries": 0}, {"data": (0,)})
    assert scheduler.handle(TaskFailed(0, 0, kind, "why")) == [Catch(0, 0, "why")]
    assert scheduler.state(0) is TaskState.RUNNING
    assert scheduler.handle(TaskCaught(0, 0, 0, 100)) == [Commit(0, 0)]
    assert scheduler.handle(TaskCommitted(0, 0)) == [Dispatch(1, 0, 0, (Input(0, "memory", 0),))]
    assert scheduler.handle(TaskFinished(1, 0, 0))[-1] == Commit(1, 0)
    assert scheduler.handle(TaskCommitted(1, 0))[-1] == Finish("SUCCESSFUL", 1)


def test_retries_come_first() -> None:
    scheduler = started({"catch_exceptions": True, "max_retries": 1}, retry_backoff=0.0)
    assert scheduler.handle(TaskFailed(0, 0, "crash", "first")) == [Dispatch(0, 1, 0, ())]
    assert scheduler.handle(TaskFailed(0, 1, "crash", "second")) == [Catch(0, 1, "second")]


def test_exception_that_is_not_retried_is_caught_at_once() -> None:
    scheduler = started({"catch_exceptions": True})
    assert scheduler.handle(TaskFailed(0, 0, "exception", "why", retryable=False)) == [Catch(0, 0, "why")]


def test_lost_ranks_are_not_caught() -> None:
    scheduler = started({"catch_exceptions": True}, ranks=[(0, 0, 1), (1, 0, 1)], max_rank_losses=0)
    (finish,) = scheduler.handle(RankLost(0, 0))
    assert (finish.status, finish.kind) == ("FAILED", "rank-lost")


def test_cancel_while_it_is_being_caught() -> None:
    scheduler = started({"catch_exceptions": True, "max_retries": 0})
    scheduler.handle(TaskFailed(0, 0, "crash"))
    assert scheduler.handle(Cancel()) == [Finish("CANCELED", 0)]
    assert scheduler.handle(TaskCaught(0, 0, 0)) == []


def test_late_commit_while_it_is_being_caught() -> None:
    """What the journal names is the output, and not the failure of the attempt after it (R1)."""
    rows: tuple[dict[str, Any], ...] = (
        {"catch_exceptions": True, "max_retries": 0, "checkpoint": "sync"},
        {"data": (0,)},
    )
    scheduler = started(*rows, ranks=[(0, 0, 1), (1, 0, 1)])
    scheduler.handle(TaskFinished(0, 0, 0))
    scheduler.handle(RankLost(0, 0))
    assert [type(what) for what in scheduler.handle(ObjectsLost(((0, 0),)))] == [Dispatch]
    assert scheduler.handle(TaskFailed(0, 1, "crash", "why")) == [Catch(0, 1, "why")]
    assert scheduler.handle(TaskCommitted(0, 0)) == [Dispatch(1, 0, 1, (Input(0, "checkpoint", -1),))]
    assert scheduler.handle(TaskCaught(0, 1, 1)) == [Release(0, 1)]
    assert scheduler.handle(TaskCaught(0, 1, 1)) == []
