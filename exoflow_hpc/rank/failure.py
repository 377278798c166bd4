"""Why a task failed, in a form that travels and that becomes the error which the user sees."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

from exoflow_hpc.errors import ExoFlowError, TaskCrashedError, TaskError

__all__ = ["Failure"]


@dataclass(frozen=True, slots=True)
class Failure:
    """A failure of one attempt. kind: ``"exception"``, ``"crash"``, ``"lost-input"``, ``"commit"``, ..."""

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
        if self.kind == "crash":
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
