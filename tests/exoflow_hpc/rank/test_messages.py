"""Tests of the messages between controller and agents, and of failures, which travel in them."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from exoflow_hpc.errors import ExoFlowError, TaskCrashedError, TaskError
from exoflow_hpc.rank import messages as ms
from exoflow_hpc.rank.failure import Failure

__all__: list[str] = []

PLACES = [
    ms.InputPlace(3, "memory", 2),
    ms.InputPlace(4, "inline", 0, ["bytes", 2, None, None], b"ab"),
    ms.InputPlace(5, "checkpoint", 1, file="1-0.0-7.h5", entry="x/0", checksum="00ff"),
]
MESSAGES = [
    ms.Begin(3, "w", "/storage/workflows/w", "c0ffee"),
    ms.Run(3, 7, 1, 0, False, [[2, 0, True]], PLACES),
    ms.Run(3, 7, 1 << 33, 2, True, None, []),
    ms.Cancel(3, 7, 1),
    ms.Write(3, 7, 1),
    ms.End(3, "SUCCESSFUL"),
    ms.Recall(3, 1, 2),
    ms.Shared(3, 4, 2, [[1, 0]]),
    ms.Begin(3, "w", "/storage/workflows/w", "c0ffee", 2.5),
    ms.Begin(3, "w", "/storage/workflows/w", "c0ffee", 2.5, [[0, 1], [2, 0]]),
    ms.Survey(3, "/storage/workflows/w", "c0ffee"),
    ms.Report(3, 4, [[0, 1, ["bytes", 2, None, None], 2, b"ab", []]], [[2, 0, [[0, 1, False]]]]),
    ms.Renewed(3, 17.5),
    ms.Ready(3, 4),
    ms.Ready(3, 4, 17.5, {"pid": 1}),
    ms.Renew(3, 17.5),
    ms.Finished(3, 7, 1, ["bytes", 2, None, None], 2, b"ab", 0.5),
    ms.Finished(3, 7, 1, ["bytes", 1 << 40, None, None], 1 << 40, None, 0.5),
    ms.Failed(3, 7, 1, "lost-input", Failure("lost-input", "gone").to_wire(), False, [[1, 0], [2, 5]]),
    ms.Written(3, 7, 1, "1-0.0-7.h5", "x/0", "00ff", 2, ["bytes", 2, None, None]),
    ms.WriteFailed(3, 7, 1, "the disk is full", 28, False),
    ms.Progress(3, 7, 1, 0.25, "a quarter"),
    ms.Corrupt(3, 7, 1, "file.h5 is damaged"),
    ms.Hello(),
    ms.Over(3),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_round_trip(message: Any) -> None:
    assert ms.decode(ms.encode(7, message)) == (7, message)


def test_every_kind_is_tried() -> None:
    assert {type(message) for message in MESSAGES} == set(ms._KINDS)


def test_end_carries_the_error() -> None:
    error = Failure("exception", "ValueError: no", "File flow.py", pickle.dumps(ValueError("no"))).to_error("f")
    _, end = ms.decode(ms.encode(0, ms.End(1, "FAILED", ms.pack_error(error))))
    assert isinstance(end, ms.End)
    found = end.to_error()
    assert isinstance(found, TaskError)
    assert isinstance(found.__cause__, ValueError)
    assert "File flow.py" in str(found)
    assert ms.End(1, "CANCELED").to_error() is None


@pytest.mark.parametrize(
    ("kind", "error"), [("exception", TaskError), ("crash", TaskCrashedError), ("lost-input", ExoFlowError)]
)
def test_error_of_a_failure_names_the_task(kind: str, error: type[ExoFlowError]) -> None:
    found = Failure.from_wire(Failure(kind, "what happened").to_wire()).to_error("fit")
    assert type(found) is error
    assert "'fit'" in str(found)
    assert "what happened" in str(found)


@pytest.mark.parametrize("pickled", [b"", b"no pickle", pickle.dumps("no exception")])
def test_cause_that_cannot_be_rebuilt(pickled: bytes) -> None:
    found = Failure("exception", "Odd: no", "the text is there", pickled).to_error("f")
    assert found.__cause__ is None
    assert "the text is there" in str(found)
