"""How often what failed is tried again, and after what wait: a part of the scheduler, sans-IO."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from .settings import Settings
from .spec import TaskSpec

__all__ = ["Retries"]


class Retries:
    """Counts of one run. Each count of its own: a lost rank is not the task's fault, nor is a rollback's failure the task's.

    seed: the waits are drawn from it; the same seed, the same waits.
    """

    def __init__(self, tasks: Sequence[TaskSpec], settings: Settings, seed: str) -> None:
        self._tasks = tasks
        self._settings = settings
        self._seed = seed
        #: by task: attempts that failed by themselves, attempts that were lost, rollbacks and commits that failed
        self.failures: Counter[int] = Counter()
        self.losses: Counter[int] = Counter()
        self._rollbacks: Counter[int] = Counter()
        self._commits: Counter[int] = Counter()

    def after_failure(self, task: int) -> bool:
        """Count a failure of an attempt; return whether the task runs again."""
        if self.failures[task] >= self._tasks[task].max_retries:
            return False
        self.failures[task] += 1
        return True

    def after_loss(self, task: int) -> bool:
        """Count an attempt that was lost with its rank or input; return whether the task runs again."""
        self.losses[task] += 1
        return self.losses[task] <= self._settings.max_rank_losses

    def after_rollback(self, task: int, lost: bool) -> bool:
        """Count a rollback that ended without success; return whether it is called again."""
        if lost:
            return self.after_loss(task)
        self._rollbacks[task] += 1
        return self._rollbacks[task] <= self._tasks[task].max_retries

    def after_commit(self, task: int) -> bool:
        """Count a commit that failed; return whether it is tried again."""
        self._commits[task] += 1
        return self._commits[task] <= self._settings.max_commit_retries

    def wait(self, task: int, attempt: int) -> float:
        """Return the seconds until *attempt*, which failed, is followed by another: they grow, so that what was overloaded can recover."""
        first = self._tasks[task].retry_delay
        base = self._settings.retry_backoff if first is None else first
        # the exponent is bounded, or the float would overflow
        longest = min(base * 2.0 ** min(self.failures[task] - 1, 60), max(base, self._settings.retry_backoff_max))
        return random.Random(f"{self._seed}/{task}/{attempt}").uniform(0, longest) if longest > 0 else 0.0
