"""One task, run in a worker process: inputs in, function called, output kept."""

from __future__ import annotations

import contextlib
import inspect
import os
import pickle
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from hoplite_mpi.meta import Meta

from ..context import TaskContext, activate
from ..continuations import Continuation
from ..payload import load_arguments, load_function, load_value
from ..references import collecting
from ..serialize import pack, unpack
from ..succession import shown
from .failure import describe
from .memory import Used, describe_size, is_shortage, limited
from .protocol import InlineInput, Input, TaskDone, TaskFailed, TaskRequest
from .values import LostObject, Values

__all__ = ["Executor", "flush_output"]


#: reentrant
_UNLIMITED = contextlib.nullcontext()


class _LostInput(Exception):
    """An input is not in the arena."""

    def __init__(self, task: int, text: str) -> None:
        super().__init__(text)
        self.task = task


class Executor:
    """Runs requests one after the other, and keeps what they share: blobs, loaded functions, the arena."""

    def __init__(self, arena: Mapping[str, Any] | None) -> None:
        #: arguments of `Arena.attach`; None: there is no arena and every output travels inline
        self._address = arena
        self._arena: Any = None
        #: since the last `rest`
        self._used_arena = False
        #: key → pickle; the pool knows which ones are here
        self._blobs: dict[str, bytes] = {}
        #: key → loaded function. Constants are not kept loaded: a task could change one under the next task
        self._functions: dict[str, Callable[..., Any]] = {}
        self._pid = os.getpid()

    def forget(self) -> None:
        """Drop all blobs and functions."""
        self._blobs.clear()
        self._functions.clear()

    def run(self, request: TaskRequest, report: Callable[[float, str], None]) -> TaskDone | TaskFailed:
        """Run *request* and return what became of it, whatever the user's code raises, SystemExit included."""
        self._blobs.update(request.blobs)
        stage, began, seconds = "load", 0.0, 0.0
        identity = request.identity
        attempt = shown(identity.attempt)
        context = TaskContext(
            identity.workflow_id, identity.task_id, identity.incarnation, attempt, identity.epoch, report
        )
        objects = context.objects = Values(request, self._attached)
        used = None if request.memory is None else Used()
        try:
            with limited(used, request.memory) if used is not None else _UNLIMITED:
                _extend_path(request.sys_path)
                function = self._function(request.function)
                values: dict[int, Any] = {}
                stage = "inputs"
                for index, one in request.inputs.items():
                    values[index] = self._input(objects, index, one)
                stage = "load"
                args, kwargs = load_arguments(
                    request.args, lambda index: _known(values, index), lambda key: load_value(_known(self._blobs, key))
                )
                stage, began = "call", time.perf_counter()
                with activate(context):
                    if request.rollback:
                        self._roll_back(request, context.idempotency_key, args, kwargs, values)
                        value = None
                    else:
                        value = function(*args, **kwargs)
                self._end_if_forked()
                seconds = time.perf_counter() - began
                stage = "output"
                return self._output(request, objects, value, seconds)
        except _LostInput as error:
            return describe(error, "inputs", lost_inputs=(error.task,))
        except BaseException as error:  # sys.exit() and KeyboardInterrupt of a task fail it, not the worker
            self._end_if_forked()
            if stage == "call":
                seconds = time.perf_counter() - began
            note = ""
            if used is not None and request.memory is not None and is_shortage(error):
                note = f"limit memory={describe_size(request.memory)}, allocated {describe_size(used.allocated)}"
            with contextlib.suppress(Exception):  # the first error is the one to report; the rank removes what is left
                objects.keep(())
            return describe(error, stage, retryable=self._is_retryable(request, error), seconds=seconds, note=note)
        finally:
            objects.close()

    def rest(self) -> None:
        """Give back what finished tasks have left mapped; for the time after the reply."""
        if self._arena is not None and self._used_arena:
            self._used_arena = False
            self._arena.trim()

    def _end_if_forked(self) -> None:
        """End a child that the task forked and that came back from the task's function: the worker itself replies."""
        if os.getpid() != self._pid:
            flush_output()
            os._exit(0)

    def _function(self, key: str) -> Callable[..., Any]:
        function = self._functions.get(key)
        if function is None:
            function = self._functions[key] = load_function(_known(self._blobs, key))
        return function

    def _roll_back(
        self, request: TaskRequest, key: str, args: tuple[Any, ...], kwargs: dict[str, Any], values: dict[int, Any]
    ) -> None:
        """Undo the effect that the task had, or may have had, under *key*: all of its arguments as positional ones, where they can be."""
        try:
            args = inspect.signature(self._function(request.function)).bind(*args, **kwargs).args
        except (TypeError, ValueError):  # a built-in that doesn't say what it takes
            pass
        self._function(request.rollback)(key, args, values.get(request.result))

    def _is_retryable(self, request: TaskRequest, error: BaseException) -> bool:
        if not request.retry:
            return False
        try:
            return isinstance(error, load_value(_known(self._blobs, request.retry)))
        except Exception:  # types that can't be loaded here match nothing; the error itself is reported
            return False

    def _input(self, objects: Values, index: int, one: Input) -> Any:
        if isinstance(one, InlineInput) and not one.refers:
            return unpack(one.meta, one.data)
        try:
            return objects.unpack(one, f"output of task {index}")
        except LostObject as error:
            raise _LostInput(index, str(error)) from None

    def _output(self, request: TaskRequest, objects: Values, value: Any, seconds: float) -> TaskDone:
        continued = ""
        if isinstance(value, Continuation):
            if request.catch:
                raise TypeError(
                    "a task with catch_exceptions can't return a continuation: use catch_exceptions for the tasks that it goes on with"
                )
            continued, value = value.spec.fingerprint, value.spec.to_bytes()
        elif request.catch:
            value = (value, None)
        with collecting(objects) as found:
            plan = pack(value)
        meta: Meta = plan.meta
        # before the output is there: what is gone by then is not referred to
        references = (found.keys, objects.keep(found.keys))
        if plan.nbytes <= request.inline_limit or self._address is None:
            return TaskDone(meta, plan.nbytes, plan.to_bytes(), seconds, *references, continued)
        region = self._attached().allocate(request.output, meta)
        try:
            plan.write_into(memoryview(region.data))
            region.seal()
        except BaseException:
            region.abandon()
            raise
        return TaskDone(meta, plan.nbytes, None, seconds, *references, continued)

    def _attached(self) -> Any:
        self._used_arena = True
        if self._arena is None:
            if self._address is None:
                raise RuntimeError("the request has an input in the arena, but the pool was made without one")
            from hoplite_mpi.memory.arena import Arena

            self._arena = Arena.attach(**self._address)
        return self._arena


def flush_output() -> None:
    """Write what is buffered for stdout and stderr, where that is possible."""
    for stream in (sys.stdout, sys.stderr):
        # a task may have closed, replaced or removed it, or the reader of the rank's output may be gone
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


def _known(table: Mapping[Any, Any], key: Any) -> Any:
    """Return the entry of *key*; UnpicklingError if it is missing (a KeyError could be the user's own)."""
    try:
        return table[key]
    except KeyError:
        raise pickle.UnpicklingError(f"the request came without {key!r}, which its arguments refer to") from None


def _extend_path(directories: tuple[str, ...]) -> None:
    """Put *directories* at the begin of sys.path, those that aren't in it yet."""
    missing = [one for one in directories if one not in sys.path]
    if missing:
        sys.path[:0] = [os.fspath(one) for one in missing]
