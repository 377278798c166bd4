"""Workflows in a storage that the tests write themselves, without ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

import exoflow_hpc as ef
from exoflow_hpc import records, serialize
from exoflow_hpc.checkpoint import Written
from exoflow_hpc.checkpoint.group import Item, write_group
from exoflow_hpc.compile import compile_workflow
from exoflow_hpc.journal import Journal
from exoflow_hpc.spec import WorkflowSpec
from exoflow_hpc.storage import Storage

__all__ = ["Stored", "flip"]


@ef.task
def identity(value: Any) -> Any:
    return value


def flip(path: Path, needle: bytes) -> None:
    """Change one bit of the first *needle* in a file."""
    data = bytearray(path.read_bytes())
    data[data.index(needle)] ^= 1
    path.write_bytes(data)


class Stored:
    """A workflow of tasks a → b → c → ..., the last of which is its output; its epochs are written by hand.

    special: the index of each task that isn't just deterministic → the fields of its `TaskSpec` that say so.
    """

    def __init__(
        self, root: Path, names: str = "abc", workflow_id: str = "w", special: dict[int, dict[str, Any]] | None = None
    ) -> None:
        node: Any = 0
        for name in names:
            node = identity.options(name=name).bind(node)
        spec = compile_workflow(node)
        tasks = [dataclasses.replace(task, **(special or {}).get(task.index, {})) for task in spec.tasks]
        self.spec: WorkflowSpec = dataclasses.replace(spec, tasks=tuple(tasks))
        self.storage = Storage(root)
        self.directory = self.storage.create(workflow_id, self.spec.to_bytes())
        self.checkpoints = self.directory / "checkpoints"
        self._sequence = 0

    def open(self) -> Journal:
        """Begin the next epoch."""
        return Journal.open(self.directory)[0]

    def file(self, epoch: int, **values: Any) -> dict[str, Written]:
        """Write the outputs of tasks to a checkpoint file, which no record names yet."""
        items = []
        for name, value in values.items():
            plan = serialize.pack(value)
            items.append(Item(name, name, plan.meta, plan.to_bytes()))
        self._sequence += 1
        written = write_group(self.checkpoints, f"{epoch:08d}-0.0-{self._sequence:09d}.h5", items)
        return dict(zip(values, written, strict=True))

    def commit(self, journal: Journal, attempt: int = 0, **values: Any) -> str:
        """Commit outputs of tasks in one checkpoint file; return its name."""
        written = self.file(journal.epoch, **values)
        for name, where in written.items():
            self.name(journal, name, where, serialize.pack(values[name]).meta, attempt)
        return next(iter(written.values())).file

    def name(self, journal: Journal, name: str, where: Written, meta: Any, attempt: int = 0) -> None:
        """Commit what has been written."""
        place = records.InCheckpoint(where.file, where.entry)
        record = records.TaskCommitted(name, attempt, 0, place, where.checksum, where.nbytes, meta.to_wire())
        journal.append(records.encode(record)).result(10)

    def inline(self, journal: Journal, name: str, value: Any) -> None:
        """Commit an output in the journal itself."""
        plan = serialize.pack(value)
        data = plan.to_bytes()
        checksum = serialize.checksum(plan.meta, data)
        place = records.Inline(data)
        record = records.TaskCommitted(name, 0, 0, place, checksum, plan.nbytes, plan.meta.to_wire())
        journal.append(records.encode(record)).result(10)

    def say(self, journal: Journal, record: records.Record) -> None:
        """Journal any record."""
        journal.append(records.encode(record)).result(10)

    def finish(self, journal: Journal, status: str = "SUCCESSFUL") -> None:
        """Journal the end of the run, and close."""
        self.say(journal, records.WorkflowFinished(status))
        journal.close()

    def files(self) -> set[str]:
        """Names of the checkpoint files there are."""
        return {path.name for path in self.checkpoints.iterdir()}


def array(seed: int, count: int = 2000) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).random(count)
