"""Wire forms and framing of the worker protocol."""

from __future__ import annotations

import pickle

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exoflow_hpc.worker.failure import MAX_TEXT, describe
from exoflow_hpc.worker.frames import FrameReader, encode
from exoflow_hpc.worker.protocol import (
    ArenaInput,
    Began,
    InlineInput,
    Progress,
    Reply,
    TaskDone,
    TaskFailed,
    TaskIdentity,
    TaskRequest,
    describe_exit,
)
from hoplite_mpi import ObjectID
from hoplite_mpi.meta import Meta

REQUEST = TaskRequest(
    TaskIdentity("w", "t", 1, 2, 3),
    "key",
    b"args",
    {"key": b"function", "other": b"\0"},
    {
        7: InlineInput(Meta.of_array(np.zeros((2, 3), "f4")), b"x" * 24),
        9: ArenaInput(ObjectID.from_name("a"), (5 << 32) + 1),
    },
    ObjectID.from_name("b"),
    "other",
    10,
    ("/a", "/b"),
    0.5,
    1 << 40,
    True,
)


def test_request_round_trip() -> None:
    assert TaskRequest.from_wire(msgpack.unpackb(msgpack.packb(REQUEST.to_wire()), strict_map_key=False)) == REQUEST


def test_request_leaves_out_known_blobs() -> None:
    wire = msgpack.unpackb(msgpack.packb(REQUEST.to_wire({"key"})), strict_map_key=False)
    assert TaskRequest.from_wire(wire).blobs == {"other": b"\0"}


@pytest.mark.parametrize(
    "body",
    [
        None,
        TaskDone(Meta.of_bytes(3), 3, b"abc", 0.5),
        TaskDone(Meta.of_array(np.zeros(4, [("x", "i4"), ("y", "f8", (2,))])), 80, None),
        TaskFailed("call", ("a.B", "builtins.object"), "message", "traceback", b"pickle", True, (1, 2), 0.25),
        Progress(0.5, "half"),
        Began(1 << 40),
    ],
)
def test_reply_round_trip(body: TaskDone | TaskFailed | Progress | Began | None) -> None:
    replies = [Reply(12, body)]
    if isinstance(body, (TaskDone, TaskFailed)):
        replies.append(Reply(12, body, last=True))
    frames = list(FrameReader().feed(b"".join(encode(reply.to_wire()) for reply in replies)))
    assert [Reply.from_wire(wire) for wire in frames] == replies


def test_reply_of_unknown_kind() -> None:
    with pytest.raises(ValueError, match="unknown kind"):
        Reply.from_wire([9, 1])


@given(st.lists(st.one_of(st.integers(0, 9), st.binary(max_size=300), st.text(max_size=20))), st.data())
def test_frames_however_bytes_arrive(messages: list[object], data: st.DataObject) -> None:
    stream = b"".join(encode(message) for message in messages)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    reader = FrameReader()
    found: list[object] = []
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += reader.feed(stream[begin:end])
    assert found == messages


@pytest.mark.parametrize(
    ("code", "text"),
    [(0, "exited with status 0"), (3, "exited with status 3"), (-9, "was killed by SIGKILL"), (-40, "signal 40")],
)
def test_describe_exit(code: int, text: str) -> None:
    assert describe_exit(code).endswith(text)


def test_failure_keeps_type_and_text() -> None:
    failed = describe(FileNotFoundError(2, "no such file", "/x"), "call")
    assert failed.type_names[:2] == ("builtins.FileNotFoundError", "builtins.OSError")
    assert "/x" in failed.message
    error = failed.load_exception()
    assert isinstance(error, FileNotFoundError)
    assert error.filename == "/x"


def test_failure_is_bounded() -> None:
    failed = describe(ValueError("head" + "x" * 10_000_000 + "tail"), "call")
    assert len(failed.message) < MAX_TEXT + 100
    assert failed.message.startswith("head")
    assert failed.message.endswith("tail")
    assert failed.pickled is None


class _Hostile(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    def __reduce__(self) -> str:
        raise RuntimeError("no pickle")


def test_failure_of_hostile_exception() -> None:
    failed = describe(_Hostile(), "call")
    assert failed.pickled is None
    assert "RuntimeError" in failed.message
    assert "_Hostile" in failed.traceback
    assert failed.load_exception() is None


def test_failure_with_lone_surrogates_travels() -> None:
    failed = describe(ValueError("\udc80"), "call")
    body = Reply.from_wire(*FrameReader().feed(encode(Reply(1, failed).to_wire()))).body
    assert isinstance(body, TaskFailed)
    assert body.message == "\\udc80"


def test_broken_pickle_never_raises() -> None:
    assert TaskFailed("call", (), "", "", b"not a pickle").load_exception() is None
    assert TaskFailed("call", (), "", "", pickle.dumps("no exception")).load_exception() is None
