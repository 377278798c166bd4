"""Exit codes of the command line, of ranks too."""

from __future__ import annotations

from exoflow_hpc.history import Status
from exoflow_hpc.outcome import REFUSED

__all__ = ["ALL", "BAD_USAGE", "FAILED", "RESUMABLE", "SUCCESSFUL", "exit_code"]

ALL = SUCCESSFUL, FAILED, BAD_USAGE, RESUMABLE = range(4)


def exit_code(status: str) -> int:
    """Return the exit code for the status that a run ended with."""
    return {Status.SUCCESSFUL: SUCCESSFUL, Status.RESUMABLE: RESUMABLE, REFUSED: BAD_USAGE}.get(status, FAILED)
