"""The reduce slots of one rank."""

from __future__ import annotations

from dataclasses import dataclass, field

from hoplite_mpi.ids import ObjectID
from hoplite_mpi.protocol import messages as ms
from hoplite_mpi.protocol.events import ChildFailed, PullChild, SlotDone, SlotFailed, StartSlot, StopSlot
from hoplite_mpi.protocol.port import Port

__all__ = ["Participant"]


@dataclass
class _Slot:
    generation: int
    is_root: bool
    #: child slot → newest generation known
    children: dict[int, int] = field(default_factory=dict)
    done: bool = False
    #: what could not be told to a coordinator of an older view; told again in the next
    failed: SlotFailed | None = None
    lost: set[tuple[int, int]] = field(default_factory=set)


class Participant:
    """Carries out what the coordinators of reduces say; a slot has one generation at a time, and it only rises."""

    def __init__(self, port: Port) -> None:
        self._port = port
        self._slots: dict[tuple[ObjectID, int], _Slot] = {}

    def start(self, message: ms.SlotStart, holds_source: bool) -> bool:
        """Start a slot, ending an older generation of it; False if it is stale or its source is not here."""
        key = (message.rid, message.slot)
        old = self._slots.get(key)
        if old is not None and old.generation >= message.generation:
            return False
        if old is not None:
            self._end(key)
        if not holds_source:
            text = f"{message.source!r} is not on rank {self._port.rank}"
            lost = ms.SlotLost(self._port.number, message.rid, message.slot, message.generation, "source", text)
            self._to_coordinator(message.rid, lost)
            return False
        self._slots[key] = _Slot(message.generation, message.is_root)
        self._port.emit(
            StartSlot(
                message.rid,
                message.slot,
                message.generation,
                message.op,
                message.source,
                message.meta,
                message.num_children,
                message.num_objects,
                message.is_root,
            )
        )
        return True

    def child(self, message: ms.SlotChild) -> None:
        """Pull a child's stream, unless it is being pulled already."""
        slot = self._slots.get((message.rid, message.slot))
        if slot is None or slot.generation != message.generation:
            return
        link = (message.child_slot, message.child_generation)
        if slot.children.get(message.child_slot) == message.child_generation and link not in slot.lost:
            return
        slot.children[message.child_slot] = message.child_generation
        slot.lost.discard(link)
        self._port.emit(
            PullChild(
                message.rid, message.slot, message.generation, *link, message.rank, message.incarnation, message.leaf
            )
        )

    def stop(self, message: ms.SlotStop) -> None:
        """End a slot of at most that generation."""
        slot = self._slots.get((message.rid, message.slot))
        if slot is not None and slot.generation <= message.generation:
            self._end((message.rid, message.slot))

    def stop_all(self, rid: ObjectID) -> None:
        """End all slots of a reduce whose result was deleted."""
        for key in [key for key in self._slots if key[0] == rid]:
            self._end(key)

    def handle_event(self, event: SlotDone | SlotFailed | ChildFailed) -> None:
        """Tell the coordinator, unless the slot has moved on."""
        slot = self._slots.get((event.rid, event.slot))
        if slot is None or slot.generation != event.generation:
            return
        if isinstance(event, SlotDone):
            slot.done = True
        elif isinstance(event, SlotFailed):
            slot.failed = event
        elif slot.children.get(event.child_slot) == event.child_generation:
            slot.lost.add((event.child_slot, event.child_generation))
        else:
            return
        for message in self._tell(event.rid, event.slot, slot):
            self._to_coordinator(event.rid, message)

    def records(self) -> list[ms.SlotRecord]:
        """Return what a report says about the slots."""
        return [ms.SlotRecord(rid, index, slot.generation) for (rid, index), slot in self._slots.items()]

    def requests(self) -> list[tuple[ObjectID, ms.Message]]:
        """Return all that coordinators have to know beside that, with the reduce's id.

        It may have got lost with the older view.
        """
        return [
            (rid, message) for (rid, index), slot in self._slots.items() for message in self._tell(rid, index, slot)
        ]

    def _tell(self, rid: ObjectID, index: int, slot: _Slot) -> list[ms.Message]:
        number, generation = self._port.number, slot.generation
        found: list[ms.Message] = []
        if slot.failed is not None:
            found.append(ms.SlotLost(number, rid, index, generation, slot.failed.kind, slot.failed.text))
        elif slot.done and slot.is_root:
            found.append(ms.RootDone(number, rid, index, generation))
        found += [ms.ChildLost(number, rid, index, generation, *link) for link in sorted(slot.lost)]
        return found

    def _end(self, key: tuple[ObjectID, int]) -> None:
        self._port.emit(StopSlot(*key, self._slots.pop(key).generation))

    def _to_coordinator(self, rid: ObjectID, message: ms.Message) -> None:
        self._port.send(self._port.owner(rid), message)
