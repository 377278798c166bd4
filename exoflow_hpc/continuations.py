"""Tasks that go on with further tasks: a DAG that is known only while the workflow runs."""

from __future__ import annotations

from typing import Any, NoReturn

from .context import context
from .errors import ExoFlowError
from .spec import WorkflowSpec

__all__ = ["Continuation", "continuation"]


class Continuation:
    """What a task returns to have the output of a DAG as its own; made by `continuation`."""

    __slots__ = ("spec",)

    def __init__(self, spec: WorkflowSpec) -> None:
        self.spec = spec

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a continuation has to be all that a task returns: it is no value, and can't be part of one, nor an argument or a global"
        )

    def __repr__(self) -> str:
        return f"<continuation with {self.spec.tasks[self.spec.output].name}>"


def continuation(node: Any) -> Continuation:
    """Return what a task has to return, as it is, for its output to be that of the DAG that ends in *node*.

    The tasks of the DAG become tasks of the workflow when the journal durably has it, with names that begin with that of this task and
    ``/``; they may go on in the same way. Arguments are pickled here and now; what was given by reference (`Ref`) can't be among them.
    TypeError outside of a task. BadWorkflowError, IllegalAnnotationError: as from `run`.
    """
    try:
        context()
    except ExoFlowError:
        raise TypeError(
            "continuation() is for what a running task returns; outside of one, run the node itself, or bind it to a task"
        ) from None
    from .compile import compile_workflow

    return Continuation(compile_workflow(node))
