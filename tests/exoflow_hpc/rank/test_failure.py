"""Failures as what a user catches and as what a task returns."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from exoflow_hpc.errors import TaskCrashedError, TaskError, TaskTimeoutError
from exoflow_hpc.rank.failure import Failure, pack_caught
from exoflow_hpc.serialize import unpack
from exoflow_hpc.worker.failure import describe


def failure_of(error: BaseException) -> Failure:
    """Return the failure as an agent makes it."""
    failed = describe(error, "call")
    return Failure("exception", f"{failed.type_names[0]}: {failed.message}", failed.traceback, failed.pickled or b"")


def caught(failure: Failure) -> Any:
    plan = pack_caught(failure, "f")
    assert plan.nbytes < 100_000
    value, error = unpack(plan.meta, plan.to_bytes())
    assert value is None
    return error


def test_kinds() -> None:
    error = Failure("timeout", "worker pid 1 was killed: attempt 2 ran longer than its timeout of 3 s").to_error("f")
    assert type(error) is TaskTimeoutError
    assert error.task == "f"
    assert str(error) == "task 'f': worker pid 1 was killed: attempt 2 ran longer than its timeout of 3 s"
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.task) == (TaskTimeoutError, str(error), "f")
    assert type(Failure("memory", "too much").to_error("f")) is TaskCrashedError


@pytest.mark.parametrize("kind", [TaskTimeoutError, TaskCrashedError])
def test_caught_end_of_a_worker(kind: type[Exception]) -> None:
    error = caught(Failure("timeout" if kind is TaskTimeoutError else "crash", "why"))
    assert type(error) is kind
    assert str(error) == "task 'f': why"


def test_caught_exception_is_the_users_with_the_traceback_as_its_cause() -> None:
    try:
        {}["key"]
    except KeyError as raised:
        failure = failure_of(raised)
    error = caught(failure)
    assert type(error) is KeyError and error.args == ("key",)
    assert isinstance(error.__cause__, TaskError)
    assert '{}["key"]' in error.__cause__.traceback_text


class Unpicklable(Exception):
    def __reduce__(self) -> Any:
        raise RuntimeError("no")


class Rude(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


def _explode() -> None:
    raise RuntimeError("no")


class Explosive(Exception):
    """Is pickled well and can't be read."""

    def __reduce__(self) -> Any:
        return _explode, ()


class Liar(Exception):
    def __reduce__(self) -> Any:
        return dict, ()


@pytest.mark.parametrize("error", [Unpicklable(), Explosive(), Liar(), ValueError(lambda: None, "x" * 10_000_000)])
def test_caught_exception_that_does_not_travel_is_a_task_error(error: Exception) -> None:
    found = caught(failure_of(error))
    assert type(found) is TaskError
    assert f"task 'f' raised {type(error).__module__}.{type(error).__qualname__}" in str(found)


def test_caught_exception_whose_str_raises() -> None:
    assert type(caught(failure_of(Rude()))).__name__ == "Rude"


def test_pickle_that_can_be_read_by_nobody_here() -> None:
    """As of a class in a module that only workers have; that is seen by the consumer, and not by the rank."""
    failure = Failure("exception", "mod.Error: no", "File flow.py", b"cmod_that_is_not_here\nError\n.")
    error = caught(failure)
    assert type(error) is TaskError
    assert "task 'f' raised mod.Error: no" in str(error) and "File flow.py" in str(error)


def test_making_the_output_runs_nothing_of_the_user(capfd: pytest.CaptureFixture[str]) -> None:
    pack_caught(Failure("exception", "no", "", b"cos\nsystem\n(S'echo ran'\ntR."), "f")
    assert capfd.readouterr().out == ""


def test_what_is_read_can_be_packed_again() -> None:
    error = caught(failure_of(ValueError("x")))
    assert pickle.loads(pickle.dumps(error)).args == ("x",)
