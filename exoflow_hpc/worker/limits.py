"""Limits of running tasks: when a timeout is over, and whose memory has to be looked at now. No I/O but of `/proc`.

The pool's I/O thread asks; nothing here needs the worker, which may be stopped, or blocked in C with all signals blocked.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from ..succession import shown
from .memory import describe_size, used_by_tree
from .protocol import Began
from .remote import RemoteWorker, TaskHandle

__all__ = ["Limits", "Overrun"]

#: seconds between looks at the memory of a task's processes
_MEMORY_PERIOD = 0.1
#: a look that takes long, at large processes with many children, takes at most this share of the time
_MEMORY_SHARE = 0.05
#: seconds in which a worker has to read its request: a timeout begins then, but one that is stopped never reads it
_BEGIN_TIMEOUT = 60.0


@dataclass(slots=True)
class _Watched:
    worker: RemoteWorker
    #: monotonic; None: no timeout
    ends: float | None
    #: bytes of the worker when the task began; None: it has not
    base: int | None = None
    #: monotonic time of the next look at its memory
    look: float = 0.0


@dataclass(frozen=True, slots=True)
class Overrun:
    """A task that is to be killed. kind: ``"timeout"`` or ``"memory"``; text: for people, as in "was killed, since ..."."""

    handle: TaskHandle
    worker: RemoteWorker
    kind: str
    text: str


class Limits:
    """The limits of the tasks that workers have now. `measure` may be called without the pool's lock, the rest with it."""

    def __init__(self) -> None:
        self._watched: dict[TaskHandle, _Watched] = {}

    def __bool__(self) -> bool:
        """Whether any task has a limit."""
        return bool(self._watched)

    def assigned(self, handle: TaskHandle, worker: RemoteWorker) -> None:
        """Take that *worker* was sent a task."""
        request = handle.request
        if request.timeout is not None or request.memory is not None:
            ends = None if request.timeout is None else time.monotonic() + _BEGIN_TIMEOUT + request.timeout
            self._watched[handle] = _Watched(worker, ends)

    def began(self, handle: TaskHandle, what: Began) -> None:
        """Take that the worker has begun with it: now the clock runs."""
        watched = self._watched.get(handle)
        if watched is not None:
            now = time.monotonic()
            watched.base, watched.look = what.memory, now + _MEMORY_PERIOD
            if handle.request.timeout is not None:
                watched.ends = now + handle.request.timeout

    def over(self, handle: TaskHandle) -> None:
        """Forget a task that has ended."""
        self._watched.pop(handle, None)

    def due(self) -> float | None:
        """Return the monotonic time at which something is due; None: nothing is."""
        times = [one.ends for one in self._watched.values() if one.ends is not None]
        times += [one.look for handle, one in self._watched.items() if _has_to_look(handle, one)]
        return min(times, default=None)

    def late(self) -> list[Overrun]:
        """Return the tasks whose timeout is over, each once."""
        now, found = time.monotonic(), []
        for handle, one in self._watched.items():
            if one.ends is not None and now >= one.ends:
                one.ends = None
                attempt, timeout = handle.request.identity.attempt, handle.request.timeout
                text = f"attempt {shown(attempt)} ran longer than its timeout of {timeout:g} s"
                found.append(Overrun(handle, one.worker, "timeout", text))
        return found

    def to_look_at(self) -> list[tuple[TaskHandle, RemoteWorker, int]]:
        """Return (task, worker, bytes at its begin) of those whose memory is to be measured now."""
        now = time.monotonic()
        return [
            (handle, one.worker, one.base or 0)
            for handle, one in self._watched.items()
            if _has_to_look(handle, one) and now >= one.look
        ]

    @staticmethod
    def measure(worker: RemoteWorker, base: int, limit: int) -> tuple[int, float]:
        """Return how many bytes above *base* the worker and all that it has started use, and the seconds this took."""
        before = time.monotonic()
        used = 0 if worker.pid is None else max(0, used_by_tree(worker.pid, base + limit) - base)
        return used, time.monotonic() - before

    def measured(self, handle: TaskHandle, used: int, seconds: float) -> Overrun | None:
        """Take what a task uses; return it if that is too much."""
        watched = self._watched.get(handle)
        limit = handle.request.memory
        if watched is None or limit is None:
            return None
        handle.memory_used = max(handle.memory_used, used)
        watched.look = time.monotonic() + max(_MEMORY_PERIOD, seconds / _MEMORY_SHARE)
        if used <= limit:
            return None
        attempt = handle.request.identity.attempt
        text = f"attempt {shown(attempt)} used {describe_size(used)} of memory, more than its limit memory={describe_size(limit)}"
        return Overrun(handle, watched.worker, "memory", text)


def _has_to_look(handle: TaskHandle, watched: _Watched) -> bool:
    return handle.request.memory is not None and watched.base is not None and not watched.worker.condemned
