"""The rules by which one view agrees on the next."""

from __future__ import annotations

import pytest

from hoplite_mpi.protocol.membership import Membership
from hoplite_mpi.protocol.membership_ballots import Acceptor, Attempt
from hoplite_mpi.protocol.membership_messages import (
    NOBODY,
    Accepted,
    Decree,
    Message,
    MessageReceived,
    Peer,
    PeerDown,
    Prepare,
    Promise,
    Proof,
    Propose,
    Reject,
    Send,
)
from hoplite_mpi.protocol.view import Member, View


def decree(number: int, *ranks: int) -> Decree:
    members = {rank: Member(rank, 0, "node", ("127.0.0.1", rank), 1) for rank in ranks}
    return Decree(View(number, members), dict.fromkeys(ranks, 0), frozenset())


def test_an_acceptor_follows_no_ballot_below_its_promise() -> None:
    acceptor = Acceptor(1)
    value, other = decree(2, 0, 1), decree(2, 1, 2)
    assert acceptor.propose((0, 0), value) == Accepted(1, (0, 0))
    assert acceptor.prepare((1, 1)) == Promise(1, (1, 1), (0, 0), value)
    assert acceptor.propose((0, 0), other) == Reject(1, (0, 0), (1, 1))
    assert acceptor.prepare((1, 0)) == Reject(1, (1, 0), (1, 1))
    assert acceptor.accepted == value
    assert acceptor.prepare((1, 1)) == Promise(1, (1, 1), (0, 0), value)  # asked again
    assert acceptor.propose((1, 1), other) == Accepted(1, (1, 1))
    assert acceptor.propose((1, 1), other) == Accepted(1, (1, 1))
    assert acceptor.prepare((2, 2)) == Promise(1, (2, 2), (1, 1), other)


def test_the_value_of_the_highest_ballot_has_to_be_proposed() -> None:
    old, newer = decree(2, 0, 1), decree(2, 1, 2)
    attempt = Attempt(decree(1, 0, 1, 2, 3), (3, 1))
    attempt.take((1, 0), Promise(1, (3, 1), NOBODY, None))
    assert attempt.accepted_before() is None
    attempt.take((2, 0), Promise(1, (3, 1), (1, 2), newer))
    attempt.take((3, 0), Promise(1, (3, 1), (0, 0), old))
    assert attempt.accepted_before() == newer


def test_an_attempt_takes_answers_to_its_own_question_only() -> None:
    attempt = Attempt(decree(1, 0, 1, 2), (1, 1))
    attempt.take((0, 0), Promise(1, (2, 2), NOBODY, None))  # another ballot
    attempt.take((0, 0), Promise(2, (1, 1), NOBODY, None))  # another view
    attempt.take((0, 0), Accepted(1, (1, 1)))  # another phase
    attempt.take((0, 1), Promise(1, (1, 1), NOBODY, None))  # another incarnation
    attempt.take((7, 0), Promise(1, (1, 1), NOBODY, None))  # not a member
    assert attempt.missing() == [(0, 0), (1, 0), (2, 0)]
    attempt.take((0, 0), Promise(1, (1, 1), NOBODY, None))
    assert attempt.missing() == [(1, 0), (2, 0)]
    assert attempt.waits({(1, 0)})
    assert not attempt.waits({(1, 0), (2, 0)})


@pytest.mark.parametrize(
    ("size", "answered", "dead", "coordinator", "successor"),
    [
        (1, 1, 0, True, True),
        (2, 1, 0, True, False),
        (2, 1, 1, True, True),
        (3, 1, 0, False, False),
        (3, 1, 1, False, False),
        (3, 1, 2, True, True),
        (3, 2, 0, True, True),
        (4, 2, 0, True, False),
        (4, 2, 1, True, False),  # a dead one is no vote while another is silent
        (4, 1, 2, False, False),
        (4, 2, 2, True, True),
        (4, 3, 0, True, True),
        (5, 2, 2, False, False),
        (5, 3, 1, True, True),
    ],
)
def test_who_is_enough(size: int, answered: int, dead: int, coordinator: bool, successor: bool) -> None:
    down: dict[Peer, Proof] = {(rank, 0): "silence" for rank in range(answered, size)}
    down.update({(rank, 0): "reset" for rank in range(answered, answered + dead)})
    for ballot, enough in (((0, 0), coordinator), ((1, 0), successor)):
        attempt = Attempt(decree(1, *range(size)), ballot)
        for rank in range(answered):
            attempt.take((rank, 0), Promise(1, ballot, NOBODY, None))
        assert not attempt.waits(down)
        assert attempt.is_enough(down) == enough


def test_a_coordinator_that_is_rejected_asks_in_a_higher_round() -> None:
    # A second value in round 0 could be accepted beside the first one.
    members = [Member(rank, 0, "node", ("127.0.0.1", rank)) for rank in range(4)]
    machine = Membership(members[0], founding=members)
    machine.start()
    machine.handle(PeerDown(3, 0, "reset"))
    out = machine.handle(MessageReceived((1, 0), Reject(1, (0, 0), (4, 1))))
    questions = {send.dst: send.message for send in out if isinstance(send, Send)}
    assert set(questions) == {(1, 0), (2, 0)}
    for question in questions.values():
        assert isinstance(question, Prepare)
        assert question.ballot == (5, 0)
    machine.handle(MessageReceived((1, 0), Promise(1, (5, 0), (4, 1), theirs := decree(2, 0, 1))))
    out = machine.handle(MessageReceived((2, 0), Promise(1, (5, 0), NOBODY, None)))
    assert [send.message.value for send in out if isinstance(send, Send) and isinstance(send.message, Propose)] == [
        theirs
    ] * 2


@pytest.mark.parametrize("wire", [None, [], ["Nothing"], ["Join"], ["Join", {"member": [1]}], ["Accepted", 1, 2, 3], 7])
def test_what_is_no_message_is_refused(wire: object) -> None:
    with pytest.raises(ValueError, match=r"not a message|unpack"):
        Message.from_wire(wire)
