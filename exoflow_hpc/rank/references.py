"""Which objects outputs refer to, where these are, and until when they are needed (R7). Sans-IO: a part of the controller.

An object that an attempt has put is held by each output in memory that refers to it, directly or through another object. It stays in
memory while one holds it. If its bytes are lost while no file has them, each output that holds it is as good as lost itself.
That is all that recovery has to know: references are handed on along data edges only, so what holds one was computed from what its
creator returned, and the rules for lost outputs (R5, R6) do the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exoflow_hpc import records
from exoflow_hpc.rank.messages import InputPlace

__all__ = ["Key", "Put", "References", "Which", "kept_places"]

#: (task, attempt, index): the index-th object that an attempt has put
Key = tuple[int, int, int]
#: (task, attempt)
Which = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Put:
    """An object in memory."""

    nbytes: int
    #: where it was put
    rank: int
    #: what it refers to, in the order in which its bytes count them
    refers: tuple[Key, ...] = ()


class References:
    """What is known of the references of one run of a workflow, in one epoch.

    committed: task → its record, those that stand at the begin; index: of a task's name.
    """

    def __init__(self, committed: Mapping[int, records.TaskCommitted], index: Callable[[str], int]) -> None:
        self._index = index
        #: those in memory
        self._puts: dict[Key, Put] = {}
        #: output in memory → what it refers to directly, in order, and all that this leads to; those without references are not here
        self._direct: dict[Which, tuple[Key, ...]] = {}
        self._all: dict[Which, tuple[Key, ...]] = {}
        #: object in memory or on disk → outputs in memory that hold it; never empty
        self._holders: dict[Key, set[Which]] = {}
        #: those whose bytes are durable
        self._durable: dict[Key, records.Reference] = {}
        #: the same → what they refer to, in order
        self._refers: dict[Key, tuple[Key, ...]] = {}
        for record in committed.values():
            self.stands(record)

    # -- outputs in memory

    def made(self, which: Which, direct: Sequence[Key], puts: Mapping[Key, Put]) -> None:
        """An output is in memory that refers to *direct*, with the objects that its attempt has put."""
        if not direct or which in self._direct:
            return
        self._puts.update(puts)
        self._direct[which] = tuple(direct)
        self._all[which] = tuple(self._closure(direct))
        for key in self._all[which]:
            self._holders.setdefault(key, set()).add(which)

    def gone(self, which: Which) -> list[Key]:
        """An output is not in memory any more, or needed no more; return what is in memory and that nobody holds now: forgotten here."""
        self._direct.pop(which, None)
        free = []
        for key in self._all.pop(which, ()):
            holders = self._holders[key]
            holders.discard(which)
            if not holders:
                del self._holders[key]
                if self._puts.pop(key, None) is not None:
                    free.append(key)
        return free

    def lost(self, keys: Iterable[Key]) -> list[Which]:
        """Objects have no copy in memory any more; return the outputs that are lost with them, since no file has them either."""
        found: dict[Which, None] = {}
        for key in keys:
            self._puts.pop(key, None)
            if key not in self._durable:
                found.update(dict.fromkeys(sorted(self._holders.get(key, ()))))
        return list(found)

    def missing(self, which: Which) -> list[Key]:
        """Return what an output refers to and nobody has any more: what was lost, or given up, while its attempt ran."""
        return [key for key in self.all_of(which) if key not in self._puts and key not in self._durable]

    @property
    def in_memory(self) -> list[Key]:
        """All objects that are in memory."""
        return list(self._puts)

    def nbytes(self, which: Which) -> int:
        """Return the bytes of all that an output refers to."""
        return sum(
            self._puts[key].nbytes if key in self._puts else self._durable[key].nbytes
            for key in self._all.get(which, ())
            if key in self._puts or key in self._durable
        )

    def all_of(self, which: Which) -> tuple[Key, ...]:
        """Return all that an output in memory refers to, the direct ones first, in their order."""
        return self._all.get(which, ())

    # -- on disk

    def to_write(self, keys: Iterable[Key]) -> dict[Key, int]:
        """Return which of *keys* are not durable → the rank where they were put, -1 if they are not in memory either."""
        return {key: self._puts[key].rank if key in self._puts else -1 for key in keys if key not in self._durable}

    def written(
        self, key: Key, name: str, place: records.InCheckpoint, checksum: str, nbytes: int, meta: list[Any]
    ) -> bool:
        """An object is durable, in a file of this epoch; False if nobody needs it any more. *name*: of the task that has put it."""
        put = self._puts.get(key)
        if key not in self._durable:
            if put is None:
                return False
            self._durable[key] = records.Reference(name, key[1], key[2], place, checksum, nbytes, meta)
            self._refers[key] = put.refers
        return True

    def stands(self, record: records.TaskCommitted) -> None:
        """The journal names a record: what it refers to is durable."""
        keys = [self.key(one) for one in record.references]
        for key, one in zip(keys, record.references, strict=True):
            self._durable.setdefault(key, one)
            self._refers.setdefault(key, tuple(keys[position] for position in one.refers))

    def table(self, keys: Sequence[Key]) -> list[records.Reference]:
        """Return what a record says of *keys*, which are all of an output's, and durable."""
        places = {key: position for position, key in enumerate(keys)}
        found = []
        for key in keys:
            one = self._durable[key]
            refers = [places[inner] for inner in self._refers[key]]
            found.append(
                records.Reference(
                    one.task, one.attempt, one.index, one.location, one.checksum, one.nbytes, one.meta, refers
                )
            )
        return found

    def key(self, one: records.Reference) -> Key:
        """Return the key of what a record names."""
        return self._index(one.task), one.attempt, one.index

    # -- for whoever reads them

    def places(self, inputs: Sequence[tuple[InputPlace, Sequence[Key]]]) -> list[InputPlace]:
        """Have each of *inputs* say what it refers to, by position in the places that are returned."""
        keys = self._closure([key for _, direct in inputs for key in direct])
        where = {key: position for position, key in enumerate(keys)}
        for place, direct in inputs:
            place.refers.extend(where[key] for key in direct)
        return [self._place(key, [where[inner] for inner in self._inner(key)]) for key in keys]

    def direct(self, which: Which) -> tuple[Key, ...]:
        """Return what an output in memory refers to directly, in order."""
        return self._direct.get(which, ())

    def _place(self, key: Key, refers: list[int]) -> InputPlace:
        task, attempt, index = key
        if key not in self._durable or key in self._puts:  # one that was lost just now is looked for in vain
            return InputPlace(task, "memory", attempt, index=index, refers=refers)
        one = self._durable[key]
        where = one.location
        return InputPlace(
            task,
            "checkpoint",
            attempt,
            file=where.file,
            entry=where.entry,
            checksum=one.checksum,
            index=index,
            refers=refers,
        )

    def _inner(self, key: Key) -> tuple[Key, ...]:
        put = self._puts.get(key)
        return self._refers.get(key, ()) if put is None else put.refers

    def _closure(self, direct: Iterable[Key]) -> list[Key]:
        """Return *direct* and all that it leads to, in a fixed order that begins with *direct*, each once."""
        found = dict.fromkeys(direct)
        pending = list(found)
        for key in pending:
            for inner in self._inner(key):
                if inner not in found:
                    found[inner] = None
                    pending.append(inner)
        return list(found)


def kept_places(references: Sequence[records.Reference], first: int, index: Callable[[str], int]) -> list[InputPlace]:
    """Return the places of what an input that was kept for a rollback refers to; *first*: position of the first of them."""
    return [
        InputPlace(
            index(one.task),
            "kept",
            one.attempt,
            file=one.location.file,
            entry=one.location.entry,
            checksum=one.checksum,
            index=one.index,
            refers=[first + position for position in one.refers],
        )
        for one in references
    ]
