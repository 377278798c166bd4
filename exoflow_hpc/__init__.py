"""Exactly-once task DAGs over MPI ranks: how a task runs is decoupled from how it is recovered.

    import exoflow_hpc as ef

    @ef.task
    def square(x): return x * x

    @ef.task(checkpoint="sync")
    def total(parts): return sum(parts)

    def workflow(n=10):
        return total.bind([square.bind(i) for i in range(int(n))])

``python -m exoflow_hpc run FILE`` runs it.
"""

from __future__ import annotations

from exoflow_hpc._version import __version__
from exoflow_hpc.api import (
    cancel,
    delete,
    get_metadata,
    get_output,
    get_status,
    list_all,
    read_global,
    resume,
    resume_all,
    run,
    run_async,
    verify,
)
from exoflow_hpc.context import TaskContext, context
from exoflow_hpc.continuations import continuation
from exoflow_hpc.dag import BadWorkflowError, InputNode, reduce, task
from exoflow_hpc.errors import (
    CanceledError,
    CorruptCheckpointError,
    CorruptJournalError,
    ExoFlowError,
    FencedError,
    IllegalAnnotationError,
    InvalidWorkflowIdError,
    JournalBrokenError,
    NondeterminismError,
    StorageError,
    TaskCrashedError,
    TaskError,
    TaskTimeoutError,
    WorkflowActiveError,
    WorkflowExistsError,
    WorkflowNotFoundError,
)
from exoflow_hpc.references import Ref, get, put
from exoflow_hpc.shards import Shard

__all__ = [
    "BadWorkflowError",
    "CanceledError",
    "CorruptCheckpointError",
    "CorruptJournalError",
    "ExoFlowError",
    "FencedError",
    "IllegalAnnotationError",
    "InputNode",
    "InvalidWorkflowIdError",
    "JournalBrokenError",
    "NondeterminismError",
    "Ref",
    "Shard",
    "StorageError",
    "TaskContext",
    "TaskCrashedError",
    "TaskError",
    "TaskTimeoutError",
    "WorkflowActiveError",
    "WorkflowExistsError",
    "WorkflowNotFoundError",
    "__version__",
    "cancel",
    "context",
    "continuation",
    "delete",
    "get",
    "get_metadata",
    "get_output",
    "get_status",
    "list_all",
    "put",
    "read_global",
    "reduce",
    "resume",
    "resume_all",
    "run",
    "run_async",
    "task",
    "verify",
]
