"""All small workflows, all annotations, all crash points; and that the search finds what it is there to find."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from exoflow_hpc import scheduler, semantics
from exoflow_hpc.task_table import TaskTable

from .exhaustive import check, count, rows_of, shapes

__all__: list[str] = []

#: workflows of four tasks that are checked here; `make exhaustive` checks all
SAMPLE = 4000


def test_the_number_of_shapes() -> None:
    assert [len(shapes(n)) for n in (1, 2, 3, 4)] == [1, 1, 3, 21]
    assert count(4) == 21 * 24**3 * 8
    assert len({repr(rows_of(2, number)) for number in range(count(2))}) == count(2)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_all_workflows_of_so_many_tasks(n: int) -> None:
    for number in range(count(n)):
        check(n, number)


def test_workflows_of_four_tasks() -> None:
    seed = random.randrange(10**9)
    print(f"seed {seed}")
    for number in random.Random(seed).sample(range(count(4)), SAMPLE):
        check(4, number)


def _no_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semantics, "gates", lambda *args: {})


def _nothing_is_void(monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(*args: Any) -> Any:
        return semantics.plan(args[0], args[1], args[2], (), ())

    monkeypatch.setattr(scheduler, "plan", plan)


def _sync_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        TaskTable, "is_usable", lambda self, task: task in self.committed or self.held[task] is not None
    )


def _nothing_is_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TaskTable, "hold_back", lambda self, tasks: None)


@pytest.mark.parametrize("break_it", [_no_gates, _nothing_is_void, _sync_does_not_wait, _nothing_is_held_back])
def test_a_scheduler_that_breaks_a_rule_is_found_out(
    break_it: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_it(monkeypatch)
    with pytest.raises(AssertionError):
        for number in range(0, count(3), 7):
            check(3, number)
