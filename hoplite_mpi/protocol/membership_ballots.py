"""How one view agrees on the next: the rules of single-decree Paxos, and who is enough to go on."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from hoplite_mpi.protocol.membership_messages import (
    NOBODY,
    Accepted,
    Ballot,
    Decree,
    Message,
    Peer,
    Prepare,
    Promise,
    Proof,
    Propose,
    Reject,
)

__all__ = ["Acceptor", "Attempt"]


@dataclass
class Acceptor:
    """What one member has promised and accepted in one view."""

    #: number of the view
    base: int
    #: no ballot below this one is followed; only grows
    promised: Ballot = NOBODY
    #: ballot of `accepted`, at most `promised`
    accepted_ballot: Ballot = NOBODY
    accepted: Decree | None = None

    def prepare(self, ballot: Ballot) -> Promise | Reject:
        """Answer a `Prepare`; the same question again gets the same answer."""
        if ballot < self.promised:
            return Reject(self.base, ballot, self.promised)
        self.promised = ballot
        return Promise(self.base, ballot, self.accepted_ballot, self.accepted)

    def propose(self, ballot: Ballot, value: Decree) -> Accepted | Reject:
        """Answer a `Propose`."""
        if ballot < self.promised:
            return Reject(self.base, ballot, self.promised)
        self.promised = self.accepted_ballot = ballot
        self.accepted = value
        return Accepted(self.base, ballot)


@dataclass
class Attempt:
    """One ballot of one process for what comes after the view *base*."""

    base: Decree
    ballot: Ballot
    #: None while promises are collected; one value for a ballot
    value: Decree | None = None
    #: rank → its answer in this phase; own included
    answers: dict[int, Promise | Accepted] = field(default_factory=dict)

    def question(self) -> Message:
        """Return what to ask the members now."""
        if self.value is None:
            return Prepare(self.base, self.ballot)
        return Propose(self.base, self.ballot, self.value)

    def missing(self) -> list[Peer]:
        """Return the members that have not answered, sorted."""
        members = self.base.view.members.values()
        return sorted((m.rank, m.incarnation) for m in members if m.rank not in self.answers)

    def take(self, src: Peer, answer: Promise | Accepted) -> None:
        """Note an answer if it belongs to this ballot and phase."""
        current = (answer.base, answer.ballot) == (self.base.view.number, self.ballot)
        if current and self.base.view.has(*src) and isinstance(answer, Promise) == (self.value is None):
            self.answers[src[0]] = answer

    def waits(self, down: Collection[Peer]) -> bool:
        """Whether somebody who isn't down has still to answer."""
        return any(peer not in down for peer in self.missing())

    def is_enough(self, down: Mapping[Peer, Proof]) -> bool:
        """Whether to go on without the missing, who are all *down*.

        The view's coordinator (round 0) and a successor can't both have enough: half and more than half of a view
        share a member. A dead one counts only if all who are missing are dead: it may have voted before it died,
        and only somebody silent can have taken that vote.
        """
        if all(down[peer] == "reset" for peer in self.missing()):
            return True
        doubled, size = 2 * len(self.answers), len(self.base.view)
        return doubled > size or (doubled == size and self.ballot[0] == 0)

    def accepted_before(self) -> Decree | None:
        """Return the value that has to be proposed: the one of the highest ballot that a promise tells of."""
        promises = [answer for answer in self.answers.values() if isinstance(answer, Promise)]
        return max(promises, key=lambda p: p.accepted_ballot).accepted
