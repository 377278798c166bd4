"""A network of object protocols in memory: FIFO links in any interleaving, deaths, joins, transfers chunk by chunk."""

from __future__ import annotations

import random
from collections import defaultdict, deque
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np

from hoplite_mpi.config import Config
from hoplite_mpi.ids import ObjectID
from hoplite_mpi.meta import Meta
from hoplite_mpi.protocol import events as ev
from hoplite_mpi.protocol import messages as ms
from hoplite_mpi.protocol.core import Protocol
from hoplite_mpi.protocol.view import Member, View
from hoplite_mpi.protocol.wire import decode, encode

CHUNKS = 4
SMALL = 2

Key = tuple[ObjectID, int]


def meta_of(small: bool) -> Meta:
    n = SMALL if small else CHUNKS
    return Meta("ndarray", 8 * n, np.dtype(np.int64), (n,))


def digest_of(value: int) -> bytes:
    return blake2b(b"%d" % value, digest_size=16).digest()


@dataclass
class Slot:
    start: ev.StartSlot
    #: chunks of its own source, pinned: they stay when the object is evicted or deleted
    own: list[int]
    children: dict[int, ev.PullChild] = field(default_factory=dict)
    out: list[int] = field(default_factory=list)
    done: bool = False


@dataclass
class Node:
    """One rank and its driver."""

    rank: int
    incarnation: int
    machine: str
    protocol: Protocol
    #: (oid, version) → chunks that are here; each chunk of a put object is its value
    data: dict[Key, list[int]] = field(default_factory=dict)
    transfers: dict[ObjectID, ev.StartTransfer | ev.MapLocal] = field(default_factory=dict)
    slots: dict[tuple[ObjectID, int], Slot] = field(default_factory=dict)
    views: deque[View] = field(default_factory=deque)
    wanted: set[ObjectID] = field(default_factory=set)
    watched: set[ObjectID] = field(default_factory=set)
    #: puts that are not answered
    putting: set[ObjectID] = field(default_factory=set)
    #: those of them that are being written → chunks written
    writing: dict[ObjectID, int] = field(default_factory=dict)
    delivered: dict[ObjectID, ev.Deliver] = field(default_factory=dict)
    failed: dict[ObjectID, str] = field(default_factory=dict)
    computing: deque[ev.ReduceInline] = field(default_factory=deque)
    queries: dict[int, frozenset[ObjectID]] = field(default_factory=dict)
    specs: dict[ObjectID, ev.ReduceRequested] = field(default_factory=dict)
    #: data-plane events of the past, to be told again
    past: list[ev.Event] = field(default_factory=list)


class World:
    """All nodes. `step` does one thing that can happen; `settle` goes on until nothing can."""

    def __init__(self, rng: random.Random, ranks: int, machines: int, protocol: type[Protocol] = Protocol) -> None:
        self.rng = rng
        self.protocol_class = protocol
        self.nodes: dict[int, Node] = {}
        self.links: dict[tuple[int, int], deque[bytes]] = defaultdict(deque)
        self.machines = machines
        self.view = View(0)
        self.incarnations: dict[int, int] = {}
        #: value of what was put first, and of what is small
        self.values: dict[ObjectID, int] = {}
        self.small: set[ObjectID] = set()
        self.deleted: set[ObjectID] = set()
        self.requests: dict[ObjectID, ev.ReduceRequested] = {}
        self.heard: list[tuple[int, int, ms.Message]] = []
        self.sent: dict[str, int] = defaultdict(int)
        self.starts: list[ev.StartTransfer] = []
        self.slot_starts: list[tuple[int, ev.StartSlot]] = []
        self.dup_rate = 0.0
        self.evictions = 0
        self.change(join=list(range(ranks)))

    # -- membership ----------------------------------------------------------------------------------------------------

    def change(self, kill: list[int] | None = None, join: list[int] | None = None) -> None:
        """Kill and add ranks, and announce the view without and with them."""
        members = dict(self.view.members)
        for rank in kill or []:
            del self.nodes[rank], members[rank]
            for link, queue in self.links.items():
                if link[1] == rank:
                    queue.clear()
                elif link[0] == rank:  # of what it sent last something is lost
                    for _ in range(self.rng.randint(0, len(queue))):
                        queue.pop()
        for rank in join or []:
            incarnation = self.incarnations.get(rank, -1) + 1
            self.incarnations[rank] = incarnation
            machine = f"m{rank % self.machines}"
            members[rank] = Member(rank, incarnation, machine, ("", 0), self.view.number + 1)
            config = Config(inline_limit=8 * SMALL)
            self.nodes[rank] = Node(rank, incarnation, machine, self.protocol_class(rank, config))
            for link in self.links:
                if rank in link:
                    self.links[link].clear()
        self.view = View(self.view.number + 1, members)
        for node in self.nodes.values():
            node.views.append(self.view)

    def install(self, node: Node) -> None:
        view = node.views.popleft()
        if node.views and self.rng.random() < 0.3:  # views may be skipped
            view = node.views.popleft()
        self.handle(node, ev.ViewInstalled(view))

    # -- operations ----------------------------------------------------------------------------------------------------

    def put(self, rank: int, oid: ObjectID, value: int, small: bool = False, confirm: bool = True) -> None:
        node = self.nodes[rank]
        if (oid, 0) in node.data and len(node.data[oid, 0]) == self.length(oid):
            return  # the driver has it: nothing of the protocol
        self.values.setdefault(oid, value)
        if small:
            self.small.add(oid)
        n = SMALL if small else CHUNKS
        node.data[oid, 0] = [value] * n
        node.putting.add(oid)
        node.failed.pop(oid, None)
        inline = np.full(n, value, np.int64).tobytes() if small else None
        self.handle(node, ev.ObjectStored(oid, meta_of(small), digest_of(value), inline, confirm))

    def start_put(self, rank: int, oid: ObjectID, value: int, confirm: bool = True) -> None:
        """Begin a put whose chunks come one by one."""
        node = self.nodes[rank]
        if oid in node.writing or not node.protocol.client.takes(oid):
            return
        self.values.setdefault(oid, value)
        node.putting.add(oid)
        node.failed.pop(oid, None)
        node.writing[oid] = 0
        self.drop(node, oid, 0)
        self.handle(node, ev.PutStarted(oid, meta_of(False), digest_of(value), confirm))
        if node.protocol.client.writes(oid):
            node.data[oid, 0] = []

    def write(self, node: Node, oid: ObjectID) -> None:
        value = self.values[oid]
        if node.writing[oid] < CHUNKS:
            node.writing[oid] += 1
            if node.protocol.client.writes(oid):
                node.data[oid, 0].append(value)
            return
        del node.writing[oid]
        if oid not in node.failed:
            self.handle(node, ev.ObjectStored(oid, meta_of(False), digest_of(value), None, True))
            if node.protocol.client.holds(oid) or oid in node.putting:
                node.data[oid, 0] = [value] * CHUNKS

    def fail_put(self, rank: int) -> None:
        """The source of a put that is being written raises."""
        node = self.nodes[rank]
        for oid in list(node.writing)[:1]:
            del node.writing[oid]
            node.putting.discard(oid)
            self.handle(node, ev.PutFailed(oid))

    def evict(self, rank: int, oid: ObjectID) -> None:
        node = self.nodes[rank]
        if any(key[0] == oid for key in node.data):
            self.handle(node, ev.EvictRequested(oid, next(key[1] for key in node.data if key[0] == oid)))

    def evicted(self, node: Node, oid: ObjectID, version: int, granted: bool) -> None:
        if granted:
            self.evictions += 1
            assert (oid, version) not in node.data, "what may go has been dropped"
            node.delivered.pop(oid, None)

    def get(self, rank: int, oid: ObjectID) -> None:
        node = self.nodes[rank]
        node.wanted.add(oid)
        self.handle(node, ev.GetRequested(oid))

    def abandon(self, rank: int, oid: ObjectID) -> None:
        self.nodes[rank].wanted.discard(oid)
        self.handle(self.nodes[rank], ev.GetAbandoned(oid))

    def watch(self, rank: int, oid: ObjectID) -> None:
        self.nodes[rank].watched.add(oid)
        self.handle(self.nodes[rank], ev.WatchRequested(oid))

    def reduce(self, rank: int, request: ev.ReduceRequested) -> None:
        self.requests[request.rid] = request
        self.nodes[rank].specs[request.rid] = request
        self.handle(self.nodes[rank], request)

    def delete(self, rank: int, oid: ObjectID) -> None:
        self.deleted.add(oid)
        self.handle(self.nodes[rank], ev.DeleteRequested(oid))

    def forget(self, rank: int, oid: ObjectID) -> None:
        node = self.nodes[rank]
        if (oid, 0) in node.data and node.protocol.client.holds(oid):
            self.drop(node, oid, 0)
            self.handle(node, ev.ForgetObject(oid))

    # -- what can happen -----------------------------------------------------------------------------------------------

    def actions(self) -> list[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = [(self.receive, *link) for link, queue in self.links.items() if queue]
        for node in self.nodes.values():
            if node.views:
                found.append((self.install, node))
            found += [(self.progress, node, t) for t in node.transfers.values() if self.can_progress(node, t)]
            found += [(self.progress_slot, node, s) for s in node.slots.values() if self.can_progress_slot(s)]
            if node.computing:
                found.append((self.compute, node))
            found += [(self.write, node, oid) for oid in node.writing]
        return found

    def step(self) -> bool:
        """Do something that can happen; False if there is nothing."""
        found = self.actions()
        if not found:
            return False
        action, *args = self.rng.choice(found)
        action(*args)
        return True

    def settle(self, limit: int = 20_000, rounds: int = 40) -> None:
        """Go on until nothing can happen but stalls; then stall what is stuck, as a driver does, and go on."""
        for _ in range(rounds):
            while self.step():
                limit -= 1
                assert limit > 0, f"no end: {dict(self.sent)}"
            if not self.stall():
                return
        raise AssertionError(f"transfers fail for ever: {[n.transfers for n in self.nodes.values()]}")

    def stall(self) -> bool:
        """Every transfer and every reduce stream that is stuck fails."""
        stuck = [(node, t) for node in self.nodes.values() for t in list(node.transfers.values())]
        # one that waits for a sender which waits itself is none the wiser for failing: only the heads of chains matter
        heads = [(n, t) for n, t in stuck if self.is_head(t)]
        for node, t in heads:
            if node.transfers.get(t.oid) is t:
                self.fail_transfer(node, t)
        children = self.stuck_children()
        for node, event in children:
            self.handle(node, event)
        return bool(heads or children)

    def is_head(self, t: ev.StartTransfer | ev.MapLocal) -> bool:
        if isinstance(t, ev.MapLocal):
            return True
        sender = self.alive(t.sender, t.sender_incarnation)
        if sender is None:
            return True
        if any(
            s.start.is_root and (s.start.rid, s.start.generation) == (t.oid, t.version) for s in sender.slots.values()
        ):
            return False
        onward = sender.transfers.get(t.oid)
        return onward is None or onward.version != t.version

    def stuck_children(self) -> list[tuple[Node, ev.ChildFailed]]:
        found = []
        for node in self.nodes.values():
            for slot in node.slots.values():
                for pull in slot.children.values():
                    child = self.alive(pull.rank, pull.incarnation)
                    there = child is not None and self.stream(child, pull) is not None
                    if not there and not slot.done:
                        s = slot.start
                        found.append(
                            (node, ev.ChildFailed(s.rid, s.slot, s.generation, pull.child_slot, pull.child_generation))
                        )
        return found

    def receive(self, src: int, dst: int) -> None:
        raw = self.links[src, dst].popleft()
        message = decode(raw)
        node = self.nodes[dst]
        self.handle(node, ev.MessageReceived(src, message))
        if isinstance(message, (ms.Get, ms.Announce, ms.Source, ms.Completed, ms.RootDone)):
            self.heard.append((src, dst, message))
        if self.heard and self.rng.random() < self.dup_rate:
            kind = type(self.rng.choice(self.heard[-30:])[2])
            src, dst, message = self.rng.choice([seen for seen in self.heard[-60:] if type(seen[2]) is kind])
            # what has left the view before can't arrive again
            view = self.nodes[dst].protocol.view if dst in self.nodes else None
            # an announcement comes again only while it is true: links keep order, so none comes after its `Forget`
            true = not isinstance(message, ms.Announce) or (
                src in self.nodes and self.nodes[src].protocol.client.holds(message.oid) and not message.partial
            )
            if true and view is not None and src in view and view.number == message.view:
                self.handle(self.nodes[dst], ev.MessageReceived(src, message))

    # -- the data plane ------------------------------------------------------------------------------------------------

    def alive(self, rank: int, incarnation: int) -> Node | None:
        node = self.nodes.get(rank)
        return node if node is not None and node.incarnation == incarnation else None

    def usable(self, oid: ObjectID) -> bool:
        """Whether somebody whose view is the newest has a copy to give."""
        return any(
            n.protocol.client.holds(oid) for n in self.nodes.values() if n.protocol.view.number == self.view.number
        )

    def length(self, oid: ObjectID) -> int:
        return SMALL if oid in self.small else CHUNKS

    def can_progress(self, node: Node, t: ev.StartTransfer | ev.MapLocal) -> bool:
        if isinstance(t, ev.MapLocal):
            return True
        sender = self.alive(t.sender, t.sender_incarnation)
        if sender is None:
            return False
        here = len(node.data.get((t.oid, t.version), ()))
        return len(sender.data.get((t.oid, t.version), ())) > here or here == CHUNKS

    def progress(self, node: Node, t: ev.StartTransfer | ev.MapLocal) -> None:
        key = (t.oid, t.version)
        if isinstance(t, ev.MapLocal):
            holder = self.nodes.get(t.holder)
            if holder is None or len(holder.data.get(key, ())) < CHUNKS:
                self.fail_transfer(node, t)
                return
            assert holder.machine == node.machine
            node.data[key] = list(holder.data[key])
        else:
            sender = self.alive(t.sender, t.sender_incarnation)
            assert sender is not None
            here = node.data.setdefault(key, [])
            if len(here) < CHUNKS:
                here.append(sender.data[key][len(here)])
        if len(node.data[key]) == CHUNKS:
            del node.transfers[t.oid]
            self.data_event(node, ev.TransferDone(t.oid, t.version, t.attempt))

    def fail_transfer(self, node: Node, t: ev.StartTransfer | ev.MapLocal) -> None:
        del node.transfers[t.oid]
        self.data_event(node, ev.TransferFailed(t.oid, t.version, t.attempt))

    def stream(self, child: Node, pull: ev.PullChild) -> list[int] | None:
        slot = child.slots.get((pull.rid, pull.child_slot))
        return slot.out if slot is not None and slot.start.generation == pull.child_generation else None

    def inputs(self, slot: Slot) -> list[int] | None:
        """Return the children's next chunks; None if they aren't all there."""
        if len(slot.children) < slot.start.num_children:
            return None
        found = []
        for pull in slot.children.values():
            child = self.alive(pull.rank, pull.incarnation)
            out = None if child is None else self.stream(child, pull)
            if out is None or len(out) <= len(slot.out):
                return None
            found.append(out[len(slot.out)])
        return found

    def can_progress_slot(self, slot: Slot) -> bool:
        return not slot.done and (len(slot.out) == CHUNKS or self.inputs(slot) is not None)

    def progress_slot(self, node: Node, slot: Slot) -> None:
        start = slot.start
        if len(slot.out) < CHUNKS:
            inputs = self.inputs(slot)
            assert inputs is not None
            slot.out.append(slot.own[len(slot.out)] + sum(inputs))
        if len(slot.out) == CHUNKS:
            slot.done = True
            self.data_event(node, ev.SlotDone(start.rid, start.slot, start.generation))

    def compute(self, node: Node) -> None:
        i = node.computing.popleft()
        total = sum(np.frombuffer(data, np.int64) for data in i.inputs)
        self.handle(node, ev.InlineReduced(i.rid, i.version, np.asarray(total).tobytes(), i.meta))

    def data_event(self, node: Node, event: ev.Event) -> None:
        self.handle(node, event)
        node.past.append(event)
        if self.rng.random() < self.dup_rate:
            self.handle(node, self.rng.choice(node.past))

    def drop(self, node: Node, oid: ObjectID, version: int) -> None:
        node.data.pop((oid, version), None)

    # -- instructions --------------------------------------------------------------------------------------------------

    def handle(self, node: Node, event: ev.Event) -> None:
        for instruction in node.protocol.handle(event):
            self.carry_out(node, instruction)

    def carry_out(self, node: Node, instruction: ev.Instruction) -> None:
        match instruction:
            case ev.Send(dst, message):
                self.sent[type(message).__name__] += 1
                if dst in self.nodes and node.rank != dst:
                    self.links[node.rank, dst].append(encode(message))
            case ev.StartTransfer() | ev.MapLocal():
                self.start(node, instruction)
            case ev.AbortTransfer(oid, _, attempt):
                if oid in node.transfers and node.transfers[oid].attempt == attempt:
                    del node.transfers[oid]
            case ev.Deliver():
                self.deliver(node, instruction)
            case ev.Available(oid):
                assert oid in node.watched
                node.watched.discard(oid)
            case ev.Stored(oid):
                node.putting.discard(oid)
            case ev.Fail(oid, kind):
                node.putting.discard(oid)
                node.failed[oid] = kind
                if kind != "exists":
                    assert kind != "lost" or not self.usable(oid), f"{oid} is not lost"
                    assert kind != "deleted" or oid in self.deleted
                    node.wanted.discard(oid)
                    node.watched.discard(oid)
            case ev.Drop(oid, version):
                self.drop(node, oid, version)
            case ev.Evicted(oid, version, granted):
                self.evicted(node, oid, version, granted)
            case ev.Locations(request_id, oids):
                node.queries[request_id] = oids
            case ev.StartSlot(rid, slot, generation, _, source):
                assert (rid, slot) not in node.slots
                (own,) = [chunks for key, chunks in node.data.items() if key[0] == source]
                node.slots[rid, slot] = started = Slot(instruction, own)
                self.slot_starts.append((node.rank, instruction))
                if instruction.is_root:
                    node.data[rid, generation] = started.out
            case ev.PullChild(rid, slot, generation, child_slot):
                assert node.slots[rid, slot].start.generation == generation
                node.slots[rid, slot].children[child_slot] = instruction
            case ev.StopSlot(rid, slot, generation):
                assert node.slots.pop((rid, slot)).start.generation == generation
            case ev.ReduceInline():
                node.computing.append(instruction)
            case ev.Retired(oid):
                node.failed.pop(oid, None)
            case _:
                raise AssertionError(instruction)

    def start(self, node: Node, t: ev.StartTransfer | ev.MapLocal) -> None:
        assert t.oid not in node.transfers, f"rank {node.rank} receives {t.oid} twice"
        for oid, version in list(node.data):
            if oid == t.oid and version != t.version:
                self.drop(node, oid, version)
        node.transfers[t.oid] = t
        if isinstance(t, ev.MapLocal):
            return
        self.starts.append(t)
        same = [
            n.rank
            for n in self.nodes.values()
            if isinstance(u := n.transfers.get(t.oid), ev.StartTransfer)
            and (u.version, u.sender, u.sender_incarnation) == (t.version, t.sender, t.sender_incarnation)
        ]
        for rank in same:
            if (
                rank != node.rank
            ):  # the sender ends the older one by itself; there is one only if somebody waited for it in vain
                older = self.nodes[rank]
                assert self.is_stalled(older, t.oid), f"rank {t.sender} sends {t.oid} to {same} at once"
                self.fail_transfer(older, older.transfers[t.oid])
        seen, at = {node.rank}, t.sender
        while at in self.nodes and isinstance(u := self.nodes[at].transfers.get(t.oid), ev.StartTransfer):
            assert at not in seen, f"cycle over {seen}"
            seen.add(at)
            if u.version != t.version or self.alive(u.sender, u.sender_incarnation) is None:
                break
            at = u.sender
        assert at != node.rank, "a rank receives from itself"

    def is_stalled(self, node: Node, oid: ObjectID) -> bool:
        """Whether an owner, of the newest view or the one before, takes it that the rank receives nothing."""
        entries = [one.protocol.directory._entries.get(oid) for one in self.nodes.values()]
        return any(
            entry is not None and (place := entry.places.get(node.rank)) is not None and place.stalled
            for entry in entries
        )

    def deliver(self, node: Node, d: ev.Deliver) -> None:
        assert d.oid in node.wanted
        node.wanted.discard(d.oid)
        node.delivered[d.oid] = d
        if d.inline is not None:
            chunks = np.frombuffer(d.inline, np.int64).tolist()
            node.data[d.oid, d.version] = chunks
        chunks = node.data[d.oid, d.version]
        assert len(chunks) == d.meta.shape[0], f"{d.oid} delivered with {len(chunks)} chunks"
        request = self.requests.get(d.oid)
        if request is None:
            expected = self.values[d.oid]
        else:
            assert d.sources is not None
            assert d.sources <= set(request.sources)
            n = len(set(request.sources)) if request.num_objects is None else request.num_objects
            assert len(d.sources) == n or (request.skip_lost and d.sources)
            expected = sum(self.values[oid] for oid in d.sources)
        assert chunks == [expected] * len(chunks), f"{d.oid}: {chunks} instead of {expected}"
