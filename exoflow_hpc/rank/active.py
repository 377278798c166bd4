"""Whether somebody else runs a workflow."""

from __future__ import annotations

import time
from pathlib import Path

from exoflow_hpc import heartbeat
from exoflow_hpc.errors import WorkflowActiveError

__all__ = ["refuse_if_active"]


def refuse_if_active(directory: Path, workflow_id: str, patience: float = 0.0) -> None:
    """Raise WorkflowActiveError if another controller runs the workflow; looks for up to 3 s, and again for *patience* seconds."""
    deadline = time.monotonic() + patience
    while heartbeat.watch(directory / "heartbeat"):
        if time.monotonic() >= deadline:
            raise WorkflowActiveError(
                f"workflow {workflow_id!r} is active elsewhere: its controller's heartbeat in {directory} moves; wait for it, or cancel it"
            )
