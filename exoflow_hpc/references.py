"""Objects by reference: values that a task puts beside its output, to be passed on by name and read by whoever needs them (R7).

In the bytes of a value a `Ref` is a number: its place among all that this value refers to. What these are is said beside the
bytes, in messages and records, so the bytes, and their checksum, are the same in every attempt. `collecting` and `resolving`
connect the two ends to pickle.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol

from . import checkpoint, records, serialize
from .context import context
from .errors import CorruptCheckpointError, ExoFlowError

__all__ = ["Key", "Ref", "StoredObjects", "collecting", "get", "put", "resolving"]

#: (task, attempt, index): the index-th object that an attempt of a task has put. No two objects of a workflow share one
Key = tuple[str, int, int]


class Objects(Protocol):
    """Where the objects are that some `Ref` stand for."""

    def value(self, ref: Ref) -> Any:
        """Return the object. ExoFlowError if it can't be had."""

    @property
    def is_open(self) -> bool:
        """Whether this is an attempt that still runs: only there a `Ref` can become part of another value."""


class Ref:
    """The name of an object that a task has put; `get` reads it. Made by `put` and by outputs that contain one.

    It may be part of what a task of the same workflow returns or puts. TypeError if it is pickled anywhere else: nobody there could
    read it.
    """

    __slots__ = ("_key", "_objects")

    def __init__(self, key: Key, objects: Objects) -> None:
        self._key = key
        self._objects = objects

    @property
    def task(self) -> str:
        """Name of the task that has put it."""
        return self._key[0]

    @property
    def key(self) -> Key:
        """(task, attempt, index): what it is the name of."""
        return self._key

    @property
    def objects(self) -> Objects:
        """Where it can be read."""
        return self._objects

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ref) and self._key == other._key and self._objects is other._objects

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"<Ref to object {self._key[2]} of task {self._key[0]!r}>"

    def __copy__(self) -> Ref:
        return self

    def __deepcopy__(self, memo: Any) -> Ref:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        found = _collected.get()
        if found is None:
            raise TypeError(
                f"{self!r} can't be pickled here: it can be part of what a task of its workflow returns or puts, and nothing else. "
                "Pass on ef.get(ref), its value, instead"
            )
        return _resolve, (found.add(self),)


class Collected:
    """What a value refers to, in the order in which its bytes count them."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._positions: dict[Key, int] = {}

    @property
    def keys(self) -> tuple[Key, ...]:
        """What was found."""
        return tuple(self._positions)

    def add(self, ref: Ref) -> int:
        """Return the place of *ref*. TypeError if it is not the running task's own, nor came with its inputs."""
        if ref.objects is not self._objects or not self._objects.is_open:
            raise TypeError(
                f"{ref!r} belongs to another task or workflow: a task can return or put only what it has put itself, or was given. "
                "Give it the output that contains the reference, or return ef.get(ref)"
            )
        return self._positions.setdefault(ref.key, len(self._positions))


_collected: ContextVar[Collected | None] = ContextVar("exoflow_hpc_collected", default=None)
_known: ContextVar[Sequence[Ref] | None] = ContextVar("exoflow_hpc_known", default=None)


@contextlib.contextmanager
def collecting(objects: Objects) -> Iterator[Collected]:
    """Let values be packed in the block that contain references to *objects*; what they were is in what is yielded."""
    found = Collected(objects)
    token = _collected.set(found)
    try:
        yield found
    finally:
        _collected.reset(token)


@contextlib.contextmanager
def resolving(refs: Sequence[Ref]) -> Iterator[None]:
    """Let a value be unpacked in the block that refers to *refs*, as `Collected.keys` has counted them."""
    token = _known.set(refs)
    try:
        yield
    finally:
        _known.reset(token)


def _resolve(position: int) -> Ref:
    known = _known.get()
    if known is None or not 0 <= position < len(known):
        raise ExoFlowError("this value refers to an object that did not come with it: read it with ef.get_output")
    return known[position]


# -- for tasks, and for whoever reads their outputs ----------------------------------------------------------------------------------


def put(value: Any) -> Ref:
    """Keep *value* in the shared memory of this node, beside the output of the running task, and return a reference to it; copies it once.

    Whoever is given the reference, in an output or in another object that was put, can read it with `get`. What no output
    refers to when the task has returned is dropped. ExoFlowError outside of a task; TypeError if the value can't be pickled;
    StoreFullError if there is no room.
    """
    try:
        objects = context().objects
    except ExoFlowError:
        objects = None
    if objects is None:
        raise ExoFlowError("ef.put() works only inside a running task: outside of one, nobody keeps what was put")
    ref: Ref = objects.put(value)
    return ref


def get(ref: Ref) -> Any:
    """Return the object that *ref* stands for; arrays are read-only.

    In a task it is in the node's memory, and no copy is made. Elsewhere, for a reference in what `run` or `get_output` has
    returned, it is read from its checkpoint; blocks on storage then. TypeError if *ref* is something else; ExoFlowError if it
    belongs to a task that is over; CorruptCheckpointError if its bytes are damaged, or gone.
    """
    if not isinstance(ref, Ref):
        raise TypeError(
            f"ef.get() takes a reference that ef.put() has returned, not {type(ref).__name__}: outputs of tasks come as their values"
        )
    return ref.objects.value(ref)


class StoredObjects:
    """What a committed output refers to, in its checkpoints."""

    #: they can be read, and no more
    is_open = False

    def __init__(self, workflow_dir: Path, references: Sequence[records.Reference]) -> None:
        self._directory = workflow_dir
        self._references = references
        self._by_key = {(one.task, one.attempt, one.index): one for one in references}

    def refs(self) -> list[Ref]:
        """Return a `Ref` for each, in their order."""
        return [Ref(key, self) for key in self._by_key]

    def value(self, ref: Ref) -> Any:
        """Return an object. CorruptCheckpointError, StorageError."""
        one = self._by_key[ref.key]
        try:
            meta, data = checkpoint.read(self._directory, one.location.file, one.location.entry, one.checksum)
        except CorruptCheckpointError as error:
            if (self._directory / "checkpoints" / one.location.file).exists():
                raise
            raise CorruptCheckpointError(
                f"the bytes of {ref!r} are gone with {one.location.file}: the workflow {self._directory.name!r} was deleted, or has "
                "voided or expired the output that referred to them; read its output again, or run it anew"
            ) from error
        refs = self.refs()
        with resolving([refs[position] for position in one.refers]):
            return serialize.unpack(meta, data)
