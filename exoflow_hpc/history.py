"""What a workflow's journal amounts to: which tasks are committed, and how its last run ended."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exoflow_hpc import checkpoint, heartbeat, journal, records, serialize
from exoflow_hpc.errors import CanceledError, ExoFlowError
from exoflow_hpc.spec import WorkflowSpec

__all__ = [
    "Facts",
    "Status",
    "canceled",
    "check_output",
    "committed_tasks",
    "error_of",
    "facts_of",
    "last_end",
    "load_output",
    "status_of",
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


@dataclass
class Facts:
    """What the journal says of the tasks of a workflow, by index of the task."""

    #: committed and not void: the record that stands
    committed: dict[int, records.TaskCommitted] = field(default_factory=dict)
    #: external tasks that were started and not rolled back since, in the order of their first start → the last start
    effects: dict[int, records.TaskStarted] = field(default_factory=dict)
    #: last output of those in `effects`, void or not, for their rollbacks
    results: dict[int, records.TaskCommitted] = field(default_factory=dict)
    #: how often each was rolled back, where that is not 0
    incarnations: dict[int, int] = field(default_factory=dict)
    #: highest attempt that is known
    attempts: dict[int, int] = field(default_factory=dict)
    #: taken to be deterministic, but gave two outputs
    deviant: set[int] = field(default_factory=set)
    #: checksums of outputs that something saw that stands, or that were committed themselves, and are not now: the same is to come again
    seen: dict[int, str] = field(default_factory=dict)


def facts_of(spec: WorkflowSpec, history: Iterable[dict[str, Any]]) -> Facts:
    """Return what a history says. The first record of a task counts, as consumers may have seen that output, unless it is void."""
    facts = Facts()
    for wire in history:
        record = records.decode(wire)
        if isinstance(record, records.TaskCommitted):
            _commit(facts, spec, record)
        elif isinstance(record, records.TaskVoided):
            _void(facts, spec, record)
        elif isinstance(record, records.TaskStarted):
            task = spec.index(record.task_id)
            facts.effects[task] = record
            facts.attempts[task] = max(record.attempt, facts.attempts.get(task, -1))
        elif isinstance(record, records.TaskRolledBack):
            task = spec.index(record.task_id)
            facts.incarnations[task] = record.incarnation
            facts.effects.pop(task, None)
            facts.results.pop(task, None)
        elif isinstance(record, records.TaskDeviated):
            facts.deviant.add(spec.index(record.task_id))
    return facts


def _void(facts: Facts, spec: WorkflowSpec, record: records.TaskVoided) -> None:
    task = spec.index(record.task_id)
    known = facts.committed.pop(task, None)
    if known is None:
        return
    if not record.lost:
        facts.seen[task] = known.checksum
        return
    # whoever else saw those is void, too, or will see the same again
    for name, _ in known.consumed:
        facts.seen.pop(spec.index(name), None)


def _commit(facts: Facts, spec: WorkflowSpec, record: records.TaskCommitted) -> None:
    task = spec.index(record.task_id)
    facts.attempts[task] = max(record.attempt, facts.attempts.get(task, -1))
    if task in facts.committed:
        return
    facts.committed[task] = record
    facts.seen.pop(task, None)
    if task in facts.effects:
        facts.results[task] = record
    for name, checksum in record.consumed:
        source = spec.index(name)
        if source not in facts.committed:
            facts.seen[source] = checksum


def committed_tasks(spec: WorkflowSpec, history: Iterable[dict[str, Any]]) -> dict[int, records.TaskCommitted]:
    """Return index of task → its record, of those that are committed and not void."""
    return facts_of(spec, history).committed


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
