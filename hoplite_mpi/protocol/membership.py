"""Membership: who is in the view, agreed by all that go on. Sans-IO: events in, instructions out.

Each view decides on the next one, by single-decree Paxos among its members with the view's number as the instance:

* The *chief* is the most senior member that one's own side channels don't show as down. All that is seen (deaths,
  joins, leaves) is passed to the chief, which proposes view n+1. The view's own coordinator has ballot round 0 and
  proposes at once. A successor first asks (`Prepare`): who answers promises to follow no lower ballot, and says what it
  accepted, which the successor then has to propose. Nobody answers while it sees somebody senior to the successor.
* The chief waits for *every* member, until it has answered or is down. It goes on if all that didn't answer are
  proven dead, or else if those that did are more than half of the view (half for round 0). Otherwise it is out. Where somebody is
  silent, it is out at once but goes on only once the silence has lasted, so that the other part no longer answers for anything by then.

So any two ballots for one view have a living member in common, and sides of a cut never both go on. Deaths proven by a
reset are no votes while somebody is silent: who died may have voted for the silent, and both sides would count it.

What the driver owes: a side channel to each member, and `PeerDown` when it breaks or can't be had. *reset* means that
the process is gone: the kernel said so, and its address refuses a new connection (after a healed cut a live peer resets
the old connection too); anything else is *silence*. Order per channel. A `Send` without channel may be dropped:
`PeerUp` makes the machine repeat what matters. After `Evicted`, `Left` or `StartFailed` it closes its channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from hoplite_mpi.protocol import membership_messages as ms
from hoplite_mpi.protocol.membership_ballots import Acceptor, Attempt
from hoplite_mpi.protocol.membership_messages import Decree, Peer, Proof
from hoplite_mpi.protocol.view import Member, View

__all__ = ["Membership"]

#: reports of silence, each after the target has answered the chief, by which the chief sees that the two can't talk to each other
_INSISTENT = 2


def _peer(member: Member) -> Peer:
    return (member.rank, member.incarnation)


def _seniority(member: Member) -> tuple[int, int]:
    return (member.joined, member.rank)


class Membership:
    """The view as one process sees it.

    founding: members of view 1 where all know them from the start. size: number of founders where they are started one
    by one: (rank 0, incarnation 0) collects them. Neither: this process joins a run that is under way.
    """

    def __init__(self, me: Member, *, founding: Sequence[Member] | None = None, size: int | None = None) -> None:
        self.me = me
        self.peer = _peer(me)
        #: the installed view; None before the first
        self.view: View | None = None
        #: whether `Evicted`, `Left` or `StartFailed` was given: nothing happens any more
        self.closed = False
        self._founding = None if founding is None else list(founding)
        self._size = size
        #: the view, with what goes with it; its view is `self.view`
        self._decree = Decree(View(0), {}, frozenset())
        #: own evidence only: the rule on who may go on rests on it. The first proof stays until the peer is up again
        self._down: dict[Peer, Proof] = {}
        #: of these, who has been for so long that it has closed if it is in the smaller part of a cut
        self._lasting: set[Peer] = set()
        #: newest incarnation that asked, by rank
        self._joins: dict[int, Member] = {}
        #: back after silence and not heard of since: it may have put this process out, so its death proves nothing
        self._unsure: set[Peer] = set()
        self._leaves: set[Peer] = set()
        self._reports: set[ms.Report] = set()
        self._out: list[ms.Instruction] = []
        self._reset()

    def _reset(self) -> None:
        """Forget what belongs to one view."""
        self._acceptor = Acceptor(self._decree.view.number)
        #: own ballot for the next view; only the chief has one
        self._attempt: Attempt | None = None
        #: highest round heard of in a rejection
        self._round = 0
        #: successors that wait until their seniors are down here too
        self._held: dict[Peer, ms.Prepare] = {}
        self._probed: set[Peer] = set()
        #: chief only: who has answered since it was reported as silent last
        self._alive: set[Peer] = set()
        #: (reporter, target) → reports of silence in a row that came after the target had answered
        self._insisted: dict[tuple[Peer, Peer], int] = {}
        #: what the chief (first item) has been told
        self._told: set[tuple[Peer, ms.Message]] = set()

    # -- events --------------------------------------------------------------------------------------------------------

    def start(self) -> list[ms.Instruction]:
        """Return the first instructions: view 1, where the founders are known."""
        if self._founding is not None:
            self._learn(_first(self._founding))
        self._collect()
        return self._flush()

    def handle(self, event: ms.Event) -> list[ms.Instruction]:
        """Take one event; return what to do, in order."""
        if self.closed:
            return []
        match event:
            case ms.PeerUp(rank, incarnation):
                self._on_up((rank, incarnation))
            case ms.PeerDown(rank, incarnation, proof):
                self._on_down((rank, incarnation), proof)
            case ms.SilenceLasts(rank, incarnation):
                self._on_lasting((rank, incarnation))
            case ms.MessageReceived(src, message):
                self._on_message(src, message)
            case ms.JoinRequested(member):
                self._on_join(member)
            case ms.LeaveRequested():
                self._leaves.add(self.peer)
                if self.view is None or len(self.view) == 1:
                    self._close(ms.Left())
            case ms.StartTimeout():
                self._on_start_timeout()
        self._reconcile()
        return self._flush()

    def _flush(self) -> list[ms.Instruction]:
        out, self._out = self._out, []
        return out

    def _on_up(self, peer: Peer) -> None:
        returned = self._down.pop(peer, None) is not None
        self._lasting.discard(peer)
        if returned:
            self._unsure.add(peer)
        self._reports = {r for r in self._reports if (r.reporter, r.target) != (self.peer, peer)}
        self._told = {(chief, message) for chief, message in self._told if chief != peer}
        if self.view is None:
            if not self._collects:
                self._send(peer, ms.Join(self.me))
            return
        member = self.view.has(*peer)
        # It may have missed a view: while it was cut off, before it had a channel, or because it was put out.
        if (member and (returned or self.view.number > 1)) or (not member and self._is_over(peer)):
            self._send(peer, ms.Decided(self._decree))
        if member and self._attempt is not None and peer[0] not in self._attempt.answers:
            self._send(peer, self._attempt.question())

    def _on_down(self, peer: Peer, proof: Proof) -> None:
        if peer == self.peer or (self._is_over(peer) and not self._decree.view.has(*peer)):
            return
        self._down.setdefault(peer, "silence" if peer in self._unsure else proof)
        if (waiting := self._joins.get(peer[0])) is not None and _peer(waiting) == peer:
            del self._joins[peer[0]]

    def _on_lasting(self, peer: Peer) -> None:
        if peer in self._down:
            self._lasting.add(peer)
            again = [(c, m) for c, m in self._told if isinstance(m, ms.Report) and m.target == peer]
            self._told.difference_update(again)

    def _on_report(self, report: ms.Report) -> None:
        self._reports.add(report)
        if report.proof == "silence":
            # The target may have been stopped, and the reporter not yet know that it goes on: what counts is a report after its answer.
            pair = (report.reporter, report.target)
            self._insisted[pair] = self._insisted.get(pair, 0) + 1 if report.target in self._alive else 0
            self._alive.discard(report.target)
            self._probed.discard(report.target)

    def _on_join(self, member: Member) -> None:
        if self.view is not None and self._is_over(_peer(member)):
            self._send(_peer(member), ms.Decided(self._decree))  # it is a member, or was one and learns that here
        elif member.rank not in self._joins or self._joins[member.rank].incarnation < member.incarnation:
            self._joins[member.rank] = member
        self._collect()

    def _on_start_timeout(self) -> None:
        if self.view is not None:
            return
        missing: tuple[int, ...] = ()
        reason = f"rank {self.me.rank} was let into no view in time: is rank 0 running?"
        if self._collects:
            missing = tuple(rank for rank in range(1, self._size or 0) if rank not in self._joins)
            reason = f"of {self._size} ranks these have not come in time: {', '.join(map(str, missing))}"
        self._close(ms.StartFailed(missing, reason))

    def _on_message(self, src: Peer, message: ms.Message) -> None:
        self._unsure.discard(src)
        match message:
            case ms.Join(member):
                self._on_join(member)
            case ms.Decided(decree):
                if decree.view.number < self._decree.view.number:
                    self._send(src, ms.Decided(self._decree))
                self._learn(decree)
            case ms.Leave() | ms.Report() if self.view is None:
                self._send(src, ms.Join(self.me))  # it takes this process for its chief, so it knows a view
            case ms.Leave(peer):
                self._leaves.add(peer)
            case ms.Report():
                self._on_report(message)
            case ms.Probe():
                self._send(src, ms.Alive())
            case ms.Alive():
                self._alive.add(src)
            case ms.Prepare(base) | ms.Propose(base):
                self._learn(base)
                if self.closed or self.view is None:
                    return
                if base.view.number < self.view.number or not self.view.has(*src):
                    self._send(src, ms.Decided(self._decree))
                elif isinstance(message, ms.Prepare):
                    self._held[src] = message
                else:
                    self._send(src, self._acceptor.propose(message.ballot, message.value))
            case ms.Promise() | ms.Accepted():
                if self._attempt is not None:
                    self._attempt.take(src, message)
            case ms.Reject(number, ballot, promised):
                attempt = self._attempt
                if attempt is not None and attempt.ballot == ballot and number == self._decree.view.number:
                    self._round = max(self._round, promised[0])
                    self._attempt = None

    # -- acceptor ------------------------------------------------------------------------------------------------------

    def _answer_held(self) -> None:
        """Answer the successors that are the most senior here too; tell the chief of the others."""
        assert self.view is not None
        chief = self._chief()
        for src, prepare in list(self._held.items()):
            if _seniority(chief) < _seniority(self.view.members[src[0]]):
                self._reports.add(ms.Report(src, _peer(chief), "silence"))
                continue
            del self._held[src]
            self._send(src, self._acceptor.prepare(prepare.ballot))

    def _learn(self, decree: Decree, announced: bool = False) -> None:
        """Install a decided view if it is newer; announced: everybody concerned is being told."""
        old = self._decree.view
        if decree.view.number < old.number:
            return
        if decree.view.number == old.number:
            if decree.view.members != old.members:  # never seen; to go on would be worse
                self._close(ms.Evicted(f"two different views have the number {old.number}"))
            return
        if not decree.view.has(*self.peer):
            if self.peer in decree.left or self.peer in self._leaves:
                self._close(ms.Left())
            elif self.view is not None or decree.known.get(self.me.rank, -1) >= self.me.incarnation:
                name = f"incarnation {self.me.incarnation} of rank {self.me.rank}"
                self._close(ms.Evicted(f"view {decree.view.number} is without {name}"))
            return
        held = list(self._held)
        self._decree, self.view = decree, decree.view
        self._reset()
        gone = [m for m in old.members.values() if not decree.view.has(*_peer(m))]
        left = tuple(m for m in gone if _peer(m) in decree.left)
        lost = tuple(m for m in gone if m not in left)
        dead = frozenset(_peer(m) for m in lost if self._down.get(_peer(m)) == "reset")
        self._out.append(ms.Install(decree.view, lost, left, dead))
        has = decree.view.has
        self._down = {p: proof for p, proof in self._down.items() if has(*p) or not self._is_over(p)}
        self._lasting &= self._down.keys()
        self._joins = {rank: m for rank, m in self._joins.items() if not self._is_over(_peer(m))}
        self._leaves = {p for p in self._leaves if has(*p)}
        self._reports = {r for r in self._reports if has(*r.reporter) and has(*r.target)}
        for peer in held:  # they asked in a view that is over
            self._send(peer, ms.Decided(decree))
        if not announced:
            # Who decided it may be dead by now: those put out must hear of it, and all if there is nobody else to tell.
            everybody = decree.view.members.values() if self._chief().rank == self.me.rank else ()
            self._announce(decree, [*gone, *everybody])

    # -- chief ---------------------------------------------------------------------------------------------------------

    def _reconcile(self) -> None:
        """Do what the present state asks for."""
        while self.view is not None and not self.closed:
            number = self.view.number
            self._answer_held()
            chief = self._chief()
            if chief.rank == self.me.rank:
                self._lead()
            else:
                self._attempt = None
                for wish in self._wishes():
                    if (_peer(chief), wish) not in self._told:
                        self._told.add((_peer(chief), wish))
                        self._send(_peer(chief), wish)
            if number == self.view.number:
                return

    def _lead(self) -> None:
        assert self.view is not None
        silent = {r.target for r in self._reports if r.proof == "silence"}
        for target in sorted(silent - {self.peer, *self._down} - self._probed):
            self._probed.add(target)
            self._send(target, ms.Probe())
        if self._attempt is not None and self._attempt.ballot < self._acceptor.promised:
            self._attempt = None
        if self._attempt is None:
            wanted = self._wanted()
            # Round 0 needs no promises, so there is one value for it only: never again after a first try.
            at_once = (
                self.view.coordinator == self.me.rank and self._acceptor.promised == ms.NOBODY and self._round == 0
            )
            if wanted is None or self._may_return(at_once):
                return
            if at_once:
                self._propose(Attempt(self._decree, (0, self.me.rank)), wanted)
            else:
                self._prepare()
        self._advance()

    def _may_return(self, at_once: bool) -> bool:
        """Whether somebody may yet come back whom this process could go on without."""
        assert self.view is not None
        members = [_peer(m) for m in self.view.members.values()]
        there = 2 * sum(peer not in self._down for peer in members)
        enough = there > len(members) or (there == len(members) and at_once)
        return enough and any(self._is_brief(peer) for peer in members)

    def _is_brief(self, peer: Peer) -> bool:
        return self._down.get(peer) == "silence" and peer not in self._lasting

    def _prepare(self) -> None:
        ballot = (max(self._round, self._acceptor.promised[0]) + 1, self.me.rank)
        self._attempt = Attempt(self._decree, ballot)
        self._ask(self._attempt, self._acceptor.prepare(ballot))

    def _propose(self, attempt: Attempt, value: Decree) -> None:
        attempt.value = value
        self._attempt = attempt
        self._ask(attempt, self._acceptor.propose(attempt.ballot, value))

    def _ask(self, attempt: Attempt, own: ms.Message) -> None:
        """Put the attempt's question to everybody; *own* is this process's own answer."""
        assert isinstance(own, (ms.Promise, ms.Accepted)), f"{self.peer} doesn't follow its own ballot: {own}"
        attempt.answers = {self.me.rank: own}
        for peer in attempt.missing():
            if peer not in self._down:
                self._send(peer, attempt.question())

    def _advance(self) -> None:
        """Go on with the attempt once everybody has answered or is down."""
        attempt = self._attempt
        if attempt is None or attempt.waits(self._down):
            return
        view = attempt.base.view
        if not attempt.is_enough(self._down):
            said = f"only {len(attempt.answers)} of the {len(view)} members of view {view.number} can be reached"
            self._close(ms.Evicted(f"{said}, silent or dead: {attempt.missing()}; the others may go on"))
        elif any(map(self._is_brief, attempt.missing())):
            return
        elif attempt.value is not None:
            self._announce(attempt.value, [*view.members.values(), *attempt.value.view.members.values()])
            self._learn(attempt.value, announced=True)
        elif (value := attempt.accepted_before() or self._wanted()) is None:
            self._attempt = None  # whoever was missed is back
        else:
            self._propose(attempt, value)
            self._advance()

    def _wanted(self) -> Decree | None:
        """Return the next view as this process would have it; None if nothing is to change."""
        assert self.view is not None
        number = self.view.number + 1
        out = self._unwanted()
        members = {m.rank: m for m in self.view.members.values() if _peer(m) not in out}
        for joiner in self._joins.values():
            if _peer(joiner) in self._down:
                continue
            # Where its older incarnation is still listed, that one has to be dead, or it is told that it is out.
            members[joiner.rank] = dataclasses.replace(joiner, joined=number)
        if members == self.view.members:
            return None
        known = {**self._decree.known, **{m.rank: m.incarnation for m in members.values()}}
        return Decree(View(number, members), known, frozenset(self._leaves & out))

    def _unwanted(self) -> set[Peer]:
        """Return the members that are to be put out."""
        assert self.view is not None
        out = {peer for peer in {*self._down, *self._leaves} if self.view.has(*peer)}
        for report in self._reports:
            if not (self.view.has(*report.reporter) and self.view.has(*report.target)):
                continue
            pair = (report.reporter, report.target)
            if report.target == self.peer:
                continue  # this process was stopped, say: if the reporter can't hear it now either, the channel to it breaks
            if report.proof == "reset":
                out.add(report.target)
            elif report.target in self._alive and self._insisted.get(pair, 0) >= _INSISTENT:
                # Both are alive and can't talk to each other: the younger has to go.
                out.add(_peer(max((self.view.members[rank] for rank, _ in pair), key=_seniority)))
        return out

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Form view 1 once all founders are there."""
        if self._collects and all(rank in self._joins for rank in range(1, self._size or 0)):
            decree = _first([self.me, *(self._joins[rank] for rank in range(1, self._size or 0))])
            self._announce(decree, decree.view.members.values())
            self._learn(decree, announced=True)

    @property
    def _collects(self) -> bool:
        return self.view is None and self._size is not None and self.peer == (0, 0)

    def _wishes(self) -> list[ms.Message]:
        """Return what the chief has to know."""
        assert self.view is not None
        seen = [ms.Report(self.peer, peer, proof) for peer, proof in self._down.items() if self.view.has(*peer)]
        return [*map(ms.Join, self._joins.values()), *map(ms.Leave, self._leaves), *self._reports, *seen]

    def _chief(self) -> Member:
        assert self.view is not None
        return min((m for m in self.view.members.values() if _peer(m) not in self._down), key=_seniority)

    def _is_over(self, peer: Peer) -> bool:
        """Whether this or a newer incarnation of the rank is or was a member."""
        return self._decree.known.get(peer[0], -1) >= peer[1]

    def _announce(self, decree: Decree, members: Iterable[Member]) -> None:
        for peer in dict.fromkeys(map(_peer, members)):
            if peer != self.peer and self._down.get(peer) != "reset":
                self._send(peer, ms.Decided(decree))

    def _send(self, dst: Peer, message: ms.Message) -> None:
        self._out.append(ms.Send(dst, message))

    def _close(self, last: ms.Evicted | ms.Left | ms.StartFailed) -> None:
        self.closed = True
        self._out.append(last)


def _first(founders: Iterable[Member]) -> Decree:
    members = {m.rank: dataclasses.replace(m, joined=1) for m in founders}
    return Decree(View(1, members), {m.rank: m.incarnation for m in members.values()}, frozenset())
