"""Membership machines in memory: a FIFO channel between any two, with deaths, cuts, joins and leaves."""

from __future__ import annotations

from collections import deque

import msgpack

from hoplite_mpi.protocol.membership import Membership
from hoplite_mpi.protocol.membership_messages import (
    Event,
    Install,
    Instruction,
    Message,
    MessageReceived,
    Peer,
    PeerDown,
    PeerUp,
    Proof,
    Send,
    SilenceLasts,
)
from hoplite_mpi.protocol.view import Member, View


def member(rank: int, incarnation: int = 0) -> Member:
    return Member(rank, incarnation, f"node{rank}", ("127.0.0.1", 1000 + rank))


#: how often it is said that a silence lasts; for each of two views it takes some
_ROUNDS = 12


class World:
    """Processes, and a FIFO channel each way between any two that are up and not cut off from each other.

    A death takes with it any suffix of what was under way, and comes after the rest; so does a cut, which shows as
    silence. A process that is out closes its channels, which looks like a death.
    """

    def __init__(self) -> None:
        self.processes: dict[Peer, Membership] = {}
        self.channels: dict[tuple[Peer, Peer], deque[Event]] = {}
        self.cuts: set[frozenset[Peer]] = set()
        self.connected: set[frozenset[Peer]] = set()
        self.installed: dict[Peer, list[View]] = {}
        self.last: dict[Peer, Instruction] = {}
        self.views: dict[int, View] = {}
        self.silent: set[tuple[Peer, Peer]] = set()  # (process, whom it has lost)
        self.silenced: set[Peer] = set()  # whoever lost a channel by silence

    @classmethod
    def founded(cls, n: int) -> World:
        world = cls()
        founders = [member(rank) for rank in range(n)]
        for founder in founders:
            world.add(Membership(founder, founding=founders))
        world.start()
        return world

    @classmethod
    def collected(cls, n: int) -> World:
        """Founders that find each other one by one."""
        world = cls()
        for rank in range(n):
            world.add(Membership(member(rank), size=n))
        world.start()
        return world

    def add(self, machine: Membership, cut_from: set[Peer] | None = None) -> None:
        peer = machine.peer
        self.processes[peer] = machine
        self.installed[peer] = []
        for other in self.open_peers():
            if other in (cut_from or ()):
                self.cuts.add(frozenset((peer, other)))
            elif other != peer:
                self.connect(peer, other)

    def start(self) -> None:
        for peer in self.open_peers():
            self.do(peer, self.processes[peer].start())

    def connect(self, a: Peer, b: Peer) -> None:
        self.connected.add(frozenset((a, b)))
        for src, dst in ((a, b), (b, a)):
            self.channels.setdefault((src, dst), deque()).append(PeerUp(*src))

    def open_peers(self) -> list[Peer]:
        return sorted(peer for peer, machine in self.processes.items() if not machine.closed)

    def do(self, peer: Peer, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            assert peer not in self.last, f"{instruction} after {self.last[peer]}"
            if isinstance(instruction, Send):
                if frozenset((peer, instruction.dst)) in self.connected:
                    wire = msgpack.unpackb(msgpack.packb(instruction.message.to_wire()), strict_map_key=False)
                    message = Message.from_wire(wire)
                    assert message == instruction.message
                    self.channels[peer, instruction.dst].append(MessageReceived(peer, message))
            elif isinstance(instruction, Install):
                self.on_install(peer, instruction)
            else:
                self.last[peer] = instruction
                self.close(peer, 0)

    def on_install(self, peer: Peer, instruction: Install) -> None:
        view, before = instruction.view, self.installed[peer]
        assert view.has(*peer)
        assert not before or before[-1].number < view.number, "numbers only grow"
        assert self.views.setdefault(view.number, view) == view, "two views with one number"
        if before:
            gone = {m for m in before[-1].members.values() if m not in view.members.values()}
            assert {*instruction.lost, *instruction.left} == gone
        before.append(view)
        for m in view.members.values():  # the driver connects to each member
            other = (m.rank, m.incarnation)
            pair = frozenset((peer, other))
            if other == peer or pair in self.connected:
                continue
            if (other, peer) in self.channels and any(isinstance(e, PeerDown) for e in self.channels[other, peer]):
                continue
            proof: Proof = "silence" if pair in self.cuts else "reset"
            self.channels.setdefault((other, peer), deque()).append(PeerDown(*other, proof))

    def step(self, channel: tuple[Peer, Peer]) -> None:
        event = self.channels[channel].popleft()
        self.give(channel[1], event)

    def give(self, peer: Peer, event: Event) -> None:
        if isinstance(event, PeerDown) and event.proof == "silence":
            self.silenced.add(peer)
        if isinstance(event, PeerDown):
            self.silent.add((peer, (event.rank, event.incarnation)))
        elif isinstance(event, PeerUp):
            self.silent.discard((peer, (event.rank, event.incarnation)))
        self.do(peer, self.processes[peer].handle(event))

    def busy(self) -> list[tuple[Peer, Peer]]:
        is_open = set(self.open_peers())
        return sorted(c for c, events in self.channels.items() if events and c[1] in is_open)

    def close(self, peer: Peer, lost: int) -> None:
        """End a process; *lost*: how many of the last messages to each other process die with it."""
        self.processes[peer].closed = True
        for pair in [p for p in self.connected if peer in p]:
            (other,) = pair - {peer}
            self.connected.discard(pair)
            self.break_channel(peer, other, lost, "reset")

    def break_channel(self, src: Peer, dst: Peer, lost: int, proof: Proof) -> None:
        events = self.channels[src, dst]
        for _ in range(lost):
            if events and isinstance(events[-1], MessageReceived):
                events.pop()
        events.append(PeerDown(*src, proof))

    def cut(self, a: Peer, b: Peer, lost: int) -> None:
        pair = frozenset((a, b))
        self.cuts.add(pair)
        if pair in self.connected:
            self.connected.discard(pair)
            self.break_channel(a, b, lost, "silence")
            self.break_channel(b, a, lost, "silence")

    def healable(self) -> list[tuple[Peer, Peer]]:
        """Return the cut pairs whose processes both run and both know of the cut."""
        is_open = set(self.open_peers())
        pairs = [tuple(sorted(pair)) for pair in self.cuts if pair <= is_open]
        return sorted((a, b) for a, b in pairs if not self.channels.get((a, b)) and not self.channels.get((b, a)))

    def heal(self, a: Peer, b: Peer) -> None:
        self.cuts.discard(frozenset((a, b)))
        self.connect(a, b)

    def settle(self) -> None:
        for _ in range(_ROUNDS):
            self.run_dry()
            for peer, other in sorted(self.silent):
                if not self.processes[peer].closed:
                    self.give(peer, SilenceLasts(*other))
        self.run_dry()

    def run_dry(self) -> None:
        for _ in range(100_000):
            busy = self.busy()
            if not busy:
                return
            self.step(busy[0])
        raise AssertionError("the members never come to rest")

    def views_now(self) -> dict[Peer, int]:
        return {p: self.installed[p][-1].number for p in self.open_peers() if self.installed[p]}

    def check_history(self) -> None:
        """No incarnation comes back."""
        numbers = sorted(self.views)
        for peer in self.processes:
            inside = [n for n in numbers if self.views[n].has(*peer)]
            if inside:
                gone = [n for n in numbers if n > inside[0] and not self.views[n].has(*peer)]
                assert not gone or max(inside) < min(gone), f"{peer} was in {inside} and not in {gone}"
        for rank in {peer[0] for peer in self.processes}:
            incarnations = [self.views[n].members[rank].incarnation for n in numbers if rank in self.views[n]]
            assert incarnations == sorted(incarnations)

    def check_one_side(self) -> None:
        """All that go on are in one view, which has nobody else in it."""
        self.check_history()
        going = [peer for peer in self.open_peers() if self.processes[peer].view is not None]
        final = {self.installed[peer][-1].number for peer in going}
        assert len(final) <= 1, f"several sides go on: {self.views_now()}"
        for peer in going:
            view = self.installed[peer][-1]
            assert {(m.rank, m.incarnation) for m in view.members.values()} == set(going)
