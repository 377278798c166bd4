"""The runtime of one rank: puts engine, links, side channel, membership, protocol and memory together."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from mpi4py import MPI

from hoplite_mpi import passing
from hoplite_mpi.channels import Channels
from hoplite_mpi.checksums import whole_blocks
from hoplite_mpi.config import Config
from hoplite_mpi.errors import ClosedError, EvictedError, HopliteError
from hoplite_mpi.ids import ObjectID
from hoplite_mpi.making_room import RoomMaker
from hoplite_mpi.memory import Arena, HostMemory, Memory, Spill, reduce_bytes, spill_directory
from hoplite_mpi.objects import Objects, Ready, object_of
from hoplite_mpi.observing import Observer
from hoplite_mpi.orphans import Orphans
from hoplite_mpi.protocol import events as ev
from hoplite_mpi.protocol import membership_messages as ms
from hoplite_mpi.protocol import wire
from hoplite_mpi.protocol.core import Protocol
from hoplite_mpi.protocol.links import Links
from hoplite_mpi.protocol.membership import Membership
from hoplite_mpi.protocol.messages import Report, RootDone
from hoplite_mpi.protocol.view import Member, View
from hoplite_mpi.reserving import Reserver
from hoplite_mpi.slots import Slots, slot_of
from hoplite_mpi.testing import fault
from hoplite_mpi.trace import Recorder
from hoplite_mpi.transport import joining, liveness
from hoplite_mpi.transport.bootstrap import Place
from hoplite_mpi.transport.engine import Engine
from hoplite_mpi.transport.evidence import Evidence
from hoplite_mpi.transport.fabric import ASLEEP, AWAKE, RING, Fabric, Link
from hoplite_mpi.transport.gauge import Gauge
from hoplite_mpi.transport.joining import Joiner
from hoplite_mpi.transport.liveness import Liveness
from hoplite_mpi.transport.sidechannel import PeerKey, SideChannel
from hoplite_mpi.transport.streams import PROBE
from hoplite_mpi.transport.transfer import Transfers

__all__ = ["Runtime"]

log = logging.getLogger("hoplite_mpi")

#: kind of side-channel message
_MEMBERSHIP = 20
#: channels of control messages
_PROTOCOL, _TRANSFER, _FIRST_USER_CHANNEL = 0, 1, 16
#: seconds between looks at the rendezvous directory while joining
_JOIN_PERIOD = 0.05


class Runtime:
    """Everything of one rank that the store's calls stand on. Methods run under the engine's lock unless they say otherwise."""

    def __init__(self, place: Place, config: Config) -> None:
        self.place = place
        self.config = config
        self.me: PeerKey = (place.rank, place.incarnation)
        self.engine = Engine(config)
        self.side = SideChannel(
            self.engine,
            self.me,
            place.secret,
            on_up=self._side_up,
            on_down=lambda peer, proof: self.evidence.disconnected(peer, proof),
            on_message=self._side_message,
        )
        self.evidence = Evidence(self.engine, self.side, self._address_of, self._membership)
        self.fabric = Fabric(self.engine, self.side, self._control_message, self._link_wanted, self._link_broken)
        self.trace = Recorder(place.rank, config.trace_limit if config.trace else 0)
        self.transfers = Transfers(
            self.engine, self.fabric, _TRANSFER, self._find_stream, self._stream_name, self.trace
        )
        self.gauge = Gauge(self.engine, self.transfers, place.rank, self._on_this_node, self._measured)
        self.fabric.on_up = self.gauge.up
        self.fabric.on_corrupt = self._corrupt_message
        self.joiner = Joiner(
            self.engine,
            self.side,
            is_senior=self._is_senior,
            address_of=self._address_of,
            on_joined=self._joined,
        )
        self.liveness = Liveness(
            self.engine,
            self.side,
            peers=self._others,
            on_silence=lambda peer: self.evidence.down(peer, "silence"),
            on_return=self.evidence.back,
        )
        self.arena = Arena(place.arena, place.rank, place.incarnation, **_arena_limits(config))
        self.protocol = Protocol(place.rank, config)
        directory = spill_directory(self.arena.directory, config.spill_directory)
        #: where objects go when memory is short; None: nowhere
        self.spill = None if directory is None else Spill(self.arena, directory)
        self.room_maker = None if self.spill is None else RoomMaker(self, self.spill)
        self.observer = Observer(self.trace, place.rank, self.protocol)
        #: what objects live in; another kind of memory is another one of these
        self.memory: Memory = HostMemory(self.arena, self.spill)
        self.reserver = Reserver(self.engine, self.memory)
        parts = (self.engine, self.fabric, self.transfers, self.memory, self.reserver)
        self.objects = Objects(*parts, self.handle, self._no_memory)
        self.slots = Slots(*parts, self.objects, self.handle, self.me)
        self._orphans = Orphans(self.engine, self.arena, self.memory, self.objects, self.handle)
        member = Member(place.rank, place.incarnation, place.node, self.side.address)
        if place.comm is not None:
            self.membership = Membership(member, founding=place.founders(self.side.address))
        else:
            founder = place.rank == 0 and place.incarnation == 0
            self.membership = Membership(member, size=place.size if founder else None)
        self.view: View | None = None
        #: told each new view, outside of the engine's lock
        self.view_listeners: list[Callable[[View, tuple[Member, ...]], None]] = []
        self._channels = Channels(self.engine)
        #: told the protocol's answers: Deliver, Available, Fail, Stored, Locations
        self.on_answer: Callable[[ev.Instruction], None] = lambda answer: None
        self.on_no_memory: Callable[[ObjectID, HopliteError], None] = lambda oid, error: None
        self.on_closed: Callable[[HopliteError], None] = lambda error: None
        self.closed: HopliteError | None = None
        self.left = False
        self.peers_lost = 0
        #: members that were lost and of whose death there is proof
        self.dead: set[PeerKey] = set()
        self._events: deque[ev.Event] = deque()
        self._handling = False
        #: this rank has said nothing yet as an owner in this view
        self._silent_owner = True

    # -- life ----------------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Find the others and wait for the first view. Any thread."""
        place = self.place
        self.engine.start()

        def begin() -> None:
            self._carry_out(self.membership.start())
            self.liveness.start()
            self.engine.after(self.config.start_timeout, lambda: self._membership(ms.StartTimeout()))
            if place.comm is None:
                place.announce(self.side.address)
                self._seek()

        self.engine.run(begin)
        ready = self.engine.wait(lambda: self.view is not None or self.closed is not None, self._pause, None)
        assert ready
        if self.closed is not None:
            self.leave(0.0)
            raise self.closed

    @staticmethod
    def _pause(seconds: float | None) -> None:
        time.sleep(0.002 if seconds is None else min(0.002, seconds))

    def _seek(self) -> None:
        """Call those who can let this process in, until one has."""
        if self.view is not None or self.closed is not None:
            return
        founding = self.place.incarnation == 0
        for contact in self.place.contacts():
            if founding and contact.rank > self.place.rank:
                continue  # it calls us
            self.side.connect((contact.rank, contact.incarnation), self._reachable(contact.address, contact.node))
        self.engine.after(_JOIN_PERIOD, self._seek)

    def leave(self, timeout: float) -> None:
        """Leave the view cleanly, then close. Any thread; never hangs on dead peers."""
        try:
            if self.closed is None:
                self.engine.run(self.gauge.stop)
                self.engine.wait(lambda: self.gauge.idle or self.closed is not None, self._pause, min(timeout, 1.0))
                self.engine.run(lambda: self._membership(ms.LeaveRequested()))
                self.engine.wait(lambda: self.left or self.closed is not None, self._pause, timeout)
            self.engine.run(self._shut)
        finally:
            self.engine.stop()
            self.arena.close()
            if self.spill is not None:
                self.spill.close()

    @property
    def ended_cleanly(self) -> bool:
        """Whether MPI_Finalize is safe: this process has left with nothing under way, and never joined by accept/connect.

        A rank that had joined so has been seen to end by SIGSEGV, and the mpiexec of a single process doesn't miss the call.
        """
        under_way = self.joiner.busy or self.engine.running
        return self.place.comm is not None and self.left and not self.peers_lost and not under_way

    def _shut(self) -> None:
        if self.closed is None:
            self.closed = ClosedError("the store is closed")
        self.joiner.stop()
        self.reserver.stop()
        for peer in self._others():
            self.fabric.drop(peer)
        self.side.close()

    def _others(self) -> list[PeerKey]:
        """Return the other members."""
        members = () if self.view is None else self.view.members.values()
        return [(member.rank, member.incarnation) for member in members if member.rank != self.place.rank]

    def _close(self, error: HopliteError) -> None:
        if self.closed is not None:
            return
        self.closed = error
        if self.trace.on and isinstance(error, EvictedError):
            self.trace.event("evicted", text=str(error))
        log.error("%s", error)
        self.on_closed(error)
        self.engine.after(0, self._shut)  # the others are to see it at once, and nothing of this process any more

    def check(self) -> None:
        """Raise what closed the store, if anything did. Any thread."""
        if self.closed is not None:
            raise self.closed

    # -- messages of users of the store ------------------------------------------------------------------------------------------

    def open_channel(self, channel: int, receiver: Callable[[PeerKey, bytes], None]) -> None:
        """Give messages on a channel to *receiver*, those first that have come already. Any thread."""
        self.engine.run(lambda: self._channels.open(channel, receiver))

    def send(self, rank: int, channel: int, payload: bytes) -> bool:
        """Send bytes to a member; return whether it is one. Any thread."""

        def post() -> bool:
            member = None if self.view is None else self.view.members.get(rank)
            if member is None:
                return False
            peer = (member.rank, member.incarnation)
            if peer == self.me:
                self._channels.deliver(peer, channel, payload)
            else:
                self.fabric.send(peer, _FIRST_USER_CHANNEL + channel, payload)
            return True

        return bool(self.engine.run(post))

    # -- object protocol -----------------------------------------------------------------------------------------------------

    def handle(self, event: ev.Event) -> None:
        """Give the protocol an event and carry out what it says; events that this causes follow in order."""
        passing.doing(event)
        self._events.append(event)
        if self._handling:
            return
        self._handling = True
        try:
            while self._events:
                event = self._events.popleft()
                self.observer.event(event)
                for instruction in self.protocol.handle(event):
                    self.observer.instruction(instruction)
                    self._do(instruction)
        finally:
            self._handling = False

    def _do(self, what: ev.Instruction) -> None:
        passing.doing(what)
        match what:
            case ev.Send():
                self._send(what)
            case ev.StartTransfer():
                self.objects.start_transfer(what)
            case ev.MapLocal():
                self.objects.map_local(what)
            case ev.AbortTransfer():
                self.objects.abort_transfer(what)
            case ev.Drop():
                self.objects.drop(what.oid, what.version)
            case ev.Retired():
                self.objects.retire(what.oid)
                self.slots.retire(what.oid)
                self.on_answer(what)
            case ev.StartSlot():
                self.slots.start(what)
            case ev.PullChild():
                self.slots.pull_child(what)
            case ev.StopSlot():
                self.slots.stop(what)
            case ev.ReduceInline():
                self._reduce_inline(what)
            case ev.Deliver():
                self.objects.deliver(what)
                self.on_answer(what)
            case ev.Stored():
                self.arena.confirm(what.oid)
                self.on_answer(what)
            case ev.Evicted():
                if self.room_maker is not None:
                    self.room_maker.answer(what)
            case _:
                self.on_answer(what)

    def _send(self, what: ev.Send) -> None:
        member = None if self.view is None else self.view.members.get(what.dst)
        if member is not None:
            passing.leaving(what.message)
            if self._silent_owner and self.protocol.ready and not isinstance(what.message, Report):
                self._silent_owner = False
                fault.point("rebuild.first_answer")
            self.fabric.send((member.rank, member.incarnation), _PROTOCOL, wire.encode(what.message))

    def _reduce_inline(self, what: ev.ReduceInline) -> None:
        try:
            data, error = reduce_bytes(what.op, what.inputs, what.meta), None
        except (HopliteError, TypeError, ValueError) as failure:
            data, error = b"", str(failure)
        self.handle(ev.InlineReduced(what.rid, what.version, data, what.meta, error))

    def _find_stream(self, key: bytes) -> Any:
        if key == PROBE:
            return self.gauge.find()
        return self.objects.find(key) if key[:1] == b"o" else self.slots.find(key)

    @staticmethod
    def _stream_name(key: bytes) -> dict[str, Any]:
        return object_of(key) if key[:1] == b"o" else slot_of(key)

    def _no_memory(self, oid: ObjectID, error: HopliteError) -> None:
        self.on_no_memory(oid, error)

    # -- side channel and links ----------------------------------------------------------------------------------------------

    def _corrupt_message(self, peer: PeerKey) -> None:
        text = "a control message of rank {}.{} came with a wrong checksum: what it said is lost, and this rank with it"
        self._close(HopliteError(text.format(*peer)))

    def _control_message(self, peer: PeerKey, channel: int, payload: bytes) -> None:
        if channel == _TRANSFER:
            self.transfers.on_message(peer, payload)
        elif channel == _PROTOCOL:
            message = wire.decode(payload)
            passing.arriving(message)
            self.handle(ev.MessageReceived(peer[0], message))
            if isinstance(message, RootDone):
                fault.point("reduce.after_final")
        else:
            self._channels.deliver(peer, channel - _FIRST_USER_CHANNEL, payload)

    def _side_up(self, peer: PeerKey) -> None:
        self.fabric.side_is_up(peer)
        self.evidence.connected(peer)
        if self.fabric.link(peer).backlog:
            self._link_wanted(self.fabric.link(peer))

    def _on_this_node(self, peer: PeerKey) -> bool:
        member = None if self.view is None else self.view.members.get(peer[0])
        return member is not None and member.node == self.place.node

    def _measured(self, links: Links) -> None:
        self.handle(ev.LinksMeasured(links))
        self._set_chunk_size()

    def _set_chunk_size(self) -> None:
        if self.view is not None:
            chunk = self.gauge.links.chunk_size(self.view)
            self.transfers.chunk_size = whole_blocks(chunk, 1) if self.config.checksums else chunk

    def _side_message(self, peer: PeerKey, kind: int, body: Any) -> None:
        self.liveness.heard(peer)
        if kind in (RING, AWAKE, ASLEEP):
            self.fabric.on_side_message(peer, kind, body)
        elif kind in joining.KINDS:
            self.joiner.on_side_message(peer, kind, body)
        elif kind in liveness.KINDS:
            self.liveness.on_side_message(peer, kind)
        elif kind == _MEMBERSHIP:
            message = ms.Message.from_wire(body)
            passing.membership_arriving(message)
            self._membership(ms.MessageReceived(peer, message))

    def _reachable(self, address: tuple[str, int], node: str) -> tuple[str, int]:
        return ("127.0.0.1", address[1]) if node == self.place.node else address

    def _address_of(self, peer: PeerKey) -> tuple[str, int] | None:
        member = None if self.view is None else self.view.members.get(peer[0])
        if member is None or member.incarnation != peer[1] or self.closed is not None:
            return None
        return self._reachable(member.address, member.node)

    def _is_senior(self, peer: PeerKey) -> bool:
        """Return whether this process is older than the peer: the older incarnation, of equals the lower rank."""
        return (self.me[1], self.me[0]) < (peer[1], peer[0])

    def _link_wanted(self, link: Link) -> None:
        if self.place.comm is not None:
            return  # links of an MPI world are up as soon as there is a view
        if self.side.connected(link.peer):
            if self.trace.on:
                self.trace.event("join.begin", peer=link.peer[0])
            self.joiner.want(link.peer)

    def _link_broken(self, link: Link) -> None:
        """See to it that a peer that MPI can't reach leaves, or this process: if it is dead its connections say so by themselves."""

        def check() -> None:
            if not link.down:
                log.warning("MPI can't reach rank %d.%d, though it is not known to be dead", *link.peer)
                if self._is_senior(link.peer):
                    self.evidence.down(link.peer, "silence")
                else:  # of two that can't talk to each other the junior one goes
                    rank, (peer, incarnation) = self.place.rank, link.peer
                    text = (
                        f"rank {rank} leaves: MPI can't reach rank {peer}.{incarnation}, which is its senior and lives"
                    )
                    self._close(EvictedError(text))

        self.engine.after(self.config.keepalive_timeout, check)

    def _joined(self, peer: PeerKey, comm: MPI.Comm) -> None:
        link = self.fabric.link(peer)
        self.observer.counts.joins += 1
        if self.trace.on:
            self.trace.event("join.end", peer=peer[0])
        self.fabric.up(link, comm, 0)
        self.transfers.link_up(link)

    # -- membership ----------------------------------------------------------------------------------------------------------

    def _membership(self, event: ms.Event) -> None:
        self._carry_out(self.membership.handle(event))

    def _carry_out(self, instructions: list[ms.Instruction]) -> None:
        for what in instructions:
            match what:
                case ms.Send():
                    passing.membership_leaving(what.message)
                    self.side.send(what.dst, _MEMBERSHIP, what.message.to_wire())
                    passing.membership_left(what.message)
                case ms.Install():
                    self._install(what)
                case ms.Evicted():
                    self._close(EvictedError(f"rank {self.place.rank} is out of the view: {what.reason}"))
                case ms.Left():
                    self.left = True
                case ms.StartFailed():
                    self._close(HopliteError(f"the ranks did not come together: {what.reason}"))

    def _install(self, what: ms.Install) -> None:
        view, before = what.view, self.view
        newcomer = before is None and self.place.incarnation > 0
        fault.point("join.let_in" if newcomer else "membership.install")
        self.view = view
        self._silent_owner = True
        self._set_chunk_size()
        self.peers_lost += len(what.lost)
        self.dead |= what.dead
        self.observer.counts.views += 1
        if self.trace.on:
            for member in what.lost:
                self.trace.event("peer.lost", peer=member.rank, incarnation=member.incarnation)
            self.trace.event("view", number=view.number, members=view.ranks)
        gone = [] if before is None else [m for m in before.members.values() if not view.has(m.rank, m.incarnation)]
        for member in gone:
            peer = (member.rank, member.incarnation)
            self.fabric.drop(peer)
            self.transfers.peer_lost(peer)
            self.joiner.forget(peer)
            self.side.hang_up(peer)
        for member in view.members.values():
            peer = (member.rank, member.incarnation)
            if peer == self.me or (before is not None and before.has(*peer)):
                continue
            if not self._is_senior(peer):  # the junior of a pair calls
                self.side.connect(peer, self._reachable(member.address, member.node))
            else:
                self.evidence.expect(peer)
            if self.place.comm is not None:
                self.fabric.up(self.fabric.link(peer), self.place.comm, member.rank)
        self._orphans.adopt(view, self.place.rank, self.place.node)  # first, so that this rank's report has them
        self.handle(ev.ViewInstalled(view))
        for listener in self.view_listeners:
            self._channels.post(lambda listener=listener: listener(view, what.lost))  # type: ignore[misc]
        fault.point("join.in" if newcomer else "membership.installed")
        lost = ", ".join(f"{m.rank}.{m.incarnation}" for m in what.lost)
        log.info("view %d: ranks %s%s", view.number, view.ranks, f" (lost: {lost})" if lost else "")

    def ready(self, oid: ObjectID) -> Ready | None:
        """Return the object if it can be had here at once. Any thread."""
        return self.objects.ready.get(oid)


def _arena_limits(config: Config) -> dict[str, Any]:
    return {"memory_limit": config.memory_limit, "recycle_limit": config.recycle_limit}


if sys.platform != "linux":  # /dev/shm, eventfd, epoll
    raise ImportError("hoplite_mpi needs Linux")
