"""How a run ended, in the form of ``--json``."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from exoflow_hpc import history, journal
from exoflow_hpc.errors import CorruptCheckpointError, ExoFlowError
from exoflow_hpc.history import Status
from exoflow_hpc.outcome import Ended
from exoflow_hpc.spec import WorkflowSpec
from exoflow_hpc.storage import Storage

__all__ = ["jsonable", "of_finished", "output_value", "summarize", "text"]

#: characters of the repr() of an output that is not JSON; all of it is there for `get_output`
MAX_REPR = 10_000


def summarize(storage: Storage, ended: Ended) -> dict[str, Any]:
    """Return what ``--json`` prints of a run, with the output's value where JSON can hold it, else its repr, cut in the middle if long."""
    outcome = ended.outcome
    result: dict[str, Any] = {
        "workflow_id": ended.workflow_id,
        "status": ended.status,
        "output": None,
        "tasks": {"run": 0, "skipped": 0, "rerun": 0, "rolled_back": 0},
        "ranks": {"started": 0, "lost": 0, "rejoined": 0},
        "seconds": 0.0,
    }
    if ended.error is not None:
        result["error"] = str(ended.error)
    if outcome is not None:
        counters = outcome.counters
        result["tasks"] = {
            "run": counters.run,
            "skipped": counters.skipped,
            "rerun": counters.rerun,
            "rolled_back": counters.rolled_back,
        }
        result["ranks"] = {
            "started": outcome.ranks_started,
            "lost": outcome.ranks_lost,
            "rejoined": outcome.ranks_rejoined,
        }
        result["seconds"] = round(outcome.seconds, 3)
    if ended.status == Status.SUCCESSFUL:
        try:
            result["output"] = jsonable(output_value(storage, ended.workflow_id))
        except ExoFlowError as error:  # the workflow has succeeded all the same
            result["error"] = str(error)
    return result


def of_finished(storage: Storage, workflow_id: str) -> dict[str, Any]:
    """Return the same of a workflow that is SUCCESSFUL already: nothing is run. CorruptCheckpointError: something should be."""
    began = time.monotonic()
    directory = storage.directory(workflow_id)
    past = journal.read(directory).records
    spec = history.load_spec(storage, workflow_id, past)
    history.check_output(directory, history.committed_tasks(spec, past)[spec.output])
    result = summarize(storage, Ended(workflow_id, Status.SUCCESSFUL, None))
    result["tasks"]["skipped"] = len(spec.tasks)
    result["seconds"] = round(time.monotonic() - began, 3)
    return result


def output_value(storage: Storage, workflow_id: str, task: str | None = None) -> Any:
    """Return the committed output of a task, or of the workflow. WorkflowNotFoundError, ExoFlowError, CorruptCheckpointError."""
    directory = storage.directory(workflow_id)
    past = journal.read(directory).records
    spec = history.load_spec(storage, workflow_id, past)
    index = spec.output if task is None else spec.index(task)
    index = spec.ends.get(index, index)
    name = spec.tasks[index].name
    record = history.committed_tasks(spec, past).get(index)
    if record is None:
        raise _absent(spec, workflow_id, index, past)
    sys.path.extend(path for path in spec.sys_path if path not in sys.path)  # where the classes of the output may be
    try:
        return history.load_output(directory, record)
    except CorruptCheckpointError:
        past = journal.read(directory).records  # retention may have removed it while we went to read it
        if index in history.expired_tasks(spec, past):
            raise _absent(spec, workflow_id, index, past) from None
        raise
    except ExoFlowError:
        raise
    except Exception as error:  # whatever the user's classes raise when they are rebuilt
        raise ExoFlowError(
            f"the output of task {name!r} of workflow {workflow_id!r} can't be loaded here: {error!r}"
        ) from error


def _absent(spec: WorkflowSpec, workflow_id: str, index: int, past: list[dict[str, Any]]) -> ExoFlowError:
    what = f"task {spec.tasks[index].name!r} of workflow {workflow_id!r}"
    if index in history.expired_tasks(spec, past):
        return ExoFlowError(
            f"the output of {what} was removed by retention (EXOFLOW_RETENTION=needed): the workflow has succeeded and "
            "needs it no more; run it anew under another id to have it again"
        )
    return ExoFlowError(f"{what} has no committed output" + (": resume the workflow" if index == spec.output else ""))


def jsonable(value: Any) -> Any:
    """Return *value* if JSON can hold it, NumPy scalars as numbers, anything else as its repr."""
    try:
        return json.loads(json.dumps(value, default=_number, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        return _cut(_repr(value))


def text(value: Any) -> str:
    """Return *value* as the command line prints it: JSON where that can hold it, else its repr."""
    plain = jsonable(value)
    return plain if isinstance(plain, str) else json.dumps(plain, indent=2)


def _repr(value: Any) -> str:
    try:
        return repr(value)
    except Exception as error:  # a user's __repr__
        return f"<{type(value).__name__}: repr() of it raised {type(error).__name__}>"


def _cut(text: str) -> str:
    if len(text) <= MAX_REPR:
        return text
    half = MAX_REPR // 2
    return f"{text[:half]} … {len(text) - 2 * half} characters left out … {text[-half:]}"


def _number(value: Any) -> Any:
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return value.item()
    raise TypeError(f"{type(value).__name__} is not JSON")
