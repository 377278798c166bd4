"""Settings of exoflow_hpc, each of which ``EXOFLOW_<FIELD>`` in the environment overrides."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["RETENTIONS", "Settings", "storage_directory"]

RETENTIONS = ("all", "needed")


@dataclass(frozen=True)
class Settings:
    """Limits of the workflow layer. ``EXOFLOW_<FIELD>`` in the environment wins over what a program says."""

    #: worker processes of each rank; 0: its share of the node's cores
    workers: int = 0
    #: how often one task is started again because the rank that ran it was lost; apart from `max_retries`, since
    #: losing a rank is rarely the task's fault, but bounded, since a task that takes its node down would go on for ever
    max_rank_losses: int = 10
    #: how often a failed write of one output is tried again before the run stops as RESUMABLE
    max_commit_retries: int = 3
    #: seconds for which a rank may run external tasks without having heard of its controller: then it kills its workers, and the
    #: controller, if it has lost sight of the rank, waits that long before it runs them elsewhere or undoes them (R10b)
    lease: float = 10.0
    #: arrays and bytes of at least this many bytes are stored once in a spec, however many arguments they are
    shared_constant_size: int = 64 * 1024
    #: seconds between two progress reports of a task; those in between are dropped
    progress_interval: float = 0.2
    #: seconds before the first retry of a task that failed, at most: the wait is drawn from 0 to that, since tasks that
    #: have failed together would fail together again. Doubled with each further retry. 0: no waiting
    retry_backoff: float = 0.1
    #: seconds that a retry waits at most, however often the task has failed
    retry_backoff_max: float = 30.0
    #: what `gc` leaves of a workflow that has succeeded: ``"all"`` outputs of its tasks, or those that are ``"needed"``:
    #: its own output, and what could not be computed again as it was
    retention: str = "all"
    #: bytes from which arrays of a checkpoint go by direct I/O, past the page cache, where the file system can; 0: none
    direct_io: int = 64 << 20

    def __post_init__(self) -> None:
        if self.retention not in RETENTIONS:
            raise ValueError(f"Settings.retention = {self.retention!r} has to be {' or '.join(map(repr, RETENTIONS))}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str) and not 0 <= value < math.inf:
                raise ValueError(f"Settings.{field.name} = {value} has to be 0 or more, and finite")

    @classmethod
    def from_environment(cls, base: Settings | None = None) -> Settings:
        """Return *base* with what the environment says; ValueError names a variable that can't be read."""
        base = base or cls()
        changes: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            variable = f"EXOFLOW_{field.name.upper()}"
            text = os.environ.get(variable)
            if text is None:
                continue
            kind = type(getattr(base, field.name))
            try:
                changes[field.name] = kind(text)
            except ValueError:
                raise ValueError(f"{variable}={text!r} in the environment is not of type {kind.__name__}") from None
        return dataclasses.replace(base, **changes)


def storage_directory(explicit: str | os.PathLike[str] | None = None) -> Path:
    """Return the absolute storage directory: *explicit*, else ``EXOFLOW_STORAGE``, else ``./.exoflow``."""
    return Path(explicit or os.environ.get("EXOFLOW_STORAGE") or ".exoflow").expanduser().absolute()
