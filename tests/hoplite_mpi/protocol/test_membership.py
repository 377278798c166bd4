"""Membership in one situation each; no MPI."""

from __future__ import annotations

import pytest

from hoplite_mpi.protocol.membership import Membership
from hoplite_mpi.protocol.membership_messages import (
    Accepted,
    Alive,
    Decided,
    Decree,
    Evicted,
    Install,
    Instruction,
    JoinRequested,
    Leave,
    LeaveRequested,
    Left,
    MessageReceived,
    Peer,
    PeerDown,
    PeerUp,
    Prepare,
    Probe,
    Promise,
    Propose,
    Reject,
    Report,
    Send,
    SilenceLasts,
    StartFailed,
    StartTimeout,
)
from hoplite_mpi.protocol.view import View
from tests.hoplite_mpi.protocol.membership_world import World, member


def settled(n: int) -> World:
    world = World.founded(n)
    world.settle()
    return world


def ranks(world: World) -> dict[Peer, list[int]]:
    return {peer: world.installed[peer][-1].ranks for peer in world.open_peers()}


def part(world: World, left: list[int], right: list[int]) -> None:
    for a in left:
        for b in right:
            world.cut((a, 0), (b, 0), 0)


def test_founders_known_at_once_have_the_same_first_view() -> None:
    world = World.founded(3)
    assert [views[0].number for views in world.installed.values()] == [1, 1, 1]
    assert world.views[1].coordinator == 0
    assert world.views[1].ranks == [0, 1, 2]


def test_founders_started_one_by_one_wait_for_the_last() -> None:
    world = World()
    for rank in range(2):
        world.add(Membership(member(rank), size=3))
    world.start()
    world.settle()
    assert world.views == {}
    world.add(Membership(member(2), size=3))
    world.settle()
    assert ranks(world) == {(0, 0): [0, 1, 2], (1, 0): [0, 1, 2], (2, 0): [0, 1, 2]}


def test_one_founder_alone_starts_at_once() -> None:
    machine = Membership(member(0), size=1)
    (install,) = machine.start()
    assert isinstance(install, Install)
    assert (install.view.number, install.view.ranks) == (1, [0])


def test_start_timeout_names_the_missing_ranks() -> None:
    machine = Membership(member(0), size=4)
    assert machine.start() == []
    machine.handle(JoinRequested(member(2)))
    (failed,) = machine.handle(StartTimeout())
    assert isinstance(failed, StartFailed)
    assert failed.missing == (1, 3)
    assert "1, 3" in failed.reason
    assert machine.handle(JoinRequested(member(1))) == []  # final
    other = Membership(member(1), size=4)
    (failed,) = other.handle(StartTimeout())
    assert isinstance(failed, StartFailed)
    assert "rank 0" in failed.reason
    assert settled(2).processes[1, 0].handle(StartTimeout()) == []


def test_a_founder_that_dies_before_the_start_can_be_replaced() -> None:
    world = World()
    for rank in range(2):
        world.add(Membership(member(rank), size=3))
    world.settle()
    world.close((1, 0), 0)
    world.add(Membership(member(2), size=3))
    world.settle()
    assert world.views == {}
    world.add(Membership(member(1, 1), size=3))
    world.settle()
    assert world.views[1].members[1].incarnation == 1
    world.check_one_side()


def test_the_collector_dies_while_it_tells_of_the_first_view() -> None:
    world = World.collected(4)
    while (0, 0) not in world.views_now():
        world.step(world.busy()[-1])
    while world.channels[(0, 0), (2, 0)]:
        world.step(((0, 0), (2, 0)))
    assert set(world.views_now()) == {(0, 0), (2, 0)}
    world.close((0, 0), 1)
    world.settle()
    assert ranks(world) == {(1, 0): [1, 2, 3], (2, 0): [1, 2, 3], (3, 0): [1, 2, 3]}


@pytest.mark.parametrize("lost", [0, 1, 2, 3])
def test_the_coordinator_dies_while_it_tells_of_a_view(lost: int) -> None:
    world = settled(5)
    world.close((4, 0), 0)
    while world.views_now()[0, 0] == 1:
        world.step(world.busy()[0])
    world.close((0, 0), lost)
    world.settle()
    assert ranks(world) == {(r, 0): [1, 2, 3] for r in (1, 2, 3)}


@pytest.mark.parametrize("survivor", [0, 1, 4])
def test_one_survivor_of_deaths_that_are_proven_goes_on(survivor: int) -> None:
    world = settled(5)
    for rank in range(5):
        if rank != survivor:
            world.close((rank, 0), 0)
    world.settle()
    assert ranks(world) == {(survivor, 0): [survivor]}
    world.add(Membership(member(2 if survivor != 2 else 3, 1)))
    world.settle()
    world.check_one_side()
    assert len(world.open_peers()) == 2


def test_both_sides_of_two_suspect_each_other_and_the_coordinator_goes_on() -> None:
    world = settled(2)
    part(world, [0], [1])
    world.settle()
    assert ranks(world) == {(0, 0): [0]}
    last = world.last[1, 0]
    assert isinstance(last, Evicted)
    assert "1 of the 2" in last.reason


@pytest.mark.parametrize(
    ("left", "right", "going"),
    [
        ([0], [1, 2], [1, 2]),
        ([0, 1], [2, 3], [0, 1]),
        ([2, 3], [0, 1], [0, 1]),
        ([0, 3], [1, 2], [0, 3]),
        ([0, 1], [2, 3, 4], [2, 3, 4]),
        ([0], [1], [0]),
    ],
)
def test_the_larger_side_goes_on_or_that_of_the_coordinator(
    left: list[int], right: list[int], going: list[int]
) -> None:
    world = settled(len(left) + len(right))
    part(world, left, right)
    world.settle()
    assert ranks(world) == {(rank, 0): going for rank in going}
    for rank in {*left, *right} - {*going}:
        assert isinstance(world.last[rank, 0], Evicted)


def test_the_dead_dont_vote_where_somebody_is_silent() -> None:
    world = settled(4)
    world.close((3, 0), 0)  # and before anybody noticed:
    part(world, [0], [1, 2])
    world.settle()
    # With 3 as a vote for both, 0 and 3 were half and 1, 2 and 3 more than half.
    world.check_one_side()
    assert (0, 0) in world.last


def test_deaths_are_counted_one_view_after_the_other() -> None:
    world = settled(4)
    world.close((3, 0), 0)
    world.settle()
    part(world, [0], [1, 2])
    world.settle()
    assert ranks(world) == {(1, 0): [1, 2], (2, 0): [1, 2]}


def test_two_members_that_reach_all_but_each_other_lose_the_younger() -> None:
    world = settled(4)
    part(world, [1], [3])
    world.settle()
    assert ranks(world) == {(r, 0): [0, 1, 2] for r in (0, 1, 2)}
    assert isinstance(world.last[3, 0], Evicted)


def test_a_report_of_silence_alone_puts_nobody_out() -> None:
    machine = settled(3).processes[0, 0]
    out = machine.handle(MessageReceived((2, 0), Report((2, 0), (1, 0), "silence")))
    assert out == [Send((1, 0), Probe())]  # which of the two is it?
    (proposal,) = machine.handle(PeerDown(1, 0, "reset"))
    assert isinstance(proposal, Send)
    assert isinstance(proposal.message, Propose)
    assert proposal.message.value.view.ranks == [0, 2]


def test_a_successor_waits_for_those_who_still_see_the_coordinator() -> None:
    world = settled(3)
    assert world.processes[1, 0].handle(PeerDown(0, 0, "silence")) == []
    (to_two,) = world.processes[1, 0].handle(SilenceLasts(0, 0))
    assert isinstance(to_two, Send)
    assert isinstance(to_two.message, Prepare)
    two = world.processes[2, 0]
    out = two.handle(MessageReceived((1, 0), to_two.message))
    assert out == [Send((0, 0), Report((1, 0), (0, 0), "silence"))]
    (promise,) = two.handle(PeerDown(0, 0, "reset"))[:1]
    assert isinstance(promise, Send)
    assert isinstance(promise.message, Promise)


def test_the_larger_part_of_a_cut_goes_on_only_when_the_silence_has_lasted() -> None:
    machine = settled(3).processes[0, 0]
    assert machine.handle(PeerDown(2, 0, "silence")) == []
    (proposal,) = machine.handle(SilenceLasts(2, 0))
    assert isinstance(proposal, Send) and isinstance(proposal.message, Propose)
    out = machine.handle(MessageReceived((1, 0), Accepted(1, (0, 0))))
    assert any(isinstance(what, Install) and what.view.ranks == [0, 1] for what in out)


def test_the_larger_part_goes_on_with_whom_it_hears_again() -> None:
    machine = settled(3).processes[0, 0]
    machine.handle(PeerDown(2, 0, "silence"))
    machine.handle(PeerUp(2, 0))
    assert machine.handle(SilenceLasts(2, 0)) == []


def test_a_death_and_a_silence_that_begins_while_it_is_voted_on() -> None:
    machine = settled(4).processes[0, 0]
    assert len(machine.handle(PeerDown(3, 0, "reset"))) == 2
    machine.handle(MessageReceived((1, 0), Accepted(1, (0, 0))))
    machine.handle(PeerDown(2, 0, "silence"))
    assert machine.view is not None and machine.view.number == 1
    out = machine.handle(SilenceLasts(2, 0))
    assert any(isinstance(what, Install) and what.view.ranks == [0, 1, 2] for what in out)


def test_a_coordinator_that_was_stopped_keeps_those_who_missed_it() -> None:
    """It reads, when it goes on, what was said of it meanwhile."""
    machine = settled(3).processes[0, 0]
    for _ in range(3):
        assert machine.handle(MessageReceived((2, 0), Report((1, 0), (0, 0), "silence"))) == []


def test_a_member_that_was_stopped_and_who_missed_it_stay() -> None:
    machine = settled(4).processes[0, 0]
    missed = Report((1, 0), (2, 0), "silence")
    for _ in range(3):  # while it is stopped it is asked again and again
        assert machine.handle(MessageReceived((1, 0), missed)) == [Send((2, 0), Probe())]
    assert machine.handle(MessageReceived((2, 0), Alive())) == []
    # was under way when it went on
    assert machine.handle(MessageReceived((1, 0), missed)) == [Send((2, 0), Probe())]
    assert machine.handle(MessageReceived((2, 0), Alive())) == []
    # but who goes on saying so can really not talk to it
    machine.handle(MessageReceived((1, 0), missed))
    proposal = machine.handle(MessageReceived((2, 0), Alive()))[0]
    assert isinstance(proposal, Send) and isinstance(proposal.message, Propose)
    assert proposal.message.value.view.ranks == [0, 1, 3]


def test_the_smaller_part_of_a_cut_ends_at_once() -> None:
    machine = settled(3).processes[2, 0]
    machine.handle(PeerDown(0, 0, "silence"))
    (last,) = machine.handle(PeerDown(1, 0, "silence"))
    assert isinstance(last, Evicted)


def test_repeated_and_stale_news_change_nothing() -> None:
    world = settled(3)
    world.close((2, 0), 0)
    world.settle()
    machine = world.processes[0, 0]
    for event in (
        PeerDown(2, 0, "reset"),
        PeerDown(2, 0, "silence"),
        PeerDown(0, 0, "reset"),
        MessageReceived((1, 0), Report((1, 0), (2, 0), "reset")),
        MessageReceived((1, 0), Leave((2, 0))),
        MessageReceived((1, 0), Accepted(1, (0, 0))),
        MessageReceived((1, 0), Promise(2, (7, 0), (0, -1), None)),
        MessageReceived((1, 0), Reject(1, (0, 0), (9, 1))),
        MessageReceived((1, 0), Alive()),
    ):
        assert machine.handle(event) == []
    assert machine.view == world.views[2]


def test_a_member_that_is_behind_is_told_the_newer_view() -> None:
    world = settled(3)
    old = Decided(Decree(world.views[1], {0: 0, 1: 0, 2: 0}, frozenset()))
    world.close((2, 0), 0)
    world.settle()
    (reply,) = world.processes[0, 0].handle(MessageReceived((1, 0), old))
    assert isinstance(reply, Send)
    assert isinstance(reply.message, Decided)
    assert reply.message.decree.view.number == 2
    (reply,) = world.processes[0, 0].handle(MessageReceived((2, 0), Prepare(old.decree, (1, 2))))
    assert isinstance(reply, Send)
    out = settled(3).processes[2, 0].handle(MessageReceived((0, 0), reply.message))
    assert isinstance(out[-1], Evicted)


def test_a_replacement_puts_out_the_older_incarnation_in_the_same_change() -> None:
    world = settled(3)
    world.add(Membership(member(1, 1)))
    world.settle()
    assert [world.views[n].members[1].incarnation for n in sorted(world.views)] == [0, 1]
    assert isinstance(world.last[1, 0], Evicted)
    assert world.views[2].members[1].joined == 2
    world.check_one_side()


def test_an_incarnation_is_let_in_once() -> None:
    world = settled(2)
    world.close((1, 0), 0)
    world.settle()
    again = Membership(member(1, 0))
    (reply,) = world.processes[0, 0].handle(JoinRequested(again.me))
    assert isinstance(reply, Send)
    (last,) = again.handle(MessageReceived((0, 0), reply.message))
    assert isinstance(last, Evicted)
    world.add(Membership(member(1, 5)))
    world.settle()
    world.close((1, 5), 0)
    world.settle()
    number = max(world.views)
    world.processes[0, 0].handle(JoinRequested(member(1, 4)))
    assert world.processes[0, 0].view == world.views[number]


def test_a_joiner_dies_at_any_moment() -> None:
    for moment in range(40):
        world = settled(3)
        world.add(Membership(member(3, 0)))
        for _ in range(moment):
            if busy := world.busy():
                world.step(busy[-1])
        world.close((3, 0), moment % 3)
        world.settle()
        assert ranks(world) == {(r, 0): [0, 1, 2] for r in range(3)}


def test_a_joiner_finds_another_way_when_the_coordinator_dies() -> None:
    world = settled(3)
    world.add(Membership(member(3)))
    world.close((0, 0), 0)
    world.settle()
    assert ranks(world) == {(r, 0): [1, 2, 3] for r in (1, 2, 3)}
    assert world.views[max(world.views)].coordinator == 1


@pytest.mark.parametrize("leaver", [0, 1, 2])
def test_who_leaves_is_not_lost(leaver: int) -> None:
    world = settled(3)
    seen: dict[Peer, list[Instruction]] = {}
    do = world.do

    def record(peer: Peer, instructions: list[Instruction]) -> None:
        seen.setdefault(peer, []).extend(i for i in instructions if isinstance(i, Install))
        do(peer, instructions)

    world.do = record  # type: ignore[method-assign]
    world.give((leaver, 0), LeaveRequested())
    world.settle()
    assert world.last == {(leaver, 0): Left()}
    for peer in world.open_peers():
        (install,) = seen[peer]
        assert isinstance(install, Install)
        assert ([m.rank for m in install.left], install.lost) == ([leaver], ())


def test_all_leave_at_once() -> None:
    world = settled(4)
    for rank in range(4):
        world.give((rank, 0), LeaveRequested())
    world.settle()
    assert world.last == {(rank, 0): Left() for rank in range(4)}


def test_a_member_back_from_a_cut_hears_that_it_is_out() -> None:
    world = settled(3)
    for rank in (0, 1):
        world.cut((rank, 0), (2, 0), 0)
        world.channels[(rank, 0), (2, 0)].clear()  # 2 hasn't noticed
    world.settle()
    assert world.processes[2, 0].view == world.views[1]
    world.heal((0, 0), (2, 0))
    world.settle()
    assert isinstance(world.last[2, 0], Evicted)
    assert ranks(world) == {(0, 0): [0, 1], (1, 0): [0, 1]}


def test_the_death_of_a_peer_that_was_silent_and_unheard_since_proves_nothing() -> None:
    founders = [member(0), member(1), member(2)]
    machine = Membership(member(2), founding=founders)
    machine.start()
    machine.handle(PeerDown(0, 0, "silence"))
    machine.handle(PeerUp(0, 0))
    machine.handle(PeerDown(0, 0, "reset"))
    out = machine.handle(PeerDown(1, 0, "reset"))
    assert isinstance(out[-1], Evicted)  # 0 and 1 may have gone on without it
    heard = Membership(member(2), founding=founders)
    heard.start()
    heard.handle(PeerDown(0, 0, "silence"))
    heard.handle(PeerUp(0, 0))
    heard.handle(MessageReceived((0, 0), Probe()))
    heard.handle(PeerDown(0, 0, "reset"))
    out = heard.handle(PeerDown(1, 0, "reset"))
    assert isinstance(out[-1], Install)


def test_two_views_with_one_number_stop_the_process() -> None:
    world = settled(3)
    other = View(1, {m.rank: m for m in world.views[1].members.values() if m.rank < 2})
    (last,) = world.processes[0, 0].handle(MessageReceived((1, 0), Decided(Decree(other, {0: 0, 1: 0}, frozenset()))))
    assert isinstance(last, Evicted)
    assert "two different views" in last.reason


def test_a_question_is_put_again_when_the_channel_is_back() -> None:
    machine = settled(3).processes[0, 0]
    first = machine.handle(PeerDown(2, 0, "reset"))
    machine.handle(PeerUp(1, 0))
    again = machine.handle(PeerUp(1, 0))
    assert first == again == [i for i in first if isinstance(i, Send) and isinstance(i.message, Propose)]
