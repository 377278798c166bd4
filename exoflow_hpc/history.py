"""What a workflow's journal amounts to: which tasks are committed, and how its last run ended."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from exoflow_hpc import checkpoint, heartbeat, journal, records, serialize
from exoflow_hpc.errors import CanceledError, CorruptCheckpointError, ExoFlowError
from exoflow_hpc.spec import WorkflowSpec

__all__ = [
    "Status",
    "canceled",
    "check_output",
    "committed_tasks",
    "error_of",
    "expired_tasks",
    "last_end",
    "load_output",
    "standing_outputs",
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
    return {spec.index(name): record for name, record in standing_outputs(history).items()}


def voided_tasks(spec: WorkflowSpec, history: Iterable[dict[str, Any]]) -> dict[int, str]:
    """Return index of task → checksum of its last output, for tasks that were committed and are not any more: void or expired."""
    return {spec.index(name): record.checksum for name, record in _tally(history)[1].items()}


def expired_tasks(spec: WorkflowSpec, history: Iterable[dict[str, Any]]) -> set[int]:
    """Return the tasks that were committed and whose outputs retention has removed since."""
    return {spec.index(name) for name in _tally(history)[2]}


def standing_outputs(history: Iterable[dict[str, Any]]) -> dict[str, records.TaskCommitted]:
    """Return name of task → its record: the same as `committed_tasks`, without a spec."""
    return _tally(history)[0]


def _tally(
    history: Iterable[dict[str, Any]],
) -> tuple[dict[str, records.TaskCommitted], dict[str, records.TaskCommitted], set[str]]:
    """Return, by name of task, the records that count, the last ones of those that don't any more, and who is expired."""
    committed: dict[str, records.TaskCommitted] = {}
    gone: dict[str, records.TaskCommitted] = {}
    expired: set[str] = set()
    for wire in history:
        record = records.decode(wire)
        if isinstance(record, records.TaskCommitted):
            committed.setdefault(record.task_id, record)
            gone.pop(record.task_id, None)
            expired.discard(record.task_id)
        elif isinstance(record, (records.TaskVoided, records.TaskExpired)):
            known = committed.pop(record.task_id, None)
            if known is not None:
                gone[record.task_id] = known
                if isinstance(record, records.TaskExpired):
                    expired.add(record.task_id)
    return committed, gone, expired


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
    """Raise CorruptCheckpointError if a committed output is not what was written. Runs no user code. StorageError."""
    place = record.location
    if isinstance(place, records.InCheckpoint):
        checkpoint.read(workflow_dir, place.file, place.entry, record.checksum)
        return
    from hoplite_mpi.meta import Meta

    found = serialize.checksum(Meta.from_wire(record.meta), place.data)
    if found != record.checksum:
        raise CorruptCheckpointError(
            f"the output of task {record.task_id} in the journal has the checksum {found}, not {record.checksum}"
        )


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
