"""Frees what nobody needs: files that no record names, leftovers of kills, and, if asked to, outputs of finished workflows.

What makes it safe beside controllers, takeovers, readers and other collectors, and against a kill at any moment:

- A record names only checkpoint files of its own epoch, and, by reference, files that stood when that began; a file links only to
  files of its own epoch. So only the files of epochs that are *over* are touched: those that a newer epoch has sealed. What such an
  epoch's journal says is fixed for ever; before the seal, a controller that is being replaced may still name a file, and the seal
  may still accept that.
- Files are listed before the journal is read, so that whatever names one of them by then is seen. The journal is read as a
  power cut would leave it.
- What is named by what stands now, or stood at the seal, is kept, with all that it links to.
- The last epoch of a workflow that has ended is over only when there is a newer one: the collector takes that, if no
  heartbeat moves and nobody else has taken one meanwhile, and so fences whoever might still write.
- Retention: the records that say which outputs are gone are durable, and the fence was checked after that, before the first of
  their files is removed.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from exoflow_hpc import checkpoint, heartbeat, history, journal, records
from exoflow_hpc.durable import storage_errors
from exoflow_hpc.errors import (
    CorruptCheckpointError,
    ExoFlowError,
    FencedError,
    StorageError,
    WorkflowNotFoundError,
)
from exoflow_hpc.global_array import TEMPORARY
from exoflow_hpc.history import Status
from exoflow_hpc.storage import Storage
from hoplite_mpi.testing import fault

__all__ = ["Freed", "collect"]

#: seconds after which a file that takes less than a second to write is nobody's any more
_ABANDONED = 3600.0


@dataclass
class Freed:
    """What was removed."""

    files: int = 0
    nbytes: int = 0
    #: (workflow, task) of outputs that retention removed
    expired: list[tuple[str, str]] = field(default_factory=list)
    #: (workflow, why) of those that were left as they are
    skipped: list[tuple[str, str]] = field(default_factory=list)


def collect(storage: Storage, retention: str = "all") -> Freed:
    """Free what nobody needs of all workflows, see above; blocks on storage, and up to 3 s for a workflow that may be active.

    retention: ``"needed"`` also removes outputs of workflows that have succeeded: those that are neither the workflow's nor of
    a task that is external or not deterministic, since these could not be computed again as they were. Those that are in
    the journal, or in one file with others that are needed, stay. StorageError: files can't be removed.
    """
    freed = Freed(*storage.swept)
    for workflow_id in storage.list():
        try:
            directory = storage.directory(workflow_id)
            with storage_errors("collect what is unneeded in", directory):
                _collect(storage, workflow_id, directory, retention, freed)
        except WorkflowNotFoundError:  # deleted meanwhile
            continue
        except FencedError:  # somebody has begun to run it
            continue
        except StorageError:
            if directory.exists():
                raise
        except ExoFlowError as error:  # damaged, or of a newer version
            freed.skipped.append((workflow_id, str(error)))
    return freed


def _collect(storage: Storage, workflow_id: str, directory: Path, retention: str, freed: Freed) -> None:
    _free_abandoned(directory, freed)
    listed = checkpoint.orphans(directory, ())
    past = journal.read(directory)
    sealed = _sealed(past)
    # what counted when the older epochs were sealed counts until the next seal: what was voided since may be in use
    standing = [*_standing(past.records), *_standing(past.records[: _records_before(past, sealed)])]
    end = history.last_end(past.records)
    # what was voided may be given to a rollback yet, and says what the workflow's tasks are
    undo = set() if end is not None and end.status == Status.SUCCESSFUL else history.kept_files(past.records)
    for known in (past.records, past.records[: _records_before(past, sealed)]):
        undo.update(where["file"] for _, where, *_ in history.continued(known) if "file" in where)
    _free(directory, listed, _files(standing) | undo, sealed, freed)
    if end is None:
        return
    now = _standing(past.records)
    unneeded = _expirable(storage, workflow_id, directory, past.records, now) if _may_expire(end, retention) else []
    if not unneeded and not _garbage(directory, listed, _files(now) | undo, past.epoch + 1):
        return
    if heartbeat.watch(directory / "heartbeat"):
        return
    held, past = journal.Journal.open(directory, after=past.epoch)
    with held:
        now = _standing(past.records)
        if unneeded:
            gone = [held.append(records.encode(records.TaskExpired(one.task_id, one.attempt))) for one in unneeded]
            for future in gone:
                future.result()
            fault.point("gc.expired")
            freed.expired.extend((workflow_id, one.task_id) for one in unneeded)
            now = [one for one in now if one not in unneeded]
        _free(directory, listed, _files(now) | undo, held.epoch, freed)


def _sealed(past: journal.History) -> int:
    """Return the newest epoch that has begun with its seal: all older ones are over."""
    return max((epoch for epoch, _, _, count in past.seals if count), default=0)


def _records_before(past: journal.History, sealed: int) -> int:
    return sum(max(count - 1, 0) for epoch, _, _, count in past.seals if epoch < sealed)  # less the seal of each


def _standing(past: Iterable[dict[str, object]]) -> list[records.TaskCommitted]:
    return list(history.standing_outputs(past).values())


def _free(directory: Path, listed: Collection[Path], keep: set[str], before: int, freed: Freed) -> None:
    for path in _garbage(directory, listed, keep, before):
        fault.point("gc.before_unlink")
        with contextlib.suppress(FileNotFoundError):  # another collector was faster
            size = path.stat().st_size
            os.unlink(path)
            freed.files += 1
            freed.nbytes += size


def _free_abandoned(directory: Path, freed: Freed) -> None:
    """Remove what a killed `array` command left; one that is still at it would only have to be called again."""
    checkpoints = directory / "checkpoints"
    for path in checkpoints.glob(f"{TEMPORARY}*"):
        with contextlib.suppress(FileNotFoundError):
            found = path.stat()
            if _now(checkpoints) - found.st_mtime > _ABANDONED:
                path.unlink()
                freed.files += 1
                freed.nbytes += found.st_size


def _now(directory: Path) -> float:
    """Return what time it is by the clock that gives files there their times; ours may be wrong."""
    with tempfile.TemporaryFile(dir=directory) as file:
        return os.fstat(file.fileno()).st_mtime


def _garbage(directory: Path, listed: Collection[Path], keep: set[str], before: int) -> list[Path]:
    """Return those of the *listed* files of epochs older than *before* that are neither in *keep* nor linked to from there."""
    found = [path for path in checkpoint.orphans(directory, keep, before) if path in listed]
    # links stay within an epoch, so most files need not be opened
    epochs = {_epoch(path.name) for path in found}
    needed = _with_links(directory, (name for name in keep if _epoch(name) in epochs))
    return [path for path in found if path.name not in needed]


def _epoch(name: str) -> str:
    return name.removeprefix(".tmp-").partition("-")[0]


def _files(standing: Iterable[records.TaskCommitted]) -> set[str]:
    return {file for one in standing for file in one.files}


def _with_links(directory: Path, files: Iterable[str]) -> set[str]:
    """Return *files* and all that they link to; where that can't be read, all of the same epoch."""
    found: set[str] = set()
    for name in set(files):
        found.add(name)
        try:
            found.update(checkpoint.links(directory, name))
        except CorruptCheckpointError:
            found.update(path.name for path in checkpoint.orphans(directory, ()) if _epoch(path.name) == _epoch(name))
    return found


def _may_expire(end: records.WorkflowFinished, retention: str) -> bool:
    return retention == "needed" and end.status == Status.SUCCESSFUL


def _expirable(
    storage: Storage,
    workflow_id: str,
    directory: Path,
    past: list[dict[str, object]],
    standing: list[records.TaskCommitted],
) -> list[records.TaskCommitted]:
    """Return the records whose outputs retention removes. CorruptCheckpointError if the workflow's own output is damaged."""
    spec = history.load_spec(storage, workflow_id, past)
    tasks = [(one, spec.tasks[spec.index(one.task_id)]) for one in standing if spec.find(one.task_id) is not None]
    needed = [
        one
        for one, task in tasks
        if task.index == spec.output or task.external or not task.deterministic or one.continued
    ]
    kept = _with_links(directory, _files(needed))
    found = [one for one in standing if one.files and kept.isdisjoint(one.files)]
    output = next((one for one, task in tasks if task.index == spec.output), None)
    if output is None:
        return []
    if found:
        history.check_output(directory, output)  # else what it is computed from would be needed again
    return found
