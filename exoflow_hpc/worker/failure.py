"""An exception of a task, in a form that always travels: text first, the exception itself where it can be pickled."""

from __future__ import annotations

import contextlib
import os
import pickle
import traceback
from collections.abc import Iterator
from pathlib import Path

import cloudpickle

from .protocol import TaskFailed

__all__ = ["describe"]

#: frames of these directories are ours, not the user's
_OWN = tuple(str(Path(__file__).resolve().parents[2] / package) + os.sep for package in ("exoflow_hpc", "hoplite_mpi"))
#: bytes; a failure ends up in the journal, so it has to stay small whatever the user raises
MAX_TEXT = 64 * 1024
MAX_PICKLE = 1024 * 1024


def describe(
    error: BaseException,
    stage: str,
    *,
    retryable: bool = False,
    lost_inputs: tuple[int, ...] = (),
    seconds: float = 0.0,
    note: str = "",
) -> TaskFailed:
    """Return the failure that *error* is, with a *note* behind its message. Never raises for what its class does."""
    names = tuple(f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__)
    text, where = _cut(_message(error)), _cut(_user_traceback(error))
    if note:
        text = f"{text} ({note})" if text else note
    return TaskFailed(stage, names, text, where, _pickled(error), retryable, lost_inputs, seconds)


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as inner:  # a user's __str__
        return f"<str() of it raised {type(inner).__name__}>"


def _cut(text: str) -> str:
    # lone surrogates can't be encoded for the way back
    text = text.encode("utf-8", "backslashreplace").decode()
    if len(text) <= MAX_TEXT:
        return text
    half = MAX_TEXT // 2
    return f"{text[:half]}\n  … {len(text) - 2 * half} characters left out …\n{text[-half:]}"


def _user_traceback(error: BaseException) -> str:
    """Return the formatted traceback with causes and contexts, without the frames of this product."""
    try:
        found = traceback.TracebackException.from_exception(error)
        for one in _chain(found):
            one.stack = traceback.StackSummary.from_list([frame for frame in one.stack if not _is_own(frame.filename)])
        return "".join(found.format())
    except Exception as inner:  # a user's exception can break its own formatting
        return f"{type(error).__name__}: (its traceback can't be formatted: {type(inner).__name__})\n"


def _is_own(filename: str) -> bool:
    return os.path.realpath(filename).startswith(_OWN)


def _chain(start: traceback.TracebackException) -> Iterator[traceback.TracebackException]:
    """Yield *start* and all that it is chained to or groups."""
    waiting, seen = [start], set()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        related = [one.__cause__, one.__context__, *(getattr(one, "exceptions", None) or ())]
        waiting.extend(other for other in related if other is not None)


def _pickled(error: BaseException) -> bytes | None:
    """Return the pickle of *error* if it is small and can be read back."""
    with contextlib.suppress(Exception):  # whatever a user's __reduce__ raises: the text goes in any case
        data: bytes = cloudpickle.dumps(error)
        if len(data) <= MAX_PICKLE and isinstance(pickle.loads(data), BaseException):
            return data
    return None
