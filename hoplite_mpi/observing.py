"""Looks at what goes into the object protocol of a rank and what comes out of it: counts it, and traces it where that is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hoplite_mpi.ids import ObjectID
from hoplite_mpi.protocol import events as ev
from hoplite_mpi.protocol import messages as ms
from hoplite_mpi.protocol.core import Protocol
from hoplite_mpi.trace import Recorder

__all__ = ["Counts", "Observer"]


@dataclass
class Counts:
    """What a rank has done; see `Statistics`."""

    puts: int = 0
    gets: int = 0
    objects_mapped: int = 0
    objects_received: int = 0
    slots: int = 0
    slots_restarted: int = 0
    joins: int = 0
    views: int = 0


class Observer:
    """Told each event before, and each instruction when, it is carried out. Under the engine's lock."""

    def __init__(self, trace: Recorder, rank: int, protocol: Protocol) -> None:
        self.trace = trace
        self.counts = Counts()
        self._rank = rank
        self._protocol = protocol
        #: how an object comes that is not here yet
        self._coming: dict[ObjectID, str] = {}
        #: (oid, attempt) → whose copy is being mapped
        self._mapping: dict[tuple[ObjectID, int], int] = {}
        #: newest generation of each reduce slot that was started here
        self._generations: dict[ObjectID, dict[int, int]] = {}

    # -- events ------------------------------------------------------------------------------------------------------------

    def event(self, event: ev.Event) -> None:
        """The protocol is about to be told this."""
        note = _EVENTS.get(type(event))
        if note is not None:
            note(self, event)

    def _transferred(self, event: ev.TransferDone | ev.TransferFailed) -> None:
        holder = self._mapping.pop((event.oid, event.attempt), None)
        if holder is not None and self.trace.on:
            self.trace.event("map", oid=event.oid, holder=holder, found=isinstance(event, ev.TransferDone))

    def _message(self, event: ev.MessageReceived) -> None:
        message = event.message
        if self.trace.on and isinstance(message, ms.Final):
            self.trace.event("reduce.final", oid=message.oid, version=message.version, sources=len(message.sources))

    def _plain(self, event: Any) -> None:
        if self.trace.on:
            name, fields = _TRACED[type(event)]
            self.trace.event(name, **fields(event))

    # -- instructions ------------------------------------------------------------------------------------------------------

    def instruction(self, what: ev.Instruction) -> None:
        """The protocol has said this."""
        note = _INSTRUCTIONS.get(type(what))
        if note is not None:
            note(self, what)

    def _send(self, what: ev.Send) -> None:
        message = what.message
        if self.trace.on and isinstance(message, ms.Location):
            self._location(message.oid, what.dst, message.sender, message.mapped)

    def _start_transfer(self, what: ev.StartTransfer) -> None:
        self._coming[what.oid] = "received"
        self._own_location(what.oid, what.sender, False)

    def _map_local(self, what: ev.MapLocal) -> None:
        self._coming[what.oid] = "mapped"
        self._mapping[what.oid, what.attempt] = what.holder
        self._own_location(what.oid, what.holder, True)

    def _own_location(self, oid: ObjectID, sender: int, mapped: bool) -> None:
        """A directory's answer to its own rank is no message."""
        if self.trace.on and self._protocol.view.owner(bytes(oid)) == self._rank:
            self._location(oid, self._rank, sender, mapped)

    def _location(self, oid: ObjectID, to: int, sender: int, mapped: bool) -> None:
        members, place = self._protocol.view.members, self._protocol.directory.entry(oid).places.get(sender)
        self.trace.event(
            "location",
            oid=oid,
            to=to,
            sender=sender,
            complete=place is not None and place.complete,
            same_node=members[to].node == members[sender].node,
            mapped=mapped,
        )

    def _deliver(self, what: ev.Deliver) -> None:
        how = "inline" if what.inline is not None else self._coming.pop(what.oid, "here")
        self.counts.objects_mapped += how == "mapped"
        self.counts.objects_received += how == "received"
        if self.trace.on:
            self.trace.event("get.delivered", oid=what.oid, version=what.version, how=how)

    def had(self, oid: ObjectID, version: int) -> None:
        """A get finds the object here."""
        self.counts.gets += 1
        if self.trace.on:
            self.trace.event("get", oid=oid)
            self.trace.event("get.delivered", oid=oid, version=version, how="here")

    def _gone(self, what: ev.Drop | ev.Retired) -> None:
        self._coming.pop(what.oid, None)
        if isinstance(what, ev.Retired):
            self._generations.pop(what.oid, None)

    def _start_slot(self, what: ev.StartSlot) -> None:
        generations = self._generations.setdefault(what.rid, {})
        self.counts.slots += 1
        self.counts.slots_restarted += what.slot in generations
        generations[what.slot] = what.generation
        if self.trace.on:
            self.trace.event(
                "slot.start",
                oid=what.rid,
                slot=what.slot,
                generation=what.generation,
                source=what.source,
                children=what.num_children,
                root=what.is_root,
            )


#: what is traced as it is: its name there, and its fields
_TRACED: dict[type, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    ev.ObjectStored: ("put", lambda e: {"oid": e.oid, "nbytes": e.meta.nbytes, "inline": e.inline is not None}),
    ev.PutStarted: ("put.started", lambda e: {"oid": e.oid, "nbytes": e.meta.nbytes}),
    ev.ObjectSpilled: (
        "copy.moved",
        lambda e: {"oid": e.oid, "version": e.version, "to": "disk" if e.spilled else "memory"},
    ),
    ev.Evicted: ("copy.evict", lambda e: {"oid": e.oid, "version": e.version, "granted": e.granted}),
    ev.GetRequested: ("get", lambda e: {"oid": e.oid}),
    ev.WatchRequested: ("wait", lambda e: {"oid": e.oid}),
    ev.DeleteRequested: ("delete", lambda e: {"oid": e.oid}),
    ev.ReduceRequested: (
        "reduce",
        lambda e: {"oid": e.rid, "sources": len(e.sources), "num_objects": e.num_objects or len(e.sources)},
    ),
    ev.SlotDone: ("slot.done", lambda e: {"oid": e.rid, "slot": e.slot, "generation": e.generation}),
    ev.SlotFailed: (
        "slot.failed",
        lambda e: {"oid": e.rid, "slot": e.slot, "generation": e.generation, "text": e.text},
    ),
    ev.ChildFailed: (
        "slot.failed",
        lambda e: {
            "oid": e.rid,
            "slot": e.slot,
            "generation": e.generation,
            "text": f"the stream of child {e.child_slot}, generation {e.child_generation}, ended",
        },
    ),
    ev.Stored: ("put.stored", lambda i: {"oid": i.oid}),
    ev.Available: ("wait.over", lambda i: {"oid": i.oid}),
    ev.Fail: ("failed", lambda i: {"oid": i.oid, "kind": i.kind, "text": i.text}),
    ev.PullChild: (
        "slot.child",
        lambda i: {"oid": i.rid, "slot": i.slot, "generation": i.generation, "child": i.child_slot, "peer": i.rank},
    ),
    ev.StopSlot: ("slot.stop", lambda i: {"oid": i.rid, "slot": i.slot, "generation": i.generation}),
}

_PLAIN: dict[type, Callable[[Observer, Any], None]] = dict.fromkeys(_TRACED, Observer._plain)

_EVENTS: dict[type, Callable[[Observer, Any], None]] = _PLAIN | {
    ev.MessageReceived: Observer._message,
    ev.TransferDone: Observer._transferred,
    ev.TransferFailed: Observer._transferred,
}

_INSTRUCTIONS: dict[type, Callable[[Observer, Any], None]] = _PLAIN | {
    ev.Send: Observer._send,
    ev.StartTransfer: Observer._start_transfer,
    ev.MapLocal: Observer._map_local,
    ev.Deliver: Observer._deliver,
    ev.Drop: Observer._gone,
    ev.Retired: Observer._gone,
    ev.StartSlot: Observer._start_slot,
}
