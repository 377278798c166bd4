"""Whether somebody else runs a workflow."""

from __future__ import annotations

from pathlib import Path

from exoflow_hpc import heartbeat
from exoflow_hpc.errors import WorkflowActiveError

__all__ = ["refuse_if_active"]


def refuse_if_active(directory: Path, workflow_id: str) -> None:
    """Raise WorkflowActiveError if another controller runs the workflow; looks for up to 3 s."""
    if heartbeat.watch(directory / "heartbeat"):
        raise WorkflowActiveError(
            f"workflow {workflow_id!r} is active elsewhere: its controller's heartbeat in {directory} moves; wait for it, or cancel it"
        )
