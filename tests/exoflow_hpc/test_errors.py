from __future__ import annotations

import errno
import pickle

import pytest

from exoflow_hpc import errors


@pytest.mark.parametrize("name", [n for n in errors.__all__ if n not in ("TaskError",)])
def test_pickle_keeps_message(name: str) -> None:
    kind = getattr(errors, name)
    error = kind("what happened, what to do")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == "what happened, what to do"
    assert isinstance(error, errors.ExoFlowError)
    assert kind.__doc__


def test_storage_error_keeps_errno() -> None:
    copy = pickle.loads(pickle.dumps(errors.JournalBrokenError("full", errno.ENOSPC, "/x")))
    assert (copy.errno, copy.filename, str(copy)) == (errno.ENOSPC, "/x", "full")


def _raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


def test_task_error_keeps_traceback_and_cause() -> None:
    error = errors.TaskError.from_exception("count", _raised(KeyError("colour")))
    copy = pickle.loads(pickle.dumps(error))
    assert copy.task == "count"
    assert isinstance(copy.__cause__, KeyError)
    assert "in _raised" in copy.traceback_text
    assert "in _raised" in str(copy)
    assert "task count raised KeyError: 'colour'" in str(copy)


class Unpicklable(Exception):
    def __reduce__(self) -> str:
        raise RuntimeError("not me")


def test_task_error_outlives_a_cause_that_cant_be_pickled() -> None:
    copy = pickle.loads(pickle.dumps(errors.TaskError.from_exception("t", _raised(Unpicklable("boom")))))
    assert copy.__cause__ is None
    assert "Unpicklable: boom" in str(copy)
