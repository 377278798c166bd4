"""Pickles of a spec: functions, arguments with placeholders, constants.

Nodes are found by the pickler itself, through persistent ids, so they are found wherever a value can hide: in lists,
dataclasses, closures. A placeholder is ``("t", k)`` for the output of the k-th of the task's `data`, or ``("b", key)``
for a blob of the spec; so a pickle doesn't depend on where its task ends up in the workflow.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from .dag import BadWorkflowError, DAGNode, InputItem, InputNode, StepNode
from .pickling import PROTOCOL, Pickler, dumps

__all__ = ["Blobs", "dump_arguments", "dump_function", "load_arguments", "load_function", "load_value"]


class Blobs:
    """Pickles that several tasks share, each stored once under the hash of its bytes."""

    def __init__(self, shared_constant_size: int) -> None:
        #: key → pickle; keys are in the order of first use
        self.data: dict[str, bytes] = {}
        self.shared_constant_size = shared_constant_size
        #: id → (object, key): holding the object keeps its id its own
        self._known: dict[int, tuple[Any, str]] = {}

    def add(self, data: bytes) -> str:
        """Store *data* and return its key."""
        key = hashlib.blake2b(data, digest_size=16).hexdigest()
        self.data.setdefault(key, data)
        return key

    def add_object(self, value: Any, dump: Callable[[Any], bytes]) -> str:
        """Store the pickle of *value*, made once for each object, and return its key."""
        known = self._known.get(id(value))
        if known is None:
            known = self._known[id(value)] = (value, self.add(dump(value)))
        return known[1]

    def is_large(self, value: Any) -> bool:
        """Whether *value* is an array or bytes that is worth storing once only."""
        kind = type(value)
        if kind is np.ndarray:
            return bool(value.nbytes >= self.shared_constant_size) and not value.dtype.hasobject
        return (kind is bytes or kind is bytearray) and len(value) >= self.shared_constant_size


class _ArgumentPickler(Pickler):
    def __init__(self, file: io.BytesIO, blobs: Blobs, refer: Callable[[DAGNode], tuple[str, Any]]) -> None:
        super().__init__(file, protocol=PROTOCOL)
        self.blobs = blobs
        self.refer = refer
        #: keys of the blobs that the pickle refers to
        self.used: dict[str, None] = {}

    def persistent_id(self, value: Any) -> tuple[str, Any] | None:
        if isinstance(value, DAGNode):
            reference = self.refer(value)
        elif self.blobs.is_large(value):
            reference = ("b", self.blobs.add_object(value, dumps))
        else:
            return None
        if reference[0] == "b":
            self.used[reference[1]] = None
        return reference


class _ArgumentUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, output: Callable[[int], Any], blob: Callable[[str], Any]) -> None:
        super().__init__(file)
        self.output = output
        self.blob = blob

    def persistent_load(self, reference: Any) -> Any:
        kind, key = reference
        return self.output(key) if kind == "t" else self.blob(key)


def load_value(data: bytes) -> Any:
    """Return the value of a blob of the spec."""
    return pickle.loads(data)


def dump_function(function: Callable[..., Any], task: str) -> bytes:
    """Return the pickle of *function*; BadWorkflowError names the *task* if that, or what it uses, can't be pickled."""
    try:
        return dumps(function)
    except Exception as error:  # whatever a user's __reduce__ raises
        raise BadWorkflowError(
            f"the function of task {task!r} can't be sent to a worker: {_why(error)}. It takes along the global "
            "and enclosing variables that it uses: one of them can't be pickled; create it inside the function"
        ) from error


def load_function(data: bytes) -> Callable[..., Any]:
    """Return the function of a task, in the worker."""
    function: Callable[..., Any] = pickle.loads(data)
    return function


def dump_arguments(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    blobs: Blobs,
    task: str,
    output: Callable[[StepNode], int],
    inputs: Callable[[str | None], str],
) -> tuple[bytes, tuple[str, ...]]:
    """Return the pickle of ``(args, kwargs)`` with placeholders, and the keys of the blobs that it needs.

    output: number of a node among those that the task takes; inputs: key of the blob with one input (None: with all).
    BadWorkflowError names task and argument.
    """

    def refer(node: DAGNode) -> tuple[str, Any]:
        if isinstance(node, StepNode):
            return "t", output(node)
        if isinstance(node, InputItem):
            return "b", inputs(node.key)
        if isinstance(node, InputNode):
            return "b", inputs(None)
        raise TypeError(f"unknown kind of node: {node!r}")

    def dump(value: Any) -> tuple[bytes, tuple[str, ...]]:
        file = io.BytesIO()
        pickler = _ArgumentPickler(file, blobs, refer)
        pickler.dump(value)
        return file.getvalue(), tuple(pickler.used)

    try:
        return dump((args, kwargs))
    except BadWorkflowError:
        raise
    except Exception as error:  # whatever a user's __reduce__ raises
        which = _culprit(args, kwargs, dump)
        raise BadWorkflowError(
            f"{which} of task {task!r} can't be pickled: {_why(error)}. Give the task what it can be made "
            "from instead, and make it inside the task"
        ) from error


def load_arguments(
    data: bytes, output: Callable[[int], Any], blob: Callable[[str], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return (args, kwargs): ``output(k)`` gives the k-th of the task's `data`, ``blob(key)`` the value of a blob."""
    args, kwargs = _ArgumentUnpickler(io.BytesIO(data), output, blob).load()
    return args, kwargs


def _culprit(args: tuple[Any, ...], kwargs: dict[str, Any], dump: Callable[[Any], object]) -> str:
    """Name the first argument that fails alone."""
    named: Iterable[tuple[str, Any]] = [(f"argument {position + 1}", value) for position, value in enumerate(args)]
    for name, value in [*named, *((f"argument {key!r}", value) for key, value in kwargs.items())]:
        try:
            dump(value)
        except Exception:  # it is the one that was looked for
            return f"{name} ({type(value).__name__})"
    return "the arguments, taken together,"


def _why(error: BaseException) -> str:
    if isinstance(error, RecursionError) or "recursion" in str(error).lower():
        return "it is nested too deeply, or refers to itself in a way that pickle can't follow"
    return f"{type(error).__name__}: {error}".rstrip(".")
