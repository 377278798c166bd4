"""Running workflows from a program, and asking about them."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exoflow_hpc import global_array, history, journal, local, records, summary, verification
from exoflow_hpc.compile import compile_workflow
from exoflow_hpc.durable import storage_errors
from exoflow_hpc.errors import (
    CorruptCheckpointError,
    ExoFlowError,
    WorkflowActiveError,
    WorkflowExistsError,
    WorkflowNotFoundError,
)
from exoflow_hpc.heartbeat import watch
from exoflow_hpc.history import Status
from exoflow_hpc.outcome import REFUSED, Ended
from exoflow_hpc.spec import WorkflowSpec
from exoflow_hpc.storage import Storage

if TYPE_CHECKING:
    from exoflow_hpc.rank.session import Session
    from exoflow_hpc.rank.turns import Turn

__all__ = [
    "cancel",
    "delete",
    "execute",
    "get_metadata",
    "get_output",
    "get_status",
    "list_all",
    "new_id",
    "read_global",
    "resume",
    "resume_all",
    "run",
    "run_async",
    "submit",
    "verify",
]

#: of this process, if it is a rank: opened by the first run, closed at exit
_session: Session | None = None


def run(
    node: Any,
    workflow_id: str | None = None,
    inputs: Mapping[str, Any] | None = None,
    ranks: int | None = None,
    storage: str | os.PathLike[str] | None = None,
    checkpoint: str | None = None,
) -> Any:
    """Run the workflow that ends in *node* and return its output; blocks.

    workflow_id: goes on with the workflow of that id if DAG and inputs are the same, else WorkflowExistsError (default:
    a new id). inputs: for `InputNode`.
    ranks: local ranks to start where no launcher has (default: as many as cores). checkpoint: of tasks with ``"auto"``.
    Under a launcher every rank calls it, the arguments of the one that controls the run count (rank 0 until it is lost), and every
    rank gets the output. Errors: TaskError,
    TaskCrashedError, CanceledError, WorkflowActiveError, StorageError, and what `exoflow_hpc.compile` says of a DAG.
    """
    return _run(None, node, workflow_id, inputs, ranks, storage, checkpoint)


def _run(
    turn: Turn | None,
    node: Any,
    workflow_id: str | None = None,
    inputs: Mapping[str, Any] | None = None,
    ranks: int | None = None,
    storage: str | os.PathLike[str] | None = None,
    checkpoint: str | None = None,
) -> Any:
    """As `run`; *turn*: of a rank's run, default: the next one."""
    if local.under_launcher():
        return _run_as_rank(
            storage,
            lambda place: submit(place, node, workflow_id, inputs, checkpoint or "auto"),
            repeatable=workflow_id is not None,
            turn=turn,
        )
    place = Storage.locate(storage)
    workflow_id = submit(place, node, workflow_id, inputs, checkpoint or "auto")
    return _value(place, execute(place, workflow_id, ranks, quiet=True))


def run_async(*args: Any, **kwargs: Any) -> Future[Any]:
    """Start `run` and return a future of its output.

    Under a launcher every rank calls it, and `run`, in the same order. Workflows that are under way at the same time share the workers of
    the ranks, and each of them is controlled by another rank: the arguments of the k-th call that count are those of rank k modulo their
    number, until that is lost.
    """
    turn = rank_session().turn(beside=True) if local.under_launcher() else None
    executor = ThreadPoolExecutor(1, thread_name_prefix="exoflow-run")
    future = executor.submit(_run, turn, *args, **kwargs)
    executor.shutdown(wait=False)
    return future


def resume(workflow_id: str, ranks: int | None = None, storage: str | os.PathLike[str] | None = None) -> Any:
    """Go on with a workflow that was interrupted or failed, from what is committed, and return its output; blocks. Errors as `run`."""
    if local.under_launcher():
        return _run_as_rank(storage, lambda place: place.directory(workflow_id).name, repeatable=True)
    place = Storage.locate(storage, create=False)
    place.directory(workflow_id)
    return _value(place, execute(place, workflow_id, ranks, quiet=True))


def resume_all(storage: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Resume every workflow that was interrupted, one after the other; return id → output or the error it ended with."""
    if local.under_launcher():
        return _resume_all_as_rank(storage)
    results: dict[str, Any] = {}
    for workflow_id, _ in list_all(Status.RESUMABLE, storage):
        try:
            results[workflow_id] = resume(workflow_id, storage=storage)
        except ExoFlowError as error:
            results[workflow_id] = error
    return results


class _NoneLeftError(ExoFlowError):
    """No workflow is left to resume."""


def _resume_all_as_rank(storage: str | os.PathLike[str] | None) -> dict[str, Any]:
    """As `resume_all`; the rank that controls a run says which one it is: others may see another list."""
    results: dict[str, Any] = {}
    known: list[str] | None = None

    def prepared() -> tuple[Storage, str]:
        nonlocal known
        place = Storage.locate(storage)
        if known is None:
            known = [workflow_id for workflow_id, _ in list_all(Status.RESUMABLE, storage)]
        for workflow_id in known:
            if workflow_id not in results:
                return place, workflow_id
        raise _NoneLeftError

    while True:
        try:
            ended = rank_session().run(prepared, repeatable=True, quiet=True)
        except _NoneLeftError:
            return results
        if isinstance(ended.error, _NoneLeftError):
            return results
        if not ended.workflow_id:  # it is not known which one it was
            raise ended.error or ExoFlowError(f"a workflow is {ended.status}")
        try:
            results[ended.workflow_id] = value_of(ended)
        except ExoFlowError as error:
            results[ended.workflow_id] = error


def submit(
    place: Storage, node: Any, workflow_id: str | None, inputs: Any, checkpoint: str = "auto", **options: Any
) -> str:
    """Compile the DAG and put it into the storage, unless just that is there under the id already; return the id."""
    spec = compile_workflow(node, inputs, checkpoint=checkpoint, **options)
    if workflow_id is None:
        workflow_id = new_id(spec.tasks[spec.output].name)
    try:
        place.create(workflow_id, spec.to_bytes())
    except WorkflowExistsError:
        known = WorkflowSpec.from_bytes(place.spec(workflow_id))
        if known.fingerprint != spec.fingerprint:
            raise WorkflowExistsError(
                f"{place.path} has a workflow {workflow_id!r} with another DAG or other inputs: "
                "use another id, delete that one, or resume it with `resume`"
            ) from None
    return workflow_id


def new_id(name: str) -> str:
    """Return an id that is free, with *name* in it."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-_")[:60] or "workflow"
    return f"{plain}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def execute(place: Storage, workflow_id: str, ranks: int | None, *, quiet: bool) -> dict[str, Any]:
    """Run a workflow that is in the storage on local ranks; return its summary. WorkflowActiveError if it is active elsewhere."""
    from exoflow_hpc.rank.active import refuse_if_active

    directory = place.directory(workflow_id)
    end = history.last_end(journal.read(directory).records)
    if end is not None and end.status == Status.SUCCESSFUL:
        with contextlib.suppress(CorruptCheckpointError):  # it is computed again
            return summary.of_finished(place, workflow_id)
    if end is not None and end.status == Status.CANCELED:
        raise history.canceled(workflow_id)
    refuse_if_active(directory, workflow_id)
    count = local.default_ranks() if ranks is None else ranks
    if count < 1:
        raise ValueError(f"ranks is {count}; at least 1 is needed")
    result = local.run_local(workflow_id, place.path, count, quiet=quiet)
    if result["status"] == REFUSED:  # what was looked at above has changed since
        raise ExoFlowError(result["error"])
    return result


def _value(place: Storage, result: Mapping[str, Any]) -> Any:
    """Return the output of a run, or raise what it ended with."""
    workflow_id, status = result["workflow_id"], result["status"]
    if status == Status.SUCCESSFUL:
        return summary.output_value(place, workflow_id)
    end = history.last_end(journal.read(place.directory(workflow_id)).records)
    if status == Status.CANCELED:
        raise history.canceled(workflow_id)
    if end is not None and end.status == Status.FAILED:
        raise history.error_of(end)
    raise ExoFlowError(f"workflow {workflow_id!r} is {status}: {result.get('error', 'it was interrupted')}; resume it")


# -- as a rank ---------------------------------------------------------------------------------------------------------------


def rank_session() -> Session:
    """Return this rank's session, opened at the first call; collective over the ranks."""
    global _session
    if _session is None:
        from exoflow_hpc.rank.session import Session

        _session = Session()
        atexit.register(_close_session)
    return _session


def _close_session() -> None:
    global _session
    if _session is not None:
        session, _session = _session, None
        session.close()


def _run_as_rank(
    storage: str | os.PathLike[str] | None,
    prepare: Callable[[Storage], str],
    repeatable: bool,
    turn: Turn | None = None,
) -> Any:
    def prepared() -> tuple[Storage, str]:
        place = Storage.locate(storage)
        return place, prepare(place)

    return value_of(rank_session().run(prepared, turn, repeatable=repeatable, quiet=True))


def value_of(ended: Ended) -> Any:
    """Return a run's output on any rank, or raise what it ended with."""
    if ended.status != Status.SUCCESSFUL:
        if ended.status == Status.CANCELED:
            raise history.canceled(ended.workflow_id)
        raise ended.error or ExoFlowError(f"the workflow is {ended.status}")
    path = Path(ended.directory)
    return summary.output_value(Storage(path.parent.parent, create=False), path.name)


# -- asking ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metadata:
    """What is known of a workflow or of one of its tasks."""

    workflow_id: str
    status: str
    tasks: int
    committed: int
    epoch: int
    #: of one task only
    task: str | None = None
    checkpoint: str | None = None
    #: with what its output refers to
    nbytes: int | None = None
    location: str | None = None


def get_status(workflow_id: str, storage: str | os.PathLike[str] | None = None) -> str:
    """Return PENDING, RUNNING, SUCCESSFUL, FAILED, CANCELED or RESUMABLE; looks at the heartbeat for up to 3 s. WorkflowNotFoundError."""
    return history.status_of(Storage.locate(storage, create=False).directory(workflow_id))[0]


def get_output(workflow_id: str, task: str | None = None, storage: str | os.PathLike[str] | None = None) -> Any:
    """Return the committed output of a workflow, or of one of its tasks by name; arrays are read-only, and `get` reads references in it.

    WorkflowNotFoundError; ExoFlowError if it isn't committed; CorruptCheckpointError.
    """
    return summary.output_value(Storage.locate(storage, create=False), workflow_id, task)


def read_global(
    workflow_id: str, name: str = "array", storage: str | os.PathLike[str] | None = None
) -> global_array.GlobalArray:
    """Return a global array of the committed `Shard` outputs of that name, to be indexed for its parts; reads none yet.

    WorkflowNotFoundError; ExoFlowError if there is none, or its blocks don't fit together.
    """
    return global_array.find(Storage.locate(storage, create=False).directory(workflow_id), name)


def get_metadata(workflow_id: str, task: str | None = None, storage: str | os.PathLike[str] | None = None) -> Metadata:
    """Return what is known of a workflow, or of one of its tasks by name. WorkflowNotFoundError, ExoFlowError."""
    place = Storage.locate(storage, create=False)
    directory = place.directory(workflow_id)
    status, past = history.status_of(directory)
    spec = history.load_spec(place, workflow_id, past.records)
    committed = history.committed_tasks(spec, past.records)
    expired = history.expired_tasks(spec, past.records)
    done = len(committed) + len(expired)
    whole = Metadata(workflow_id, status, len(spec.tasks), done, past.epoch)
    if task is None:
        return whole
    index = spec.index(task)
    record = committed.get(index)
    where = "removed by retention" if index in expired else None
    if record is not None:
        where = "journal" if isinstance(record.location, records.Inline) else record.location.file
    return Metadata(
        workflow_id,
        status,
        len(spec.tasks),
        done,
        past.epoch,
        task,
        spec.tasks[index].checkpoint,
        None if record is None else record.nbytes + sum(one.nbytes for one in record.references),
        where,
    )


def verify(workflow_id: str, storage: str | os.PathLike[str] | None = None) -> list[verification.Finding]:
    """Check every checksum of a workflow and return what is damaged, each with file, task and entry; blocks on storage.

    Changes nothing; may be called while the workflow runs. WorkflowNotFoundError, StorageError.
    """
    return verification.examine(Storage.locate(storage, create=False), workflow_id).findings


def list_all(status: str | None = None, storage: str | os.PathLike[str] | None = None) -> list[tuple[str, str]]:
    """Return (id, status) of all workflows in the storage, or of those with that *status*, sorted by id."""
    place = Storage.locate(storage, create=False)
    found = []
    for workflow_id in place.list():
        try:
            found.append((workflow_id, history.status_of(place.directory(workflow_id))[0]))
        except WorkflowNotFoundError:  # deleted meanwhile
            continue
    return [(workflow_id, state) for workflow_id, state in found if status in (None, state)]


def cancel(workflow_id: str, storage: str | os.PathLike[str] | None = None, timeout: float = 60.0) -> None:
    """Cancel a workflow; returns when it has stopped. ExoFlowError if it has ended already, or did not stop in time."""
    place = Storage.locate(storage, create=False)
    directory = place.directory(workflow_id)
    deadline = time.monotonic() + timeout
    asked = False
    while (status := history.status_of(directory)[0]) not in Status.FINAL:
        if status == Status.RESUMABLE:  # whoever was asked may have died meanwhile
            held, _ = journal.Journal.open(directory)
            with held:
                held.append(records.encode(records.WorkflowFinished(Status.CANCELED))).result()
            return
        if time.monotonic() > deadline:
            raise ExoFlowError(f"workflow {workflow_id!r} did not stop within {timeout:g} s, though it runs: try again")
        with storage_errors("ask to cancel", directory):
            (directory / "cancel").touch()
        asked = True
        time.sleep(0.1)
    if not (asked and status == Status.CANCELED):
        raise ExoFlowError(f"workflow {workflow_id!r} has ended already: it is {status}")


def delete(workflow_id: str, storage: str | os.PathLike[str] | None = None) -> None:
    """Delete a workflow and all its checkpoints. WorkflowActiveError if it runs: cancel it first. WorkflowNotFoundError."""
    place = Storage.locate(storage, create=False)
    directory = place.directory(workflow_id)
    if watch(directory / "heartbeat"):
        raise WorkflowActiveError(f"workflow {workflow_id!r} runs now: cancel it before it can be deleted")
    place.delete(workflow_id)
