"""The example with an `ef` that runs each task where it is bound, so that its functions are tested in one process."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

__all__ = ["EXAMPLE", "load_eager"]

EXAMPLE = Path(__file__).parents[2] / "examples" / "bpe_ngram.py"


class _EagerTask:
    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def options(self, **_: Any) -> _EagerTask:
        return self

    def bind(self, *args: Any) -> Any:
        return self.function(*args)

    __call__ = bind


def _eager_task(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    return _EagerTask if function is None else _EagerTask(function)


def load_eager() -> Any:
    """Return the example's module; its `workflow(...)` runs at once and returns the result."""
    eager = types.ModuleType("exoflow_hpc")
    eager.task = _eager_task  # type: ignore[attr-defined]
    eager.reduce = lambda nodes, **_: sum(nodes)  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("bpe_ngram_eager", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    real = sys.modules.get("exoflow_hpc")
    sys.modules["exoflow_hpc"] = eager
    try:
        spec.loader.exec_module(module)
    finally:
        if real is None:
            del sys.modules["exoflow_hpc"]
        else:
            sys.modules["exoflow_hpc"] = real
    return module


@pytest.fixture(scope="session")
def example() -> Any:
    """Return what `load_eager` does."""
    return load_eager()
