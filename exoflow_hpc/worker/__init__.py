"""Worker processes: where the tasks of a rank run, so that a task that crashes takes no rank with it."""

from __future__ import annotations

from .pool import PoolStatistics, TaskHandle, WorkerPool
from .protocol import (
    ArenaInput,
    InlineInput,
    Progress,
    TaskCancelled,
    TaskCrashed,
    TaskDone,
    TaskFailed,
    TaskIdentity,
    TaskRequest,
    TaskResult,
)
from .spawner import Spawner

__all__ = [
    "ArenaInput",
    "InlineInput",
    "PoolStatistics",
    "Progress",
    "Spawner",
    "TaskCancelled",
    "TaskCrashed",
    "TaskDone",
    "TaskFailed",
    "TaskHandle",
    "TaskIdentity",
    "TaskRequest",
    "TaskResult",
    "WorkerPool",
]
