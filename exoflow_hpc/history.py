"""What a workflow's journal amounts to: which tasks are committed, and how its last run ended."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from exoflow_hpc import checkpoint, heartbeat, journal, records, serialize
from exoflow_hpc.errors import CanceledError, ExoFlowError
from exoflow_hpc.spec import WorkflowSpec

__all__ = [
    "Status",
    "canceled",
    "check_output",
    "committed_tasks",
    "error_of",
    "last_end",
    "load_output",
    "status_of",
    "voided_tasks",
]


class Status:
    """States of a workflow. PENDING and RUNNING have a live controller; RESUMABLE was interrupted; the others are final."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    SUCCESSFUL = "SUCCESSFUL"
    FAILED = "FAILED"
    CANCELED = "CANCELED"
    RESUMABLE = "RESUMABLE"
    FINAL = frozenset({SUCCESSFUL, FAILED, CANCELED})
    ALL = (PENDING, RUNNING, SUCCESSFUL, FAILED, CANCELED, RESUMABLE)


def committed_tasks(spec: WorkflowSpec, history: Iterable[dict[str, Any]]) -> dict[int, records.TaskCommitted]:
    """Return index of task → its record. The first record of a task counts, as consumers may have seen that output, unless it is void."""
    return _standing(spec, history)[0]


def voided_tasks(spec: WorkflowSpec, history: Iterable[dict[str, Any]]) -> dict[int, str]:
    """Return index of task → checksum of its last output, for tasks that were committed and are not any more."""
    return _standing(spec, history)[1]


def _standing(
    spec: WorkflowSpec, history: Iterable[dict[str, Any]]
) -> tuple[dict[int, records.TaskCommitted], dict[int, str]]:
    committed: dict[int, records.TaskCommitted] = {}
    voided: dict[int, str] = {}
    for wire in history:
        record = records.decode(wire)
        if isinstance(record, records.TaskCommitted):
            task = spec.index(record.task_id)
            committed.setdefault(task, record)
            voided.pop(task, None)
        elif isinstance(record, records.TaskVoided):
            task = spec.index(record.task_id)
            known = committed.pop(task, None)
            if known is not None:
                voided[task] = known.checksum
    return committed, voided


def last_end(history: Iterable[dict[str, Any]]) -> records.WorkflowFinished | None:
    """Return how the last run that came to an end ended; None if one was started after it, or none has ended."""
    end: records.WorkflowFinished | None = None
    for wire in history:
        record = records.decode(wire)
        if isinstance(record, records.WorkflowFinished):
            end = record
        elif isinstance(record, records.WorkflowStarted):
            end = None
    return end


def status_of(workflow_dir: Path, *, watch: bool = True) -> tuple[str, journal.History]:
    """Return status and history of a workflow. *watch*: look at the heartbeat, for up to 3 s, to tell RUNNING from RESUMABLE."""
    history = journal.read(workflow_dir)
    end = last_end(history.records)
    if end is not None:
        return end.status, history
    active = watch and heartbeat.watch(workflow_dir / "heartbeat")
    started = any(wire.get("type") == records.WorkflowStarted.type for wire in history.records)
    if active:
        return (Status.RUNNING if started else Status.PENDING), history
    return Status.RESUMABLE, history


def check_output(workflow_dir: Path, record: records.TaskCommitted) -> None:
    """Raise CorruptCheckpointError if a committed output is not what was written. Runs no user code."""
    if isinstance(record.location, records.InCheckpoint):
        checkpoint.read(workflow_dir, record.location.file, record.location.entry, record.checksum)


def load_output(workflow_dir: Path, record: records.TaskCommitted) -> Any:
    """Return the value of a committed output. CorruptCheckpointError, StorageError."""
    place = record.location
    if isinstance(place, records.Inline):
        from hoplite_mpi.meta import Meta

        return serialize.unpack(Meta.from_wire(record.meta), place.data)
    meta, data = checkpoint.read(workflow_dir, place.file, place.entry, record.checksum)
    return serialize.unpack(meta, data)


def canceled(workflow_id: str) -> CanceledError:
    """Return the error for a workflow that was canceled: that is for good."""
    return CanceledError(f"workflow {workflow_id!r} was canceled: delete it, or run it anew under another id")


def error_of(end: records.WorkflowFinished) -> ExoFlowError:
    """Return the error that a workflow ended with."""
    try:
        error = pickle.loads(end.error) if end.error else None
    except Exception:  # its class may not be importable here; the text is always there
        error = None
    return error if isinstance(error, ExoFlowError) else ExoFlowError(end.message or f"the workflow is {end.status}")
