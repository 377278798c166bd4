"""Side channels of one process, over real sockets. Each rank of the run under mpiexec has its own."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hoplite_mpi import Config

pytestmark = pytest.mark.mpi

SECRET = b"s" * 32


class End:
    """A side channel and what it was told."""

    def __init__(self, rank: int, secret: bytes = SECRET, config: Config | None = None) -> None:
        from hoplite_mpi.transport.engine import Engine
        from hoplite_mpi.transport.sidechannel import SideChannel

        self.me = (rank, 0)
        self.up: list[Any] = []
        self.down: list[Any] = []
        self.messages: list[Any] = []
        self.engine = Engine(config or Config())
        self.side = SideChannel(
            self.engine,
            self.me,
            secret,
            on_up=self.up.append,
            on_down=lambda *what: self.down.append(what),
            on_message=lambda *what: self.messages.append(what),
        )
        self.address = ("127.0.0.1", self.side.address[1])
        self.engine.start()

    def call(self, other: End, peer: tuple[int, int] | None = None) -> None:
        self.engine.run(lambda: self.side.connect(peer or other.me, other.address))

    def send(self, other: End, kind: int, body: Any) -> bool:
        return bool(self.engine.run(lambda: self.side.send(other.me, kind, body)))

    def close(self) -> None:
        self.engine.run(self.side.close)
        self.engine.stop()


def until(condition: Callable[[], Any], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture
def ends() -> Iterator[Callable[..., End]]:
    made: list[End] = []

    def make(rank: int, **options: Any) -> End:
        made.append(End(rank, **options))
        return made[-1]

    yield make
    for end in made:
        end.close()


@pytest.fixture
def pair(ends: Callable[..., End]) -> tuple[End, End]:
    a, b = ends(0), ends(1)
    a.call(b)
    until(lambda: a.up and b.up)
    assert (a.up, b.up) == ([(1, 0)], [(0, 0)])
    return a, b


def test_messages_come_in_order_both_ways(pair: tuple[End, End]) -> None:
    a, b = pair
    for i in range(100):
        assert a.send(b, 5, [i, "text", b"bytes", None])
        assert b.send(a, 6, i)
    until(lambda: len(a.messages) == len(b.messages) == 100)
    assert b.messages == [((0, 0), 5, [i, "text", b"bytes", None]) for i in range(100)]
    assert a.messages == [((1, 0), 6, i) for i in range(100)]


def test_large_frames_come_whole(pair: tuple[End, End]) -> None:
    a, b = pair
    bodies = [os.urandom(size) for size in (1 << 16, 5_000_000, 0, 1 << 20)]
    for body in bodies:
        a.send(b, 5, body)
    until(lambda: len(b.messages) == len(bodies))
    assert [body for _, _, body in b.messages] == bodies


def test_two_who_call_each_other_at_once_are_connected(ends: Callable[..., End]) -> None:
    a, b = ends(0), ends(1)
    a.call(b)
    b.call(a)
    until(lambda: a.up and b.up)
    assert a.send(b, 5, "to b") and b.send(a, 5, "to a")
    until(lambda: a.messages and b.messages)
    assert a.down == b.down == []


def test_a_goodbye_is_told_from_a_reset(pair: tuple[End, End]) -> None:
    a, b = pair
    b.engine.run(b.side.close)
    until(lambda: a.down)
    assert a.down == [((1, 0), "bye")]
    assert not a.send(b, 5, "nobody is there")


def test_a_connection_that_ends_without_goodbye_is_a_reset(pair: tuple[End, End]) -> None:
    a, b = pair
    b.engine.run(lambda: b.side.hang_up(a.me))
    until(lambda: a.down)
    assert a.down == [((1, 0), "reset")]
    assert b.down == []


def test_an_address_where_nobody_listens_is_a_reset(ends: Callable[..., End]) -> None:
    a, b = ends(0), ends(1)
    b.engine.run(b.side.close)
    a.call(b)
    until(lambda: a.down)
    assert a.down == [((1, 0), "reset")]


def test_a_listener_that_says_nothing_is_silence(ends: Callable[..., End]) -> None:
    config = Config(stall_timeout=0.1, keepalive_timeout=0.3, join_timeout=0.5)
    a = ends(0, config=config)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        a.engine.run(lambda: a.side.connect((1, 0), mute.getsockname()))
        until(lambda: a.down)
    assert a.down == [((1, 0), "silence")]


def test_a_wrong_secret_is_refused_by_both(ends: Callable[..., End]) -> None:
    a, b = ends(0), ends(1, secret=b"t" * 32)
    a.call(b)
    until(lambda: a.down)
    b.call(a)
    until(lambda: b.down)
    assert a.up == b.up == []
    assert not a.side.connected(b.me) and not b.side.connected(a.me)


def test_a_call_for_somebody_else_is_refused(ends: Callable[..., End]) -> None:
    """A port may belong to another process by now."""
    a, b = ends(0), ends(1)
    a.call(b, peer=(1, 1))
    until(lambda: a.down)
    assert (a.up, b.up) == ([], [])


GARBAGE = {
    "http": b"GET / HTTP/1.1\r\n\r\n",
    "zeros": bytes(64),
    "a message before the greeting": struct.pack("<IB", 3, 4) + b"\x92\x05\xc0",
    "a greeting that is none": struct.pack("<IB", 4, 0) + b"\xff\xff\xff\xff",
    "a greeting of wrong types": struct.pack("<IB", 6, 0) + b"\x95\xa1a\xc0\xc0\xc0\xc0",
    "a huge frame": struct.pack("<IB", 1 << 31, 0),
    "a proof without a greeting": struct.pack("<IB", 32, 2) + bytes(32),
}


@pytest.mark.parametrize("what", GARBAGE)
def test_a_strangers_garbage_is_hung_up_on_and_harms_nobody(pair: tuple[End, End], what: str) -> None:
    a, b = pair
    with socket.create_connection(b.address, timeout=20) as stranger:
        stranger.sendall(GARBAGE[what])
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(100) == b""
    assert a.send(b, 5, "still here")
    until(lambda: b.messages)
    assert (b.up, b.down) == ([(0, 0)], [])
