"""An attempt of a task on its rank, from its dispatch to its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from exoflow_hpc.rank import messages as ms
from exoflow_hpc.spec import TaskSpec
from exoflow_hpc.worker.pool import TaskHandle
from exoflow_hpc.worker.protocol import Input
from hoplite_mpi import ObjectID

__all__ = ["Job"]


@dataclass(eq=False)
class Job:
    """An attempt that was dispatched to this rank."""

    run: ms.Run
    task: TaskSpec
    #: id of its output
    output: ObjectID
    #: `Begin.run`
    run_name: str = ""
    #: position → the input; positions are those of `places`
    inputs: dict[int, Input] = field(default_factory=dict)
    #: position → what keeps an input's bytes in place until the attempt is over
    values: dict[int, Any] = field(default_factory=dict)
    #: position → id, for inputs that are on their way
    coming: dict[int, ObjectID] = field(default_factory=dict)
    handle: TaskHandle | None = None
    #: monotonic time at which the pool got it
    submitted: float = 0.0
    canceled: bool = False
    #: it waits for the controller to begin again without an input that is damaged
    stuck: bool = False
    over: bool = False

    @property
    def places(self) -> list[ms.InputPlace]:
        """Where all is that it takes: its inputs, in the order of `TaskSpec.data`, and then what they refer to."""
        return [*self.run.inputs, *self.run.references] if self.run.references else self.run.inputs

    def place(self, position: int) -> ms.InputPlace:
        """Return one of `places`."""
        inputs = self.run.inputs
        return inputs[position] if position < len(inputs) else self.run.references[position - len(inputs)]

    @property
    def is_complete(self) -> bool:
        """Whether all is there."""
        return len(self.inputs) == len(self.run.inputs) + len(self.run.references)
