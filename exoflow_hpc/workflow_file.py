"""Workflow files: Python files with a function `workflow(**inputs)` that returns a DAG node."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import json
import os
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Mapping
from importlib.machinery import SourceFileLoader
from typing import Any

import cloudpickle

from .dag import BadWorkflowError, StepNode, Task, require_step

__all__ = ["BadWorkflowError", "load", "parse_inputs", "split_target"]

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep


def load(target: str | os.PathLike[str], inputs: Mapping[str, Any] | None = None) -> StepNode:
    """Return the node that ``FILE`` or ``FILE:FUNCTION`` gives for *inputs*; FUNCTION is ``workflow`` if it isn't said.

    The file is run as a module of its own (not as ``__main__``) with its directory first on `sys.path`. Its functions
    and classes
    are pickled by value from then on, so that no worker needs the file. BadWorkflowError, one paragraph and where it
    is the file's fault the traceback of the user's frames, for whatever is wrong.
    """
    path, name = split_target(target)
    module = _import(path)
    return _call(path, name, _find(path, module, name), dict(inputs or {}))


def split_target(target: str | os.PathLike[str]) -> tuple[str, str]:
    """Return (absolute path, function name) of ``FILE[:FUNCTION]``; BadWorkflowError if there is no such file."""
    text = os.fspath(target)
    path, colon, name = text.rpartition(":")
    if not colon or os.path.isfile(text):
        path, name = text, "workflow"
    if not os.path.exists(path):
        raise BadWorkflowError(f"there is no workflow file {path} (looked for {os.path.abspath(path)})")
    if not os.path.isfile(path):
        raise BadWorkflowError(
            f"the workflow file {path} is not a file but a {'directory' if os.path.isdir(path) else 'device'}"
        )
    if not name:
        raise BadWorkflowError(f"{text}: the name of a function is missing after the colon")
    return os.path.abspath(path), name


def parse_inputs(assignments: Iterable[str]) -> dict[str, Any]:
    """Return {KEY: VALUE} for each ``KEY=VALUE``; VALUE is JSON if it can be read as that, else a string."""
    inputs: dict[str, Any] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise BadWorkflowError(
                f"--input {text!r} should be KEY=VALUE with a KEY that is a Python name, such as --input n=3"
            )
        if key in inputs:
            raise BadWorkflowError(f"--input {key} is given twice")
        try:
            inputs[key] = json.loads(value)
        except (ValueError, RecursionError):
            inputs[key] = value
    return inputs


def _import(path: str) -> types.ModuleType:
    stem = re.sub(r"\W", "_", os.path.splitext(os.path.basename(path))[0])
    name = f"exoflow_workflow_{stem}"
    loader = SourceFileLoader(name, path)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None, "a loader was given"
    module = importlib.util.module_from_spec(spec)
    directory = os.path.dirname(path)
    previous_path, previous_module = list(sys.path), sys.modules.get(name)
    sys.path[:] = [directory, *(entry for entry in sys.path if entry != directory)]
    sys.modules[name] = module
    try:
        # not loader.exec_module(): that would trust a cached .pyc whose source changed within a second
        code = loader.source_to_code(loader.get_data(path), path)
        exec(code, module.__dict__)
    except (Exception, SystemExit) as error:
        sys.path[:] = previous_path
        del sys.modules[name]
        if previous_module is not None:
            sys.modules[name] = previous_module
        if isinstance(error, OSError) and error.filename == path:
            raise BadWorkflowError(f"the workflow file {path} can't be read: {error.strerror}") from None
        raise BadWorkflowError(
            f"the workflow file {path} raised while it was imported:\n{user_traceback(error)}"
        ) from error
    cloudpickle.register_pickle_by_value(module)
    return module


def _find(path: str, module: types.ModuleType, name: str) -> Callable[..., Any]:
    try:
        found = getattr(module, name)
    except AttributeError:
        functions = [
            key
            for key, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__
        ]
        close = difflib.get_close_matches(name, functions, n=1)
        hint = f"did you mean {path}:{close[0]}?" if close else f"its functions are: {', '.join(functions) or 'none'}"
        raise BadWorkflowError(f"the workflow file {path} has no function {name}(): {hint}") from None
    if isinstance(found, Task):
        raise BadWorkflowError(
            f"{name} in {path} is a task, but should be a function that returns a DAG node: remove its @task"
        )
    if not callable(found):
        raise BadWorkflowError(f"{name} in {path} is not a function but of type {type(found).__name__}")
    return found


def _call(path: str, name: str, function: Callable[..., Any], inputs: dict[str, Any]) -> StepNode:
    _check_inputs(path, name, function, inputs)
    try:
        result = function(**inputs)
    except (Exception, SystemExit) as error:
        raise BadWorkflowError(f"{name}() in {path} raised:\n{user_traceback(error)}") from error
    if inspect.iscoroutine(result):
        result.close()
        raise BadWorkflowError(
            f"{name}() in {path} is a coroutine function: it has to return a DAG node, so remove its async"
        )
    return require_step(result, f"what {name}() in {path} returns")


def _check_inputs(path: str, name: str, function: Callable[..., Any], inputs: dict[str, Any]) -> None:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return  # a callable that doesn't say what it takes
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    wrong = []
    missing = [key for key in required if key not in inputs]
    if missing:
        wrong.append(f"missing: {', '.join(missing)}")
    unexpected = [key for key in inputs if not takes_any and key not in {p.name for p in named}]
    if unexpected:
        wrong.append(f"unexpected: {', '.join(unexpected)}")
    if wrong:
        takes = (
            ", ".join(f"{p.name}{'' if p.default is p.empty else f' (default {p.default!r})'}" for p in named) or "none"
        )
        raise BadWorkflowError(f"the inputs of {name}() in {path} are wrong: {'; '.join(wrong)}. It takes: {takes}")


def user_traceback(error: BaseException) -> str:
    """Return *error* as Python prints it, from the first frame that is the user's and without any of ours."""
    summary = traceback.TracebackException.from_exception(error)
    one: traceback.TracebackException | None = summary
    seen: set[int] = set()
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        one.stack[:] = [frame for frame in one.stack if not frame.filename.startswith((_PACKAGE, "<frozen importlib"))]
        one = one.__cause__ or one.__context__
    return "".join(summary.format()).rstrip()
