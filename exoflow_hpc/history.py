"""What a workflow's journal amounts to: which tasks are committed, and how its last run ended."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from exoflow_hpc import checkpoint, heartbeat, journal, records, serialize
from exoflow_hpc.errors import CanceledError, CorruptCheckpointError, ExoFlowError
from exoflow_hpc.expansion import expand
from exoflow_hpc.outcome import Ended
from exoflow_hpc.references import StoredObjects, resolving
from exoflow_hpc.semantics import descendants
from exoflow_hpc.spec import SEPARATOR, WorkflowSpec
from exoflow_hpc.storage import Storage

__all__ = [
    "Facts",
    "Ran",
    "Status",
    "canceled",
    "check_bytes",
    "check_output",
    "check_reference",
    "committed_tasks",
    "continued",
    "ended",
    "error_of",
    "expanded",
    "expired_tasks",
    "facts_by_name",
    "facts_of",
    "kept_files",
    "last_end",
    "last_run",
    "load_output",
    "load_spec",
    "ran_in",
    "standing_outputs",
    "status_of",
    "without_damaged",
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
class Ran:
    """What a run has done, for display."""

    tasks: set[str] = field(default_factory=set)
    rolled_back: int = 0
    #: seconds since 1970, 0: not known
    began: float = 0.0


K = TypeVar("K")
V = TypeVar("V")


@dataclass
class Facts(Generic[K]):
    """What the journal says of the tasks of a workflow, by index of the task, or by name."""

    #: committed and not void: the record that stands
    committed: dict[K, records.TaskCommitted] = field(default_factory=dict)
    #: the last such record of those that were committed and are not any more: void, or expired
    gone: dict[K, records.TaskCommitted] = field(default_factory=dict)
    #: those of them whose outputs retention has removed
    expired: set[K] = field(default_factory=set)
    #: external tasks that were started and not rolled back since, in the order of their first start → the last start
    effects: dict[K, records.TaskStarted] = field(default_factory=dict)
    #: those of them whose rollback was started → the last start of it
    rollbacks: dict[K, records.RollbackStarted] = field(default_factory=dict)
    #: external tasks that were undone, and not committed since: they have to come again, and that has to be known for good
    owed: set[K] = field(default_factory=set)
    #: last output of those in `effects`, void or not, for their rollbacks
    results: dict[K, records.TaskCommitted] = field(default_factory=dict)
    #: how often each was rolled back, where that is not 0
    incarnations: dict[K, int] = field(default_factory=dict)
    #: highest attempt that is known
    attempts: dict[K, int] = field(default_factory=dict)
    #: taken to be deterministic, but gave two outputs
    deviant: set[K] = field(default_factory=set)
    #: checksums of outputs that something saw that stands, or that were committed themselves, and are not now: the same is to come again
    seen: dict[K, str] = field(default_factory=dict)
    #: what tasks continue with, committed or void: until they are committed anew, it says what the workflow's tasks are
    continued: dict[K, records.TaskCommitted] = field(default_factory=dict)


def facts_by_name(history: Iterable[dict[str, Any]], spec: WorkflowSpec | None = None) -> Facts[str]:
    """Return what a history says. The first record of a task counts, as consumers may have seen that output, unless it is void.

    spec: without it, `Facts.seen` may have outputs whose inputs came out another one since.
    """
    facts = Facts[str]()
    for wire in history:
        record = records.decode(wire)
        if isinstance(record, records.TaskCommitted):
            _commit(facts, record, spec)
        elif isinstance(record, (records.TaskVoided, records.TaskExpired)):
            _void(facts, record)
        elif isinstance(record, records.TaskStarted):
            facts.effects[record.task_id] = record
            _take_attempt(facts, record.task_id, record.attempt)
            _see(facts, record.consumed)
        elif isinstance(record, records.RollbackStarted):
            facts.rollbacks[record.task_id] = record
            _take_attempt(facts, record.task_id, record.attempt)
        elif isinstance(record, records.TaskRolledBack):
            _roll_back(facts, record)
        elif isinstance(record, records.TaskDeviated):
            facts.deviant.add(record.task_id)
    return facts


def _void(facts: Facts[str], record: records.TaskVoided | records.TaskExpired) -> None:
    task = record.task_id
    if (
        isinstance(record, records.TaskVoided) and not record.lost
    ):  # it is damaged: nobody can know what it was continued with
        facts.continued.pop(task, None)
    known = facts.committed.pop(task, None)
    if known is None:
        return
    facts.gone[task] = known
    if isinstance(record, records.TaskExpired):
        facts.expired.add(task)
    elif record.lost:
        # whoever else saw those is void, too, or will see the same again
        for name, _ in known.consumed:
            facts.seen.pop(name, None)
        return
    facts.seen[task] = known.seen_as
    if isinstance(record, records.TaskVoided):  # it is damaged: nobody can be given it
        facts.results.pop(task, None)


def _roll_back(facts: Facts[str], record: records.TaskRolledBack) -> None:
    task = record.task_id
    facts.incarnations[task] = record.incarnation
    facts.owed.add(task)
    start = facts.effects.pop(task, None)
    if start is not None:  # what it has seen may come out another one
        for name, _ in start.consumed:
            facts.seen.pop(name, None)
    facts.results.pop(task, None)
    facts.rollbacks.pop(task, None)


def _take_attempt(facts: Facts[str], task: str, attempt: int) -> None:
    facts.attempts[task] = max(attempt, facts.attempts.get(task, -1))


def _see(facts: Facts[str], consumed: Iterable[Any]) -> None:
    for source, checksum in consumed:
        if source not in facts.committed:
            facts.seen[source] = checksum


def _commit(facts: Facts[str], record: records.TaskCommitted, spec: WorkflowSpec | None) -> None:
    task = record.task_id
    _take_attempt(facts, task, record.attempt)
    for one in record.references:  # another object must never have the name of one that is referred to
        _take_attempt(facts, one.task, one.attempt)
    if task in facts.committed:
        return
    facts.owed.discard(task)
    here = spec.find(task) if spec is not None and facts.seen else None
    if spec is not None and here is not None and (task in facts.deviant or not spec.tasks[here].deterministic):
        # what was computed from the value before this one is void, and may come out another one
        for index in descendants(spec.tasks, [here]):
            facts.seen.pop(spec.tasks[index].name, None)
    facts.committed[task] = record
    facts.gone.pop(task, None)
    facts.expired.discard(task)
    facts.seen.pop(task, None)
    if record.continued:
        facts.continued[task] = record
    else:
        facts.continued.pop(task, None)
    if task in facts.effects:
        facts.results[task] = record
    _see(facts, record.consumed)


def facts_of(spec: WorkflowSpec, history: Iterable[dict[str, Any]]) -> Facts[int]:
    """Return the same by index of the task, without tasks that a voided continuation had brought and the last one has not."""
    named = facts_by_name(history, spec)

    def index(table: dict[str, V]) -> dict[int, V]:
        found = ((spec.find(task), value) for task, value in table.items())
        return {task: value for task, value in found if task is not None}

    def indices(names: set[str]) -> set[int]:
        return set(index(dict.fromkeys(names)))

    return Facts(
        committed=index(named.committed),
        gone=index(named.gone),
        expired=indices(named.expired),
        effects=index(named.effects),
        rollbacks=index(named.rollbacks),
        owed=indices(named.owed),
        results=index(named.results),
        incarnations=index(named.incarnations),
        attempts=index(named.attempts),
        deviant=indices(named.deviant),
        seen=index(named.seen),
        continued=index(named.continued),
    )


def committed_tasks(spec: WorkflowSpec, history: Iterable[dict[str, Any]]) -> dict[int, records.TaskCommitted]:
    """Return index of task → its record, of those that are committed and not void."""
    return facts_of(spec, history).committed


def expired_tasks(spec: WorkflowSpec, history: Iterable[dict[str, Any]]) -> set[int]:
    """Return the tasks that were committed and whose outputs retention has removed since."""
    return facts_of(spec, history).expired


def continued(history: Iterable[dict[str, Any]]) -> list[list[Any]]:
    """Return what tasks continue with, as in `messages.Begin`."""
    known = list(history)
    if not any(wire.get("continued") for wire in known):
        return []
    found = facts_by_name(known).continued
    return [[task, one.location.to_wire(), one.meta, one.checksum] for task, one in found.items()]


def expanded(base: WorkflowSpec, workflow_dir: Path, continued: Iterable[list[Any]]) -> WorkflowSpec:
    """Return the spec of a workflow with what its tasks continue with (`continued`). CorruptCheckpointError, StorageError."""
    return expand(base, {task: _continuation(workflow_dir, task, *where) for task, *where in continued})


def without_damaged(workflow_dir: Path, history: Iterable[dict[str, Any]]) -> list[records.TaskVoided]:
    """Return the records by which a workflow can go on without those continuations that are damaged: their tasks run again.

    CorruptCheckpointError: there are effects of what one has continued with, which only that could undo. StorageError.
    """
    known = list(history)
    facts, found = facts_by_name(known), list[records.TaskVoided]()
    for task, *where in continued(known):
        try:
            _continuation(workflow_dir, task, *where)
        except CorruptCheckpointError as error:
            below = task + SEPARATOR
            effects = ", ".join(name for name in facts.effects if name.startswith(below))
            if effects:
                raise CorruptCheckpointError(
                    f"{error}; it is what task {task} has continued with, and the effects of {effects} could not be undone without it: "
                    "restore the file from a backup"
                ) from error
            found.append(records.TaskVoided(task, facts.continued[task].attempt, str(error)))
            gone = {one.task_id for one in found}
            found += [
                records.TaskVoided(name, one.attempt, "what it is of is damaged", lost=True)
                for name, one in facts.committed.items()
                if name.startswith(below) and name not in gone
            ]
    return found


def load_spec(storage: Storage, workflow_id: str, history: Iterable[dict[str, Any]]) -> WorkflowSpec:
    """Return the spec of a workflow with what its tasks continue with by now. CorruptCheckpointError, StorageError."""
    directory = storage.directory(workflow_id)
    base = WorkflowSpec.from_bytes(storage.spec(workflow_id), str(directory / "spec"))
    return expanded(base, directory, continued(history))


def _continuation(
    workflow_dir: Path, task: str, location: dict[str, Any], wire: list[Any], checksum: str
) -> WorkflowSpec:
    from hoplite_mpi.meta import Meta

    place = records.location_of(location)
    if isinstance(place, records.Inline):
        meta, data = Meta.from_wire(wire), memoryview(place.data)
    else:
        meta, data = checkpoint.read(workflow_dir, place.file, place.entry, checksum)
    return WorkflowSpec.from_bytes(serialize.unpack(meta, data), f"what task {task} continues with")


def standing_outputs(history: Iterable[dict[str, Any]]) -> dict[str, records.TaskCommitted]:
    """Return name of task → its record: the same as `committed_tasks`, without a spec."""
    return facts_by_name(history).committed


def kept_files(history: Iterable[dict[str, Any]]) -> set[str]:
    """Return the checkpoint files that rollbacks may yet be given: inputs and outputs of effects that were not undone, void or not."""
    facts = facts_by_name(history)
    kept = {file for record in facts.results.values() for file in record.files}
    for start in facts.effects.values():
        for wire in start.inputs:
            place, _, _, references = records.kept_input(wire)
            kept.update(one.location.file for one in references)
            if isinstance(place, records.InCheckpoint):
                kept.add(place.file)
    return kept


def ran_in(history: Iterable[dict[str, Any]], run: str) -> Ran:
    """Return what controllers have done in a run (`WorkflowStarted.run`), as far as their records say it."""
    ran = Ran()
    inside = False
    for wire in history:
        record = records.decode(wire)
        if isinstance(record, records.WorkflowStarted):
            inside = record.run == run
            if inside and not ran.began:
                ran.began = record.time
        elif inside and isinstance(record, (records.TaskStarted, records.TaskCommitted)):
            ran.tasks.add(record.task_id)
        elif inside and isinstance(record, records.TaskRolledBack):
            ran.rolled_back += 1
    return ran


def last_run(history: Iterable[dict[str, Any]]) -> str:
    """Return the run (`WorkflowStarted.run`) that was begun last; empty: none was."""
    started = [wire for wire in history if wire.get("type") == records.WorkflowStarted.type]
    record = records.decode(started[-1]) if started else None
    return record.run if isinstance(record, records.WorkflowStarted) else ""


def last_end(history: Iterable[dict[str, Any]]) -> records.WorkflowFinished | None:
    """Return how the last run that came to an end ended; None if one was started after it, or none has ended."""
    end: records.WorkflowFinished | None = None
    for wire in history:
        if wire.get("type") == records.TaskCommitted.type:
            continue  # nearly all of them are
        record = records.decode(wire)
        if isinstance(record, records.WorkflowFinished):
            end = record
        elif isinstance(record, records.WorkflowStarted):
            end = None
    return end


def ended(workflow_dir: Path, workflow_id: str, before: str | None = None) -> Ended | None:
    """Return how the last run of a workflow ended; None if it has not, or was begun before this one or with it: `last_run` was *before*."""
    past = journal.read(workflow_dir).records
    end = last_end(past)
    if end is None or (before is not None and last_run(past) == before):
        return None
    error = error_of(end) if end.status == Status.FAILED else None
    if end.status == Status.CANCELED:
        error = canceled(workflow_id)
    return Ended(workflow_id, end.status, error, directory=str(workflow_dir))


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
    """CorruptCheckpointError if a committed output, or what it refers to, is not what was written. Runs no user code. StorageError."""
    check_bytes(workflow_dir, record)
    for one in record.references:
        check_reference(workflow_dir, one)


def check_bytes(workflow_dir: Path, record: records.TaskCommitted) -> None:
    """Do the same for the output's own bytes alone."""
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


def check_reference(workflow_dir: Path, one: records.Reference) -> None:
    """Do the same for an object that an output refers to."""
    checkpoint.read(workflow_dir, one.location.file, one.location.entry, one.checksum)


def load_output(workflow_dir: Path, record: records.TaskCommitted) -> Any:
    """Return the value of a committed output; what it refers to is read when it is asked for. CorruptCheckpointError, StorageError."""
    place = record.location
    if isinstance(place, records.Inline):
        from hoplite_mpi.meta import Meta

        meta, data = Meta.from_wire(record.meta), memoryview(place.data)
    else:
        meta, data = checkpoint.read(workflow_dir, place.file, place.entry, record.checksum)
    if not record.references:
        return serialize.unpack(meta, data)
    with resolving(StoredObjects(workflow_dir, record.references).refs()):
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
