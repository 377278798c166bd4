"""Tests of the event loop of a rank."""

from __future__ import annotations

import threading

import pytest

from exoflow_hpc.rank.loop import Loop

__all__: list[str] = []


def test_runs_what_is_posted_in_order() -> None:
    loop, seen = Loop(), []
    for number in range(5):
        loop.post(lambda number=number: seen.append(number))
    assert loop.run_until(lambda: len(seen) == 5, 10)
    assert seen == [0, 1, 2, 3, 4]


def test_stops_as_soon_as_it_is_done() -> None:
    loop, seen = Loop(), []
    loop.post(lambda: seen.append(1))
    loop.post(lambda: seen.append(2))
    assert loop.run_until(lambda: bool(seen), 10)
    assert seen == [1]
    assert loop.run_until(lambda: len(seen) == 2, 10)


def test_timers_come_in_the_order_of_their_times() -> None:
    loop, seen = Loop(), []
    loop.after(0.02, lambda: seen.append("late"))
    loop.after(0.0, lambda: seen.append("early"))
    assert loop.run_until(lambda: len(seen) == 2, 10)
    assert seen == ["early", "late"]


def test_time_is_over() -> None:
    assert not Loop().run_until(lambda: False, 0.01)
    assert Loop().run_until(lambda: True, 0.0)


def test_posts_of_other_threads_wake_it() -> None:
    loop, seen = Loop(), []
    thread = threading.Thread(target=lambda: loop.post(lambda: seen.append(threading.current_thread())))
    loop.after(0.0, thread.start)
    assert loop.run_until(lambda: bool(seen), 10)
    thread.join()
    assert seen == [threading.current_thread()]


def test_an_error_ends_it_and_the_rest_is_kept() -> None:
    loop, seen = Loop(), []
    loop.post(lambda: 1 // 0)  # type: ignore[arg-type, return-value]
    loop.post(lambda: seen.append(1))
    with pytest.raises(ZeroDivisionError):
        loop.run_until(lambda: False, 10)
    assert loop.run_until(lambda: bool(seen), 10)
