"""How a run of a workflow ended."""

from __future__ import annotations

from dataclasses import dataclass

from exoflow_hpc.errors import ExoFlowError
from exoflow_hpc.scheduler_events import Counters

__all__ = ["REFUSED", "Ended", "Outcome"]

#: status of a run that was not begun; no state of a workflow
REFUSED = "REFUSED"


@dataclass(frozen=True)
class Outcome:
    """What the controller knows at the end of a run."""

    status: str
    error: ExoFlowError | None
    counters: Counters
    #: processes that were ranks of the run, replacements included
    ranks_started: int
    ranks_lost: int
    ranks_rejoined: int
    seconds: float


@dataclass(frozen=True)
class Ended:
    """How a run ended, as each rank knows it. status: a state of the workflow, or `REFUSED`."""

    workflow_id: str
    status: str
    error: ExoFlowError | None
    #: known to the head only
    outcome: Outcome | None = None
    #: of the workflow, empty if it was not begun
    directory: str = ""
