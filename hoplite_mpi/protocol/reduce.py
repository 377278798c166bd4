"""One reduce, at its coordinator: the owner of the result's id."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Protocol as Interface

from hoplite_mpi.ids import ObjectID
from hoplite_mpi.meta import Meta
from hoplite_mpi.protocol import messages as ms
from hoplite_mpi.protocol.cost import choose, fixed_shape
from hoplite_mpi.protocol.events import InlineReduced, ReduceInline
from hoplite_mpi.protocol.port import Port
from hoplite_mpi.protocol.trees import Tree
from hoplite_mpi.protocol.view import View

__all__ = ["Host", "Reduction"]


class Host(Interface):
    """What a reduce does to the directory entry of its result."""

    def streaming(self, rid: ObjectID, version: int, meta: Meta, root: int) -> None:
        """*root* begins to write a new version; older ones are void."""

    def voided(self, rid: ObjectID) -> None:
        """There is no version at present."""

    def finalized(self, rid: ObjectID, version: int, sources: frozenset[ObjectID]) -> None:
        """The version that was streaming is complete and final."""

    def finalized_inline(
        self, rid: ObjectID, version: int, meta: Meta, data: bytes, sources: frozenset[ObjectID]
    ) -> None:
        """The result is these bytes."""

    def failed(self, rid: ObjectID, text: str) -> None:
        """The reduce can't be carried out."""


@dataclass(frozen=True, slots=True)
class _Slot:
    """A filled slot."""

    source: ObjectID
    rank: int
    incarnation: int
    #: raised whenever what flows out of the slot may change: with the slot itself, or with one below it
    generation: int


class Reduction:
    """A reduce that is not final. Every source is in exactly one of: awaited, backups, slots, inputs, gone.

    An ordered one gives each source the slot of its place in the list, whenever it comes; others fill slots in the order of arrival.
    One that skips what is lost goes on with fewer sources then: with a smaller tree, from the beginning.
    """

    def __init__(self, port: Port, host: Host, spec: ms.ReduceSpec) -> None:
        self._port = port
        self._host = host
        self.spec = spec
        self._meta: Meta | None = None
        self._first: ObjectID | None = None
        self._tree: Tree | None = None
        #: an ordered reduce's sources by their slots in the tree
        self._order: tuple[ObjectID, ...] = ()
        #: sources that will never come
        self._gone: set[ObjectID] = set()
        #: sources whose owner was asked and has not answered
        self._awaited: set[ObjectID] = set()
        #: sources that are there and have no slot, oldest first, with their holders
        self._backups: dict[ObjectID, tuple[int, int]] = {}
        self._slots: dict[int, _Slot] = {}
        #: star: bytes of the inline sources, in the order they came
        self._inputs: dict[ObjectID, bytes] = {}
        #: star: those that were given out to be reduced
        self._summed: tuple[ObjectID, ...] = ()
        #: rank that asked for it, if known: its source becomes the root
        self.caller: int | None = None
        #: generation of the root or of the star; None while nothing flows
        self.version: int | None = None
        #: final or failed: nothing is done any more
        self.over = False

    def begin(self) -> None:
        """Ask for all sources."""
        for oid in self.spec.sources:
            self._await(oid)

    def awaits(self, oid: ObjectID) -> bool:
        """Whether this reduce waits for that source."""
        return oid in self._awaited

    @property
    def streaming(self) -> tuple[int, Meta, int] | None:
        """(version, meta, rank of the root) of what flows now; None: nothing, or a star."""
        if self._tree is None or self._meta is None or self._tree.root not in self._slots:
            return None
        root = self._slots[self._tree.root]
        return root.generation, self._meta, root.rank

    # -- sources -------------------------------------------------------------------------------------------------------

    def arrived(self, message: ms.Source) -> None:
        """A source is there. Whatever is not awaited is known already, and counts once."""
        oid, meta = message.oid, message.meta
        if self.over or oid not in self._awaited:
            return
        self._awaited.discard(oid)
        if self._meta is None:
            self._meta, self._first = meta, oid
            if message.inline is None:
                self._plant()
        elif meta != self._meta:
            self._fail(f"sources differ: {self._first!r} is {_describe(self._meta)}, {oid!r} is {_describe(meta)}")
            return
        if self._tree is not None:
            self._backups[oid] = (message.rank, message.incarnation)
        elif message.inline is not None:
            self._inputs[oid] = message.inline
        else:  # Config.inline_limit differs between ranks
            self._fail(f"{self._first!r} is held inline and {oid!r}, of the same size, is not")
            return
        self._advance()

    def gone(self, oid: ObjectID, text: str) -> None:
        """A source will never come."""
        if self.over or oid not in self._awaited:
            return
        self._awaited.discard(oid)
        self._gone.add(oid)
        left = len(self.spec.sources) - len(self._gone)
        if left < (1 if self.spec.skip_lost else self.spec.num_objects):
            self._fail(f"only {left} of the {self.spec.num_objects} sources needed can still come: {text}")
            return
        self._advance()

    @property
    def _size(self) -> int:
        """Number of sources that go into the result."""
        return min(self.spec.num_objects, len(self.spec.sources) - len(self._gone))

    def _await(self, oid: ObjectID) -> None:
        self._awaited.add(oid)
        self._port.send(self._port.owner(oid), ms.SourceWatch(self._port.number, oid, self._last(oid)))

    def _last(self, oid: ObjectID) -> bool:
        """Whether nobody will put that source any more."""
        return oid.origin is not None and not self._port.view.has(*oid.origin)

    def _advance(self) -> None:
        """Do all that can be done with the sources that are there."""
        if self._tree is None:
            self._compute()
            return
        if len(self._tree) != self._size and not any(self._last(oid) for oid in self._awaited):  # else more may be gone
            self._plant()
        self._fill()

    # -- star ----------------------------------------------------------------------------------------------------------

    def _compute(self) -> None:
        n = self._size
        if len(self._inputs) < n or self.version is not None or self._meta is None:
            return
        self.version = self._port.generation()
        there = (oid for oid in self.spec.sources if oid in self._inputs) if self.spec.ordered else iter(self._inputs)
        self._summed = tuple(itertools.islice(there, n))
        inputs = tuple(self._inputs[oid] for oid in self._summed)
        self._port.emit(ReduceInline(self.spec.rid, self.version, self.spec.op, inputs, self._meta))

    def computed(self, event: InlineReduced) -> None:
        """The star's result is there."""
        if self.over or event.version != self.version or self._tree is not None:
            return
        if event.error is not None:
            self._fail(event.error)
            return
        self.over = True
        self._host.finalized_inline(self.spec.rid, event.version, event.meta, event.data, frozenset(self._summed))

    # -- tree ----------------------------------------------------------------------------------------------------------

    def _plant(self) -> None:
        """Begin with a tree for the sources that can still come; one that was there before is void."""
        assert self._meta is not None
        placed = [self._slots[slot] for slot in sorted(self._slots)]
        if placed:
            self._vacate(set(self._slots))
        self._backups = {s.source: (s.rank, s.incarnation) for s in placed} | self._backups
        self._tree = self._shape(self._meta)
        self._order = tuple(oid for oid in self.spec.sources if oid not in self._gone) if self.spec.ordered else ()

    def _shape(self, meta: Meta) -> Tree:
        n, port, shape, degree = self._size, self._port, self.spec.shape, self.spec.degree
        if self.spec.ordered:  # what is measured differs from run to run
            return fixed_shape(n, meta.nbytes, shape, degree).tree
        links, chunk = port.links.ruling(port.view)[1], port.links.chunk_size(port.view)
        return choose(n, meta.nbytes, links.latency, links.bandwidth, chunk, shape, degree).tree

    def _fill(self) -> None:
        assert self._tree is not None
        free = [slot for slot in range(len(self._tree)) if slot not in self._slots]
        root = self._tree.root
        if root in free and not self._order:
            # The result comes to the caller over the link that its slot takes in streams by, unless its source is the root.
            first = list(self._backups)[: len(free)]
            own = [oid for oid in first if self._backups[oid][0] == self.caller]
            if own:
                free.remove(root)
                self._seat(root, own[0])
        for slot in free:
            if not self._backups:
                return
            oid = self._order[slot] if self._order else next(iter(self._backups))
            if oid in self._backups:
                self._seat(slot, oid)

    def _seat(self, slot: int, oid: ObjectID) -> None:
        """Give a free slot to a source that waits, and link it to its parent."""
        assert self._tree is not None
        rank, incarnation = self._backups.pop(oid)
        self._place(slot, oid, rank, incarnation)
        parent = self._tree.parent[slot]
        if parent in self._slots:
            self._link(parent, slot)

    def _place(self, slot: int, source: ObjectID, rank: int, incarnation: int) -> None:
        """Give a slot to a source, with a new generation; the links from its children, but not to its parent."""
        tree, meta, spec = self._tree, self._meta, self.spec
        assert tree is not None and meta is not None
        generation = self._port.generation()
        self._slots[slot] = _Slot(source, rank, incarnation, generation)
        is_root = slot == tree.root
        children = tree.children[slot]
        start = ms.SlotStart(
            self._port.number,
            spec.rid,
            slot,
            generation,
            spec.op,
            source,
            meta,
            len(children),
            len(tree),
            is_root,
        )
        self._port.send(rank, start)
        for child in children:
            if child in self._slots:
                self._link(slot, child)
        if is_root:
            self.version = generation
            self._host.streaming(spec.rid, generation, meta, rank)

    def _link(self, parent: int, child: int) -> None:
        assert self._tree is not None
        above, below = self._slots[parent], self._slots[child]
        self._port.send(
            above.rank,
            ms.SlotChild(
                self._port.number,
                self.spec.rid,
                parent,
                above.generation,
                child,
                below.generation,
                below.rank,
                below.incarnation,
                not self._tree.children[child],
            ),
        )

    def _vacate(self, slots: set[int]) -> None:
        """Empty these slots; those above them start again, since what they have taken in is void. All others go on."""
        tree = self._tree
        assert tree is not None
        for slot in slots:
            old = self._slots.pop(slot)
            if self._port.view.has(old.rank, old.incarnation):
                self._port.send(old.rank, ms.SlotStop(self._port.number, self.spec.rid, slot, old.generation))
        above = {a for slot in slots for a in tree.ancestors(slot)}
        if tree.root in above | slots and self.version is not None:
            self.version = None
            self._host.voided(self.spec.rid)
        again = [slot for slot in above if slot in self._slots]
        # from the bottom, so that each is told its children's new generations
        for slot in sorted(again, key=lambda s: -len(tree.ancestors(s))):
            old = self._slots[slot]
            self._place(slot, old.source, old.rank, old.incarnation)

    def _current(self, slot: int, generation: int) -> bool:
        return not self.over and slot in self._slots and self._slots[slot].generation == generation

    def root_done(self, message: ms.RootDone) -> None:
        """The root has all of it: make this version final, once."""
        if self._tree is None or message.slot != self._tree.root or not self._current(message.slot, message.generation):
            return
        self.over = True
        self._host.finalized(self.spec.rid, message.generation, frozenset(s.source for s in self._slots.values()))
        self._stop_slots()

    def slot_lost(self, message: ms.SlotLost) -> None:
        """A slot can't be had where it is."""
        if not self._current(message.slot, message.generation):
            return
        if message.kind != "source":
            self._fail(message.text)
            return
        source = self._slots[message.slot].source
        self._vacate({message.slot})
        self._await(source)
        self._advance()

    def child_lost(self, message: ms.ChildLost) -> None:
        """A slot can't get a child's stream though both live.

        A backup takes the child's place, or it is tried again.
        """
        child = message.child_slot
        if not self._current(message.slot, message.generation) or not self._current(child, message.child_generation):
            return
        if not self._backups or self._order:
            self._link(message.slot, child)
            return
        old = self._slots[child]
        self._vacate({child})
        self._fill()
        self._backups[old.source] = (old.rank, old.incarnation)

    # -- views ---------------------------------------------------------------------------------------------------------

    def install(self, view: View, reported: set[tuple[int, int, int]]) -> None:
        """Go on in a new view.

        reported: (rank, slot, generation) of all slots of this reduce that members have started. What was sent in the
        older view may be lost: a slot that its holder doesn't know gets a new generation, like a dead one.
        """
        dead = {i for i, s in self._slots.items() if not view.has(s.rank, s.incarnation)}
        unknown = {i for i, s in self._slots.items() if i not in dead and (s.rank, i, s.generation) not in reported}
        waiting = self._backups
        self._backups = {
            self._slots[i].source: (self._slots[i].rank, self._slots[i].incarnation) for i in sorted(unknown)
        }
        self._backups.update({oid: holder for oid, holder in waiting.items() if view.has(*holder)})
        lost = {self._slots[i].source for i in dead} | (waiting.keys() - self._backups.keys())
        if dead or unknown:
            self._vacate(dead | unknown)
        for oid in sorted(self._awaited | lost):
            self._await(oid)
        if self._tree is not None:
            for parent in self._slots:
                for child in self._tree.children[parent]:
                    if child in self._slots:
                        self._link(parent, child)
            self._advance()
        current = {(s.rank, i, s.generation) for i, s in self._slots.items()}
        for rank, slot, generation in sorted(reported - current):  # of another coordinator, whose stop may be lost
            self._port.send(rank, ms.SlotStop(self._port.number, self.spec.rid, slot, generation))

    def cancel(self) -> None:
        """End it: the result was deleted, or came from elsewhere."""
        self.over = True
        self._stop_slots()

    def _fail(self, text: str) -> None:
        self.cancel()
        self._host.failed(self.spec.rid, text)

    def _stop_slots(self) -> None:
        for slot, s in self._slots.items():
            self._port.send(s.rank, ms.SlotStop(self._port.number, self.spec.rid, slot, s.generation))
        self._slots.clear()


def _describe(meta: Meta) -> str:
    if meta.dtype is None:
        return f"{meta.nbytes} bytes"
    return f"{meta.dtype} of shape {meta.shape}"
