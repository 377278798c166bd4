"""Tests of the event loop of a rank."""

from __future__ import annotations

import threading

import pytest

from exoflow_hpc.rank.loop import Loop, Strand

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


# -- several threads


def test_one_at_a_time_is_inside() -> None:
    loop, seen = Loop(), []

    def count() -> None:
        with loop:
            for _ in range(50):
                before = len(seen)
                loop.post(lambda: seen.append(1))
                loop.run_until(lambda before=before: len(seen) > before, 10)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(seen) == 200


def test_another_one_makes_the_calls_when_the_first_one_leaves() -> None:
    """The one that makes the calls is done first; what the others wait for comes after that."""
    loop, order = Loop(), []
    ready = threading.Barrier(3)

    def wait(name: str) -> None:
        ready.wait(10)
        assert loop.run_until(lambda: name in order, 30)

    threads = [threading.Thread(target=wait, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    ready.wait(10)
    for name in "ba":
        loop.after(0.05, lambda name=name: order.append(name))
        assert loop.run_until(lambda name=name: name in order, 10)
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def test_who_waits_does_not_wait_longer_than_said() -> None:
    loop = Loop()
    driving = threading.Event()
    thread = threading.Thread(target=lambda: loop.run_until(lambda: driving.is_set() and stop.is_set(), 30))
    stop = threading.Event()
    loop.post(driving.set)
    thread.start()
    assert driving.wait(10)
    assert not loop.run_until(lambda: False, 0.02)
    stop.set()
    loop.post(lambda: None)
    thread.join(30)
    assert not thread.is_alive()


def test_what_takes_long_is_done_outside() -> None:
    """While one is outside, another one is inside."""
    loop = Loop()
    out, come = threading.Event(), threading.Event()

    def long() -> None:
        with loop, loop.outside():
            out.set()
            assert come.wait(10)

    thread = threading.Thread(target=long)
    thread.start()
    assert out.wait(10)
    with loop:
        come.set()
    thread.join(10)
    assert not thread.is_alive()


def test_an_error_comes_out_of_the_strand_that_it_is_of() -> None:
    loop = Loop()
    one, other = Strand(loop), Strand(loop)
    seen: list[int] = []
    one.post(lambda: 1 // 0)  # type: ignore[arg-type, return-value]
    other.post(lambda: seen.append(1))
    assert other.run_until(lambda: bool(seen), 10)
    with pytest.raises(ZeroDivisionError):
        one.run_until(lambda: False, 10)
    one.after(0.0, lambda: seen.append(2))
    assert one.run_until(lambda: len(seen) == 2, 10)
