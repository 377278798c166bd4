"""Options of a task, checked when they are written down rather than when the task runs."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import IllegalAnnotationError

__all__ = ["CHECKPOINT_MODES", "TaskOptions", "make_options"]

CHECKPOINT_MODES = ("sync", "async", "skip", "auto")

#: options of the interface whose rules this version does not enforce yet, with the value that asks for nothing;
#: any other value is refused, since ignoring one would break what it promises
_NOT_YET: dict[str, Any] = {
    "num_returns": 1,
    "cpus": 1,
    "gpus": 0,
    "tags": (),
    "ranks": 1,
    "isolation": "process",
}


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """Validated options of one task.

    name: names the task in ``status`` and ``output``; default: the function's name. Tasks of the same name get ``_1``,
    ``_2``, …
    checkpoint: ``"sync"`` (consumers wait until the output is durable), ``"async"`` (consumers start at once, the
    workflow
    ends when the output is durable), ``"skip"`` (written only as the workflow's output, or where the rules ask for it), ``"auto"`` (what
    the workflow says; if it says nothing, as ``"async"`` where that is worth it: see `semantics.is_worth_writing`).
    max_retries: how often the task is started again after a crash of its worker, a timeout, or an exception of
    `retry_exceptions`, all counted together. Lost ranks are counted apart (`Settings.max_rank_losses`).
    retry_exceptions: True (every `Exception`), False or () (none), or a tuple of exception types.
    retry_delay: seconds to wait before the first retry, at most; twice that before the second, and so on up to
    `Settings.retry_backoff_max`. None: `Settings.retry_backoff`; 0: no waiting.
    timeout: seconds that an attempt may take in its worker; None: no limit. Then its worker is killed, with all that the
    task has started, whatever that does against it.
    memory: bytes, or a string such as ``"2GiB"``, that the task and what it starts may allocate; None: no limit. An
    allocation above it is a `MemoryError`; where it is not seen in time, the worker is killed. Inputs that are mapped from
    shared memory don't count.
    catch_exceptions: the output is ``(value, None)``, or ``(None, error)`` if the task has failed after all its retries:
    the exception that it raised, a `TaskCrashedError` or a `TaskTimeoutError`. Since a crash can come or not, such a task
    never counts as deterministic.
    deterministic: it gives the same output for the same inputs. If not, nobody ever sees two values of it: what was
    computed from a value that is lost is void (R5), and it is committed before an effect that can't be undone (R3).
    external: it has an effect outside of the workflow, so it needs `idempotent` or `rollback` (R4).
    idempotent: repeating that effect with the same `context().idempotency_key` is harmless.
    rollback: ``rollback(key, args, result_or_None)`` undoes the effect of the task whose idempotency key was *key* and
    whose positional arguments were *args*. It may be called more than once, and for an effect that never happened.
    """

    name: str | None = None
    checkpoint: str = "auto"
    max_retries: int = 3
    #: empty: no exception is retried
    retry_exceptions: tuple[type[BaseException], ...] = ()
    deterministic: bool = True
    external: bool = False
    idempotent: bool = False
    rollback: Callable[..., Any] | None = None
    timeout: float | None = None
    #: bytes
    memory: int | None = None
    catch_exceptions: bool = False
    retry_delay: float | None = None


def make_options(base: TaskOptions, changes: dict[str, Any]) -> TaskOptions:
    """Return *base* with *changes*: TypeError, ValueError, or IllegalAnnotationError for what this version can't do."""
    accepted: dict[str, Any] = {}
    for key, value in changes.items():
        if key in _CHECKS:
            accepted[key] = _CHECKS[key](value)
        elif key in _NOT_YET:
            _refuse_unsupported(key, value)
        else:
            known = [*_CHECKS, *_NOT_YET]
            close = difflib.get_close_matches(key, known, n=1)
            hint = f": did you mean {close[0]!r}?" if close else f": there are {', '.join(sorted(known))}"
            raise TypeError(f"unknown task option {key!r}{hint}")
    return dataclasses.replace(base, **accepted)


def _refuse_unsupported(key: str, value: Any) -> None:
    neutral = _NOT_YET[key]
    same = type(value) is type(neutral) and value == neutral
    if key == "tags" and value in ((), [], None):
        same = True
    if not same:
        raise IllegalAnnotationError(
            f"the task option {key}={value!r} is not supported by this version, which knows only {key}={neutral!r}; "
            f"it is refused rather than ignored, because a run without it could do something else than you ask for"
        )


def check_name(value: Any) -> str | None:
    """Return a task name that can also be a path component and an HDF5 group; TypeError or ValueError otherwise."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise TypeError(f"name has to be a str, not {type(value).__name__}")
    if not value or len(value) > 200 or value in (".", "..") or "/" in value:
        raise ValueError(f"name={value[:60]!r}: a task name has 1 to 200 characters, no '/', and is not '.' or '..'")
    if not value.isprintable() or any(character.isspace() for character in value):
        raise ValueError(f"name={value!r}: a task name has neither white space nor control characters")
    return value


def check_checkpoint(value: Any) -> str:
    """Return a checkpoint mode; TypeError or ValueError otherwise."""
    if not isinstance(value, str):
        raise TypeError(f"checkpoint has to be one of {', '.join(map(repr, CHECKPOINT_MODES))}, not {value!r}")
    if value not in CHECKPOINT_MODES:
        raise ValueError(f"checkpoint={value!r} is none of {', '.join(map(repr, CHECKPOINT_MODES))}")
    return value


def _check_max_retries(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"max_retries has to be an int, not {value!r}")
    if value < 0:
        raise ValueError(f"max_retries={value} has to be 0 or more")
    return value


def _check_retry_exceptions(value: Any) -> tuple[type[BaseException], ...]:
    if isinstance(value, bool):
        return (Exception,) if value else ()
    kinds = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    for kind in kinds:
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            raise TypeError(f"retry_exceptions has to be a bool or a tuple of exception types; {kind!r} is not one")
    return kinds


def _seconds(name: str, value: Any, *, zero: bool) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} has to be a number of seconds or None, not {value!r}")
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name}={value!r} has to be a finite number of seconds, {'0 or more' if zero else 'above 0'}")
    return float(value)


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?|)B?\s*", re.IGNORECASE | re.ASCII)


def _check_memory(value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, str):
        found = _SIZE.fullmatch(value)
        if found is None:
            raise ValueError(
                f"memory={value!r} is no size: write a number of bytes, or one with a unit as in '2GiB', '500 MB'"
            )
        size = int(float(found[1]) * _UNITS[found[2].upper()])
    elif isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"memory has to be a number of bytes, a string such as '2GiB', or None, not {value!r}")
    else:
        size = value
    if not 0 < size < 2**62:
        raise ValueError(f"memory={value!r} has to be more than 0 bytes, and less than there can be")
    return size


def _check_bool(name: str) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        if not isinstance(value, bool):
            raise TypeError(f"{name} has to be True or False, not {value!r}")
        return value

    return check


def _check_rollback(value: Any) -> Callable[..., Any] | None:
    if value is None:
        return None
    function = getattr(value, "function", value)  # a task can be a rollback; what is called is its function
    if not callable(function):
        raise TypeError(f"rollback has to be a function rollback(key, args, result_or_None), not {value!r}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a built-in: what it takes shows when it is called
        return function
    try:
        signature.bind("key", (), None)
    except TypeError:
        raise TypeError(
            f"rollback={getattr(function, '__name__', function)!s}{signature} can't be called as "
            "rollback(key, args, result_or_None)"
        ) from None
    return function


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "name": check_name,
    "checkpoint": check_checkpoint,
    "max_retries": _check_max_retries,
    "retry_exceptions": _check_retry_exceptions,
    "deterministic": _check_bool("deterministic"),
    "external": _check_bool("external"),
    "idempotent": _check_bool("idempotent"),
    "rollback": _check_rollback,
    "timeout": lambda value: _seconds("timeout", value, zero=False),
    "memory": _check_memory,
    "catch_exceptions": _check_bool("catch_exceptions"),
    "retry_delay": lambda value: _seconds("retry_delay", value, zero=True),
}
