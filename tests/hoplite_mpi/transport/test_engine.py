"""The engine on the process's own COMM_SELF: real MPI requests, real threads, real sockets."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from mpi4py import MPI

from hoplite_mpi.config import Config
from hoplite_mpi.transport.engine import Engine
from hoplite_mpi.transport.primitives import RequestFailedError, Signal, completed


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(Config())
    made.start()
    yield made
    made.stop()


def wait_for(engine: Engine, done: Any, seconds: float = 20.0) -> bool:
    event = threading.Event()
    return engine.wait(done, lambda left: event.wait(min(0.002, left or 0.002)), seconds)


def exchange(engine: Engine, tag: int, ended: list[int]) -> bytearray:
    """Start a send and a receive on COMM_SELF; *ended* gets the tag of each that completes."""
    received = bytearray(64)
    receive = MPI.COMM_SELF.Irecv(received, 0, tag)
    send = MPI.COMM_SELF.Isend(bytearray([tag]) * 64, 0, tag)
    for request in (receive, send):
        engine.watch(request, lambda error: ended.append(tag))
    return received


def test_requests_complete_while_a_user_thread_waits(engine: Engine) -> None:
    ended: list[int] = []
    buffers = [engine.run(lambda tag=tag: exchange(engine, tag, ended)) for tag in range(1, 9)]
    assert wait_for(engine, lambda: len(ended) == 16)
    assert [buffer[0] for buffer in buffers] == list(range(1, 9))


@pytest.mark.parametrize("more", [0, 6])
def test_requests_that_fail_are_told_from_those_that_succeed(engine: Engine, more: int) -> None:
    """However many there are, and though all of them end at once. A message too long for its buffer is an MPI error."""
    told: dict[int, BaseException | None] = {}
    buffers = [bytearray(8 if tag % 3 == 0 else 64) for tag in range(2 + more)]
    sends = [MPI.COMM_SELF.Isend(bytearray([tag]) * 64, 0, tag) for tag in range(2 + more)]

    def begin() -> None:
        for tag, buffer in enumerate(buffers):
            request = MPI.COMM_SELF.Irecv(buffer, 0, tag)
            engine.watch(request, lambda error, tag=tag: told.update({tag: error}))  # type: ignore[misc]

    engine.run(begin)
    assert wait_for(engine, lambda: len(told) == 2 + more)
    MPI.Request.Waitall(sends)
    for tag, error in told.items():
        if tag % 3 == 0:
            assert isinstance(error, RequestFailedError), tag
        else:
            assert error is None and buffers[tag] == bytearray([tag]) * 64, (tag, error)


def test_requests_complete_while_nobody_waits(engine: Engine) -> None:
    ended: list[int] = []
    over = threading.Event()
    buffer = engine.run(lambda: exchange(engine, 3, ended))
    engine.run(lambda: engine.after(0.0, lambda: None))

    def look() -> None:
        if len(ended) == 2:
            over.set()
        else:
            engine.after(0.001, look)

    engine.run(look)
    assert over.wait(20)
    assert buffer[0] == 3


def test_a_coroutine_resumes_when_its_request_has_completed(engine: Engine) -> None:
    story: list[str] = []

    async def talk() -> None:
        buffer = bytearray(8)
        receive = MPI.COMM_SELF.Irecv(buffer, 0, 5)
        story.append("posted")
        send = MPI.COMM_SELF.Isend(b"12345678", 0, 5)
        await completed(engine, receive)
        story.append(bytes(buffer).decode())
        await completed(engine, send)

    engine.run(lambda: engine.spawn(talk(), lambda error: story.append(repr(error))))
    assert wait_for(engine, lambda: len(story) == 3)
    assert story == ["posted", "12345678", "None"]


def test_an_error_in_a_coroutine_is_told_and_breaks_nothing(engine: Engine) -> None:
    errors: list[BaseException | None] = []

    async def fail() -> None:
        raise ValueError("as planned")

    engine.run(lambda: engine.spawn(fail(), errors.append))
    assert wait_for(engine, lambda: bool(errors))
    assert isinstance(errors[0], ValueError)
    assert engine.failure is None
    ended: list[int] = []
    engine.run(lambda: exchange(engine, 1, ended))
    assert wait_for(engine, lambda: len(ended) == 2)


def test_an_error_that_nobody_takes_is_raised_to_who_waits(engine: Engine) -> None:
    engine.run(lambda: engine.after(0.0, lambda: 1 // 0))
    with pytest.raises(ZeroDivisionError):
        wait_for(engine, lambda: False)
    with pytest.raises(ZeroDivisionError):
        engine.run(lambda: None)


def test_signals_resume_all_who_wait_and_relays_reach_further(engine: Engine) -> None:
    first, second = Signal(engine), Signal(engine)
    woken: list[str] = []

    async def wait(name: str, sign: Signal) -> None:
        await sign
        woken.append(name)

    def begin() -> None:
        for name, sign in (("a", first), ("b", first), ("c", second)):
            engine.spawn(wait(name, sign))

    engine.run(begin)
    assert woken == []
    engine.run(lambda: first.relay(second))
    engine.run(first.fire)
    assert sorted(woken) == ["a", "b", "c"]
    engine.run(first.fire)
    assert sorted(woken) == ["a", "b", "c"], "a relay counts once"


def test_timers_come_in_the_order_of_their_times(engine: Engine) -> None:
    order: list[int] = []

    def begin() -> None:
        for number, delay in ((2, 0.02), (1, 0.01), (3, 0.03)):
            engine.after(delay, lambda number=number: order.append(number))  # type: ignore[misc]
        engine.after(0.015, lambda: order.append(9)).cancel()

    engine.run(begin)
    assert wait_for(engine, lambda: len(order) == 3)
    assert order == [1, 2, 3]


def test_a_wait_ends_at_its_timeout(engine: Engine) -> None:
    began = time.monotonic()
    assert not wait_for(engine, lambda: False, 0.05)
    assert time.monotonic() - began >= 0.05


def test_unwatch_gives_back_a_request_that_never_completes(engine: Engine) -> None:
    def callback(error: BaseException | None) -> None:
        raise AssertionError("it was taken back")

    request = engine.run(lambda: MPI.COMM_SELF.Irecv(bytearray(8), 0, 77))
    engine.run(lambda: engine.watch(request, callback, passive=True))
    assert engine.run(lambda: engine.unwatch(callback)) is request
    assert engine.run(lambda: engine.unwatch(callback)) is None
    request.Cancel()
    request.Wait()


def test_sockets_wake_a_blocked_engine(engine: Engine) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    read: list[bytes] = []

    def readable(mask: int) -> None:
        with contextlib.suppress(BlockingIOError):  # another thread of the engine was quicker
            read.append(ours.recv(100))

    with ours, theirs:
        engine.run(lambda: engine.add_socket(ours.fileno(), readable))
        theirs.send(b"ring")
        assert wait_for(engine, lambda: bool(read))
        assert read == [b"ring"]
        engine.run(lambda: engine.remove_socket(ours.fileno()))


def test_callbacks_for_outside_run_without_the_lock(engine: Engine) -> None:
    held: list[bool] = []
    over = threading.Event()

    def outside() -> None:
        def try_it() -> None:
            got = engine.lock.acquire(timeout=5)
            held.append(not got)
            if got:
                engine.lock.release()
            over.set()

        threading.Thread(target=try_it).start()
        over.wait(10)

    engine.run(lambda: engine.outside(outside))
    assert over.wait(10)
    assert held == [False]


def test_a_callback_that_blocks_a_waiting_thread_does_not_stop_the_engine(engine: Engine) -> None:
    """The progress thread drives while the thread that waits, and drives otherwise, is in the callback."""
    over, ran_in = threading.Event(), []

    def block() -> None:
        ran_in.append(threading.current_thread())
        engine.run(lambda: engine.after(0.01, over.set))
        assert over.wait(20)

    def post() -> None:
        if threading.current_thread() is threading.main_thread():
            engine.outside(block)
        else:
            engine.after(0.001, post)

    engine.run(lambda: engine.after(0.0, post))
    assert wait_for(engine, lambda: over.is_set() or not keep_traffic(engine))
    assert ran_in == [threading.main_thread()]


def keep_traffic(engine: Engine) -> bool:
    """Keep a waiting thread from leaving the engine to the progress thread."""
    engine.run(lambda: exchange(engine, 1, []))
    return True


def test_an_interrupt_never_tears_a_step() -> None:
    """Ctrl-C in the main thread that drives the engine comes out of the wait, and the engine goes on."""
    program = textwrap.dedent(
        """
        import os, signal, threading, time
        from hoplite_mpi.config import Config
        from hoplite_mpi.memory import unlink_own_segments
        from hoplite_mpi.transport.engine import Engine

        engine = Engine(Config(spin_time=30.0))
        engine.start()
        inside = []

        def work():  # a step that takes long: the signal comes in the middle of it
            inside.append("begun")
            os.kill(os.getpid(), signal.SIGINT)
            end = time.monotonic() + 0.2
            while time.monotonic() < end:
                pass
            inside.append("ended")

        main = threading.get_ident()

        def in_main():
            if threading.get_ident() == main:
                work()
            elif not inside:
                engine.after(0.0, in_main)

        engine.run(lambda: engine.after(0.0, in_main))
        try:
            engine.wait(lambda: False, lambda left: time.sleep(0.001), 20)
            print("no interrupt")
        except KeyboardInterrupt:
            print("interrupted", *inside)
        assert engine.failure is None
        assert engine.run(lambda: 42) == 42
        engine.stop()
        unlink_own_segments()
        os._exit(0)
        """
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
    )
    assert answer.stdout.split() == ["interrupted", "begun", "ended"], answer.stderr[-2000:]


def test_an_idle_engine_uses_next_to_no_processor(engine: Engine) -> None:
    """Less than 3 % of a core: what blocks uses nearly nothing, what polls uses all of it, so load can't blur the two."""
    request = engine.run(lambda: MPI.COMM_SELF.Irecv(bytearray(8), 0, 78))

    def never(error: BaseException | None) -> None:
        pass

    engine.run(lambda: engine.watch(request, never, passive=True))
    time.sleep(0.1)
    clock = time.pthread_getcpuclockid(engine.thread_ident)
    used, began = time.clock_gettime(clock), time.monotonic()
    time.sleep(2.0)
    assert (time.clock_gettime(clock) - used) / (time.monotonic() - began) < 0.03
    engine.run(lambda: engine.unwatch(never))
    request.Cancel()
    request.Wait()


def test_a_stopped_engine_lets_its_thread_go() -> None:
    engine = Engine(Config())
    engine.start()
    ident = engine.thread_ident
    engine.stop()
    assert ident not in {thread.ident for thread in threading.enumerate()}
