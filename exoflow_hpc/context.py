"""What a running task can know about itself."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from .errors import ExoFlowError
from .settings import Settings

__all__ = ["TaskContext", "activate", "context"]


@dataclass
class TaskContext:
    """Identity of one attempt of one task."""

    workflow_id: str
    task_id: str
    #: raised when the effects of the task were rolled back, and only then
    incarnation: int
    #: number of this start of the task; no two starts of a task in one epoch share it
    attempt: int
    #: fencing token: systems outside can refuse a smaller one than they have seen
    epoch: int
    #: takes (fraction, text) to whoever shows it
    report: Callable[[float, str], None] | None = field(default=None, repr=False)
    #: what it has put and was given by reference, see `references`
    objects: Any = field(default=None, repr=False)
    #: seconds between two reports that are passed on
    progress_interval: float = Settings.progress_interval
    _reported: float = field(default=-math.inf, repr=False)

    @property
    def idempotency_key(self) -> str:
        """The same in every attempt and after every restart, another one after a rollback (R9)."""
        return f"{self.workflow_id}/{self.task_id}/{self.incarnation}"

    def progress(self, fraction: float, text: str = "") -> None:
        """Report that *fraction* (0 to 1) of the task is done. What comes too fast is dropped, but 1 never is.

        ValueError if *fraction* is not from 0 to 1.
        """
        fraction = float(fraction)
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"progress({fraction}) of task {self.task_id!r}: a fraction from 0 to 1 is needed")
        now = time.monotonic()
        if self.report is None or (fraction < 1.0 and now - self._reported < self.progress_interval):
            return
        self._reported = now
        self.report(fraction, _one_line(str(text)))


def _one_line(text: str) -> str:
    """Return *text* as a terminal and a message can take it: without line ends, escape sequences and lone surrogates."""
    return "".join(one if one.isprintable() else " " for one in text[:_MAX_TEXT])


#: characters of a text that go to the terminal
_MAX_TEXT = 200
_current: ContextVar[TaskContext | None] = ContextVar("exoflow_hpc_task", default=None)
#: contexts that are active in this process: threads that a task starts do not inherit the context variable
_active: list[TaskContext] = []


def context() -> TaskContext:
    """Return the context of the task that is running here; ExoFlowError outside of a task."""
    found = _current.get()
    if found is None and len(_active) == 1:
        found = _active[0]
    if found is None:
        raise ExoFlowError(
            "context() is known only inside a running task; a task called directly, f(x), is a plain function call"
        )
    return found


@contextlib.contextmanager
def activate(task_context: TaskContext) -> Iterator[TaskContext]:
    """Make *task_context* what `context()` returns inside the block; for the worker."""
    token = _current.set(task_context)
    _active.append(task_context)
    try:
        yield task_context
    finally:
        _active.remove(task_context)
        _current.reset(token)
