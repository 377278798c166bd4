from __future__ import annotations

import threading

import pytest

from exoflow_hpc.context import TaskContext, activate, context
from exoflow_hpc.errors import ExoFlowError


def test_outside_of_a_task_there_is_none() -> None:
    with pytest.raises(ExoFlowError, match="inside a running task"):
        context()


def test_inside_it_is_that_of_the_task_also_in_its_threads() -> None:
    seen: list[TaskContext] = []
    with activate(TaskContext("w", "t_1", 2, 3, 4)) as mine:
        assert context() is mine
        thread = threading.Thread(target=lambda: seen.append(context()))
        thread.start()
        thread.join()
        assert seen == [mine]
        with activate(TaskContext("w", "u", 0, 0, 4)) as inner:
            assert context() is inner
        assert context() is mine
    with pytest.raises(ExoFlowError):
        context()


def test_the_idempotency_key_is_the_same_in_each_attempt() -> None:
    keys = [
        TaskContext("w", "t", incarnation, attempt, 9).idempotency_key
        for incarnation, attempt in ((0, 0), (0, 1), (1, 1))
    ]
    assert keys[0] == keys[1] != keys[2]


def test_progress_is_checked_and_thinned_out_but_the_end_is_told() -> None:
    told: list[tuple[float, str]] = []
    running = TaskContext(
        "w", "t", 0, 0, 0, report=lambda fraction, text: told.append((fraction, text)), progress_interval=3600
    )
    for step in range(11):
        running.progress(step / 10, str(step))
    assert told == [(0.0, "0"), (1.0, "10")]
    for wrong in (1.1, -0.1, float("nan")):
        with pytest.raises(ValueError, match="'t'"):
            running.progress(wrong)
    TaskContext("w", "t", 0, 0, 0).progress(0.5)


def test_the_text_of_a_progress_report_is_one_short_line_that_any_message_can_hold() -> None:
    told: list[str] = []
    running = TaskContext("w", "t", 0, 0, 0, report=lambda fraction, text: told.append(text))
    running.progress(1, "é \ud800\n\x1b[2J" + "x" * 10_000)
    assert told[0].startswith("é    [2Jxx")
    assert len(told[0]) == 200
