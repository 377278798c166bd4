"""Why a task failed, in a form that travels and that becomes the error which the user sees."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

from exoflow_hpc.errors import ExoFlowError, TaskCrashedError, TaskError, TaskTimeoutError
from exoflow_hpc.pickling import dumps
from exoflow_hpc.serialize import Plan, pack

__all__ = ["Failure", "pack_caught"]

#: bytes; a caught error is kept in the journal itself
_MAX_CAUGHT = 64 * 1024


@dataclass(frozen=True, slots=True)
class Failure:
    """A failure of one attempt. kind: ``"exception"``, ``"crash"``, ``"timeout"``, ``"memory"``, ``"lost-input"``, ``"commit"``, ..."""

    kind: str
    #: one line for people
    text: str
    #: the user's frames, formatted
    traceback: str = ""
    #: the exception, pickled; empty where that can't be done
    pickled: bytes = b""

    def to_wire(self) -> list[Any]:
        return [self.kind, self.text, self.traceback, self.pickled]

    @classmethod
    def from_wire(cls, wire: list[Any]) -> Failure:
        return cls(*wire)

    def to_error(self, task: str) -> ExoFlowError:
        """Return the error to raise for a workflow whose *task* failed like this; the task's own exception is its cause."""
        if self.kind == "exception":
            return TaskError(f"task {task!r} raised {self.text}", task, self.traceback, self._cause())
        if self.kind == "timeout":
            return TaskTimeoutError(f"task {task!r}: {self.text}", task)
        if self.kind in ("crash", "memory"):
            return TaskCrashedError(f"task {task!r}: {self.text}")
        return ExoFlowError(f"task {task!r}: {self.text}")

    def _cause(self) -> BaseException | None:
        if not self.pickled:
            return None
        try:
            cause = pickle.loads(self.pickled)
        except Exception:  # whatever a user's class raises when it is rebuilt: the text and the traceback say it all
            return None
        return cause if isinstance(cause, BaseException) else None


def pack_caught(failure: Failure, task: str) -> Plan:
    """Return the packed output of a task with ``catch_exceptions`` that has failed: (None, error), of at most some 64 KiB.

    The user's exception is not rebuilt here, which would run code of the user in the rank, and needs modules that only workers
    have: consumers rebuild it from its pickle, and its cause is a `TaskError` with text and traceback. Where they can't, and
    where it is too large, that is the error.
    """
    if failure.kind != "exception":
        return pack((None, failure.to_error(task)))
    error = TaskError(f"task {task!r} raised {_shorten(failure.text)}", task, _shorten(failure.traceback))
    if failure.pickled:
        plan = pack((None, _Caught(failure.pickled, dumps(error))))
        if plan.nbytes <= _MAX_CAUGHT:
            return plan
    return pack((None, error))


def _shorten(text: str, limit: int = 8 * 1024) -> str:
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]}\n  … {len(text) - limit} characters left out …\n{text[-limit // 2 :]}"


class _Caught:
    """Stands for an exception in a pickle, and is that exception when the pickle is read."""

    def __init__(self, pickled: bytes, otherwise: bytes) -> None:
        self._parts = (pickled, otherwise)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, self._parts


def _rebuild(pickled: bytes, otherwise: bytes) -> Any:
    with_traceback = pickle.loads(otherwise)
    try:
        error = pickle.loads(pickled)
        error.__cause__ = with_traceback  # a pickle has lost its own cause, and its traceback
    except Exception:  # its module isn't here, or its class doesn't bear it
        return with_traceback
    return error if isinstance(error, BaseException) else with_traceback
