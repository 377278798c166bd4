"""A compiled workflow: flat, immutable, and in one file."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import msgpack

from .errors import CorruptCheckpointError, ExoFlowError
from .payload import load_arguments, load_function, load_value

__all__ = ["SEPARATOR", "TaskSpec", "WorkflowSpec"]

#: between the name of a task and those of the tasks that it continues with; names that users give have none
SEPARATOR = "/"

#: at the begin of the file; the digit is the version of what follows
_MAGIC = b"EXOSPEC1"
_HEADER = struct.Struct("<8sQ32s")


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """One task, as the scheduler, the worker and the journal know it. Dependencies are indices of tasks."""

    #: position in `WorkflowSpec.tasks`; every dependency has a smaller one
    index: int
    #: unique in the workflow, the same in every run with the same DAG
    name: str
    #: ``"task"`` (a function, on a worker) or ``"reduce"`` (array outputs combined by the rank)
    kind: str
    #: key of the blob with the function; empty for a reduce
    function: str
    #: pickle of (args, kwargs) with placeholders; empty for a reduce
    args: bytes
    #: tasks whose outputs it takes, without repeats, in the order of first use
    data: tuple[int, ...]
    #: tasks that have to be finished before it starts
    after: tuple[int, ...]
    #: tasks whose outputs have to be committed before it starts
    barriers: tuple[int, ...]
    #: ``"sync"``, ``"async"``, ``"skip"``, or ``"auto"``: the workflow says nothing either, so its cost decides when it is known
    checkpoint: str
    max_retries: int
    #: key of the blob with the tuple of exception types to retry; empty: none
    retry: str
    #: operation of a reduce; empty for a task. A reduce has to be done in source order (`deterministic=True`), since a
    #: task that is run again has to give the same bits
    op: str
    #: keys of the blobs that `args` refers to
    blobs: tuple[str, ...]
    #: gives the same output for the same inputs
    deterministic: bool = True
    #: has an effect outside of the workflow
    external: bool = False
    #: repeating that effect is harmless
    idempotent: bool = False
    #: key of the blob with the function that undoes the effect; empty: none
    rollback: str = ""
    #: seconds that an attempt may take in its worker
    timeout: float | None = None
    #: bytes that an attempt may allocate
    memory: int | None = None
    #: the output is (value, None) or (None, error)
    catch_exceptions: bool = False
    #: seconds before the first retry; None: `Settings.retry_backoff`
    retry_delay: float | None = None

    def arguments(self, output: Any, blob: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return (args, kwargs): ``output(index)`` gives the output of a task, ``blob(key)`` the value of a blob."""
        return load_arguments(self.args, lambda position: output(self.data[position]), blob)

    @property
    def scope(self) -> str:
        """Name of the task that has continued with the DAG that it is of; empty: it was submitted."""
        return self.name.rpartition(SEPARATOR)[0]

    @property
    def needed_blobs(self) -> tuple[str, ...]:
        """Keys of all blobs that a worker needs to run it."""
        return tuple(key for key in (self.function, self.retry, *self.blobs) if key)


@dataclass(frozen=True)
class WorkflowSpec:
    """A workflow that can be run, stored and sent: `to_bytes` and `from_bytes` are inverse."""

    #: in topological order
    tasks: tuple[TaskSpec, ...]
    #: index of the task whose output is the workflow's; always committed
    output: int
    #: hex digits; equal for the same DAG with the same inputs in any process, see `fingerprint`
    fingerprint: str
    #: pickles of functions, inputs and large constants, by hash
    blobs: dict[str, bytes] = field(repr=False)
    #: names of the inputs that were given
    inputs: tuple[str, ...] = ()
    #: directories for a worker to put at the begin of `sys.path`: user modules are imported, only the workflow file is
    #: not
    sys_path: tuple[str, ...] = ()
    #: task that has continued → task whose output is its output (see `expansion`)
    ends: dict[int, int] = field(default_factory=dict)

    @cached_property
    def _indices(self) -> dict[str, int]:
        return {task.name: task.index for task in self.tasks}

    def find(self, name: str) -> int | None:
        """Return the index of the task of that name, None if there is none: what a voided continuation has brought may be gone."""
        return self._indices.get(name)

    def index(self, name: str) -> int:
        """Return the index of the task of that name; ExoFlowError names those that are like it."""
        try:
            return self._indices[name]
        except KeyError:
            import difflib

            close = difflib.get_close_matches(name, self._indices, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"its output is {self.tasks[self.output].name!r}"
            raise ExoFlowError(f"the workflow has no task {name!r}: {hint}") from None

    def function(self, task: int) -> Any:
        """Return the function of a task, unpickled anew."""
        return load_function(self.blobs[self.tasks[task].function])

    def blob(self, key: str) -> Any:
        """Return the value of a blob, unpickled anew."""
        return load_value(self.blobs[key])

    def is_retryable(self, task: int, error: BaseException) -> bool:
        """Whether *error*, raised by the task, is of its `retry_exceptions`."""
        key = self.tasks[task].retry
        return bool(key) and isinstance(error, self.blob(key))

    def to_bytes(self) -> bytes:
        """Return the contents of the spec file, checksum included."""
        tasks = [
            [
                t.name,
                t.kind,
                t.function,
                t.args,
                t.data,
                t.after,
                t.barriers,
                t.checkpoint,
                t.max_retries,
                t.retry,
                t.op,
                t.blobs,
                t.deterministic,
                t.external,
                t.idempotent,
                t.rollback,
                t.timeout,
                t.memory,
                t.catch_exceptions,
                t.retry_delay,
            ]
            for t in self.tasks
        ]
        table = {
            "tasks": tasks,
            "output": self.output,
            "fingerprint": self.fingerprint,
            "inputs": self.inputs,
            "sys_path": self.sys_path,
            # the blobs follow the table as they are: msgpack can't hold one of 4 GiB
            "blobs": [(key, len(data)) for key, data in self.blobs.items()],
        }
        if self.ends:
            table["ends"] = list(self.ends.items())
        body = msgpack.packb(table, unicode_errors="surrogateescape")
        checksum = hashlib.blake2b(len(body).to_bytes(8, "little") + body, digest_size=32)
        for data in self.blobs.values():
            checksum.update(data)
        return b"".join([_HEADER.pack(_MAGIC, len(body), checksum.digest()), body, *self.blobs.values()])

    @classmethod
    def from_bytes(cls, contents: bytes, where: str = "the workflow's spec") -> WorkflowSpec:
        """Return the spec of a file's *contents*; CorruptCheckpointError names *where* if a bit is wrong or missing."""
        view = memoryview(contents)
        if len(view) < _HEADER.size:
            raise CorruptCheckpointError(f"{where} is torn: it has {len(view)} bytes, not even a header")
        magic, size, checksum = _HEADER.unpack_from(view)
        if magic != _MAGIC:
            raise CorruptCheckpointError(
                f"{where} is not a spec of this version: it begins with {magic!r}, not {_MAGIC!r}"
            )
        actual = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=32)
        actual.update(view[_HEADER.size :])
        if actual.digest() != checksum:
            raise CorruptCheckpointError(
                f"{where} is corrupt: its {len(view)} bytes do not have the checksum in its header"
            )
        table = msgpack.unpackb(
            view[_HEADER.size : _HEADER.size + size], use_list=False, unicode_errors="surrogateescape"
        )
        position = _HEADER.size + size
        blobs: dict[str, bytes] = {}
        for key, length in table["blobs"]:
            blobs[key] = bytes(view[position : position + length])
            position += length
        tasks = tuple(TaskSpec(index, *row) for index, row in enumerate(table["tasks"]))
        ends = dict(table.get("ends", ()))
        return cls(tasks, table["output"], table["fingerprint"], blobs, table["inputs"], table["sys_path"], ends)

    def __reduce__(self) -> tuple[Any, ...]:
        # one way to travel, checked on arrival
        return WorkflowSpec.from_bytes, (self.to_bytes(),)
