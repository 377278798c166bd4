"""Every checksum of a workflow: the spec, each journal file with its seals, each committed output."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from exoflow_hpc import history, journal, records
from exoflow_hpc.errors import CorruptCheckpointError, StorageError
from exoflow_hpc.spec import WorkflowSpec
from exoflow_hpc.storage import Storage

__all__ = ["Finding", "Report", "examine"]


@dataclass(frozen=True)
class Finding:
    """Something that is not what was written, or can't be read."""

    #: what is wrong, for people
    problem: str
    file: str
    #: whose output it is; None: it is the workflow's spec or journal
    task: str | None = None
    #: entry of the checkpoint file; None: the output is in the journal itself
    entry: str | None = None


@dataclass
class Report:
    """What was looked at, and what was wrong with it."""

    findings: list[Finding] = field(default_factory=list)
    journal_files: int = 0
    outputs: int = 0
    #: objects that they refer to
    references: int = 0
    #: of both
    nbytes: int = 0
    #: ends of journal files that are no whole records: what a kill leaves there, so no finding, but damage to the last
    #: record looks the same
    torn: list[journal.TornTail] = field(default_factory=list)


def examine(storage: Storage, workflow_id: str) -> Report:
    """Check a workflow, also while it runs: nothing is changed, and nobody disturbed; blocks on storage.

    Outputs that were voided are known to be no good, and those that retention removed are meant to be gone: neither is a
    finding. WorkflowNotFoundError; UnknownRecordError: a newer version wrote it; StorageError: nothing can be read.
    """
    directory = storage.directory(workflow_id)
    report = Report()
    try:
        WorkflowSpec.from_bytes(storage.spec(workflow_id), str(directory / "spec"))
    except (CorruptCheckpointError, StorageError) as error:
        report.findings.append(Finding(str(error), str(directory / "spec")))
    past, problems = journal.inspect(directory)
    report.journal_files = len(past.seals)
    if past.torn:  # still there at a second look, so not a record that is being written
        report.torn = [tail for tail in journal.inspect(directory)[0].torn if tail in past.torn]
    report.findings.extend(Finding(f"{path} {text}", path) for path, text in problems)
    # by name: a damaged spec keeps nobody from looking at the outputs
    checked: set[tuple[str, str]] = set()
    for record in history.standing_outputs(past.records).values():
        report.outputs += 1
        report.nbytes += record.nbytes
        found = [_check(directory, record)]
        for one in record.references:
            if (one.location.file, one.location.entry) not in checked:  # several outputs may refer to it
                checked.add((one.location.file, one.location.entry))
                report.references += 1
                report.nbytes += one.nbytes
                found.append(_check_reference(directory, one))
        findings = [finding for finding in found if finding is not None]
        if findings and _stands(directory, record):
            report.findings.extend(findings)
    return report


def _check(directory: Path, record: records.TaskCommitted) -> Finding | None:
    place = record.location
    try:
        history.check_bytes(directory, record)
    except (CorruptCheckpointError, StorageError) as error:
        if isinstance(place, records.InCheckpoint):
            return Finding(str(error), str(directory / "checkpoints" / place.file), record.task_id, place.entry)
        return Finding(str(error), str(directory / "journal"), record.task_id)
    return None


def _check_reference(directory: Path, one: records.Reference) -> Finding | None:
    place = one.location
    try:
        history.check_reference(directory, one)
    except (CorruptCheckpointError, StorageError) as error:
        return Finding(str(error), str(directory / "checkpoints" / place.file), one.task, place.entry)
    return None


def _stands(directory: Path, record: records.TaskCommitted) -> bool:
    """Whether an output that was found damaged still counts: meanwhile it may have been voided, and its file be freed."""
    return record in history.standing_outputs(journal.inspect(directory)[0].records).values()
