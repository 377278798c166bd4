"""The rules of exactly-once as pure functions of a DAG, its annotations and what the journal says. No I/O, no clock.

R1 to R12 are the rules of ``docs/guarantees.md``. What is *needed*, *void* or *has to be committed first* is decided here; when that is
done, and by whom, elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from .errors import IllegalAnnotationError
from .spec import TaskSpec

__all__ = ["check_annotations"]


def check_annotations(tasks: Sequence[TaskSpec]) -> None:
    """IllegalAnnotationError for a task whose effect could be neither repeated nor undone (R4), or that contradicts itself."""
    for task in tasks:
        if not task.external:
            if task.rollback or task.idempotent:
                option = "rollback" if task.rollback else "idempotent"
                raise IllegalAnnotationError(
                    f"task {task.name!r} has {option}=, but no effect outside of the workflow that it could be about: "
                    "add external=True"
                )
        elif not (task.rollback or task.idempotent):
            raise IllegalAnnotationError(
                f"task {task.name!r} is external, and a crash between its effect and its commit runs it again. Do one of three: "
                "declare it idempotent=True if repeating the effect is harmless; give it a rollback= function that undoes it; "
                "or have it use ef.context().idempotency_key with a service that drops what it has seen, and say so with "
                "idempotent=True"
            )
