"""What has to be undone before something may run again, and how far that is: a part of the scheduler, sans-IO.

Effects are undone one by one, in reverse order of their start (R5), each when every attempt that could still have it is over (R10b), and
the first one when the journal says of all outputs that they are void.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .scheduler_events import Rollback, Void
from .spec import TaskSpec

__all__ = ["Undoing"]


class Undoing:
    """Effects, void outputs, and tasks that are held back because of them. Costs are proportional to the external tasks there are."""

    def __init__(self, tasks: Sequence[TaskSpec], effects: Iterable[int], unseen: Iterable[tuple[int, int]]) -> None:
        self._tasks = tasks
        #: external tasks that were started and not undone since, in the order of their first start
        self.effects: dict[int, None] = dict.fromkeys(effects)
        #: external task → its attempts that are not known to be over
        self.unseen: dict[int, set[int]] = {}
        for task, attempt in unseen:
            self.unseen.setdefault(task, set()).add(attempt)
        #: effects that were undone
        self.undone = 0
        #: (task, attempt) of the rollback that is under way
        self.rolling: tuple[int, int] | None = None
        #: effects that have to be undone
        self._undo: set[int] = set()
        #: void outputs that the journal does not say so of yet
        self._voiding: set[int] = set()
        #: task → the latest attempt of it that is void, as all before it are
        self._void_up_to: dict[int, int] = {}
        #: tasks that the table holds back, once for each time
        self._held: list[int] = []

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to be undone."""
        return not (self._undo or self._voiding)

    def began(self, task: int, attempt: int) -> None:
        """An external task is dispatched."""
        self.effects.setdefault(task)
        self.unseen.setdefault(task, set()).add(attempt)

    def is_over(self, task: int, attempt: int) -> None:
        """An attempt has no effects any more that it does not have now."""
        attempts = self.unseen.get(task)
        if attempts is not None:
            attempts.discard(attempt)
            if not attempts:
                del self.unseen[task]

    # -- what is void

    def give_up(self, task: int, attempt: int) -> None:
        """What comes of *attempt*, or an earlier one, does not count any more."""
        self._void_up_to[task] = attempt

    def is_void(self, task: int, attempt: int) -> bool:
        """Whether that attempt was given up since what it was made from is lost."""
        return attempt <= self._void_up_to.get(task, -1)

    def void(self, task: int, attempt: int) -> Void:
        """Return what has the journal say so."""
        self._voiding.add(task)
        return Void(task, attempt)

    def voided(self, task: int) -> None:
        """The journal says so."""
        self._voiding.discard(task)

    # -- effects

    def undo(self, tasks: Iterable[int]) -> None:
        """Their effects have to be undone."""
        self._undo.update(tasks)

    def next(self) -> int | None:
        """Return the task whose effect is to be undone now; None if there is none, or something has to come first."""
        if not self._undo or self._voiding or self.rolling is not None:
            return None
        last = next(task for task in reversed(self.effects) if task in self._undo)
        return None if last in self.unseen else last

    def start(self, task: int, attempt: int, rank: int) -> Rollback:
        """Return what undoes the effect of a task."""
        self.rolling = (task, attempt)
        self.unseen.setdefault(task, set()).add(attempt)
        return Rollback(task, attempt, rank)

    def rolled_back(self) -> None:
        """The effect is undone, and the journal says so."""
        assert self.rolling is not None
        (task, attempt), self.rolling = self.rolling, None
        self.is_over(task, attempt)
        self._undo.discard(task)
        del self.effects[task]
        self.undone += 1

    def stopped(self) -> None:
        """The rollback ended without that: it is to be called again, once it is certainly over."""
        self.rolling = None

    # -- tasks that are held back

    def hold(self, tasks: Iterable[int]) -> None:
        """The table holds these back, until `free` returns them."""
        self._held.extend(tasks)

    def free(self) -> list[int]:
        """Return the tasks that need not be held back any more."""
        if not self._held or not self.is_idle:
            return []
        free = [task for task in self._held if task not in self.unseen]
        self._held = [task for task in self._held if task in self.unseen]
        return free
