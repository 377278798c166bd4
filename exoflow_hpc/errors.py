"""Errors of exoflow_hpc. One root; told apart by whose fault it is."""

from __future__ import annotations

import pickle
import traceback
from typing import Any

__all__ = [
    "CanceledError",
    "CorruptCheckpointError",
    "CorruptJournalError",
    "ExoFlowError",
    "FencedError",
    "IllegalAnnotationError",
    "InvalidWorkflowIdError",
    "JournalBrokenError",
    "NondeterminismError",
    "StorageError",
    "TaskCrashedError",
    "TaskError",
    "TaskTimeoutError",
    "UnknownRecordError",
    "WorkflowActiveError",
    "WorkflowExistsError",
    "WorkflowNotFoundError",
]


class ExoFlowError(Exception):
    """Root of all errors of exoflow_hpc. The message names what it is about and says what to do now."""


class WorkflowNotFoundError(ExoFlowError, LookupError):
    """The storage has no workflow of that id. See `WorkflowExistsError` for the opposite."""


class WorkflowExistsError(ExoFlowError):
    """The id is taken by a workflow with another DAG or other inputs. See `WorkflowNotFoundError` for the opposite."""


class InvalidWorkflowIdError(ExoFlowError, ValueError):
    """A workflow id can't be used as a file name. *Your* choice: the message says what is allowed."""


class WorkflowActiveError(ExoFlowError):
    """Another controller runs this workflow: its heartbeat moves. Wait for it. See `FencedError` for the other side."""


class IllegalAnnotationError(ExoFlowError, ValueError):
    """The annotations of a task leave no way to run it exactly once (rule R4). Nothing has been run."""


class TaskError(ExoFlowError):
    """A task raised: *the user's* code failed. See `TaskCrashedError` for when its process died.

    The message ends with the traceback from the worker; the task's exception is the cause, where it can be pickled.
    """

    def __init__(
        self, message: str, task: str = "", traceback_text: str = "", cause: BaseException | None = None
    ) -> None:
        super().__init__(message)
        #: id of the task that raised
        self.task = task
        #: traceback as the worker would have printed it, with the frames of the task's own code
        self.traceback_text = traceback_text
        self.__cause__ = cause

    @classmethod
    def from_exception(cls, task: str, error: BaseException) -> TaskError:
        """Return the error to report for *error*, caught in *task*."""
        what = "".join(traceback.format_exception_only(type(error), error)).strip()
        return cls(f"task {task} raised {what}", task, "".join(traceback.format_exception(error)), error)

    def __str__(self) -> str:
        text = super().__str__()
        return f"{text}\n\nTraceback in the worker:\n{self.traceback_text}" if self.traceback_text else text

    def __reduce__(self) -> tuple[Any, ...]:
        # pickle drops __cause__, and one that can't be pickled (or unpickled) must not take this error with it
        return _rebuild, (type(self), self.args[0], self.task, self.traceback_text, _pickled_cause(self.__cause__))


def _pickled_cause(cause: BaseException | None) -> bytes | None:
    if cause is None:
        return None
    import cloudpickle

    try:
        data: bytes = cloudpickle.dumps(cause)
        pickle.loads(data)
    except Exception:  # anything can come out of a user's __reduce__; the traceback text still says it all
        return None
    return data


def _rebuild(kind: type[TaskError], message: str, task: str, traceback_text: str, cause: bytes | None) -> TaskError:
    try:
        error = None if cause is None else pickle.loads(cause)
    except Exception:  # its module isn't here: the traceback text still says it all
        error = None
    return kind(message, task, traceback_text, error)


class TaskTimeoutError(TaskError):
    """An attempt of a task took longer than the task's ``timeout``, and was killed. There is no traceback of it."""


class TaskCrashedError(ExoFlowError):
    """The worker process of a task died (killed, out of memory, crashed). See `TaskError` for when the task raised."""


class FencedError(ExoFlowError):
    """Another controller has taken over this workflow, so this one may commit nothing more. *The world's* doing: exit.

    See `WorkflowActiveError` for the refusal to take over.
    """


class NondeterminismError(ExoFlowError):
    """A task taken to be deterministic gave another output, and an effect for good stands on the first (R12)."""


class CanceledError(ExoFlowError):
    """The workflow was canceled by *you* before it was finished."""


class StorageError(ExoFlowError, OSError):
    """A file of the storage can't be read or written: *the world's* fault (full disk, permissions, a failing device).

    See `CorruptCheckpointError` for a file that can be read and is wrong. `errno` and `filename` are those of the
    failed call.
    """

    def __init__(self, message: str, errno: int | None = None, filename: str | None = None) -> None:
        # one argument to OSError: with two it would take the message for a strerror
        super().__init__(message)
        self.errno = errno
        self.filename = filename

    def __str__(self) -> str:
        return str(self.args[0])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.errno, self.filename)


class JournalBrokenError(StorageError):
    """A write or fsync of the journal failed, so nothing can be committed in this epoch any more. Resume."""


class CorruptCheckpointError(ExoFlowError):
    """A stored file is not what was written: missing, torn or altered. It counts as absent. See `StorageError`."""


class CorruptJournalError(CorruptCheckpointError):
    """A journal file was altered before its end, so what is committed can't be known. Nothing has been changed."""


class UnknownRecordError(ExoFlowError):
    """The journal holds a record this version doesn't know: a newer exoflow_hpc wrote it. Use that version."""
