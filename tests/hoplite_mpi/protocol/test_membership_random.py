"""Membership under random deaths, cuts, joins and leaves, in any interleaving; no MPI."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from hoplite_mpi.protocol.membership import Membership
from hoplite_mpi.protocol.membership_messages import (
    Evicted,
    LeaveRequested,
    Peer,
)
from tests.hoplite_mpi.protocol.membership_world import World, member

steps = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 30), st.integers(0, 30)), max_size=60)


def play(world: World, n: int, program: list[tuple[int, int, int]], *, bipartition: bool, links: bool) -> None:
    incarnations = dict.fromkeys(range(n), 0)
    side: set[Peer] | None = None
    for op, a, b in program:
        peers, busy = world.open_peers(), world.busy()
        if not peers:
            break
        peer = peers[a % len(peers)]
        if op <= 5:
            for _ in range(b % 5 + 1):  # let some of what is under way arrive
                if busy := world.busy():
                    world.step(busy[(a * 7 + b) % len(busy)])
        elif op == 6:
            world.close(peer, b % 4)
        elif op in (7, 8):
            free = [r for r in range(n + 1) if not any(p[0] == r for p in peers)]
            if free:
                rank = free[b % len(free)]
                incarnations[rank] = incarnations.get(rank, -1) + 1
                newcomer = member(rank, incarnations[rank])
                with_side = side is not None and peer in side
                away = set() if side is None else {p for p in peers if (p in side) != with_side}
                world.add(Membership(newcomer), cut_from=away)  # which has nothing to do at its start
                if with_side and side is not None:
                    side.add((rank, incarnations[rank]))
        elif op == 9:
            world.give(peer, LeaveRequested())
        elif op == 10 and bipartition and side is None:
            side = {p for i, p in enumerate(peers) if (a >> (i % 5)) & 1}
            for p in side:
                for q in set(peers) - side:
                    world.cut(p, q, b % 4)
        elif op == 11 and links:
            other = peers[b % len(peers)]
            if other != peer:
                world.cut(peer, other, b % 3)
        elif op == 12 and links and (cuts := world.healable()):
            world.heal(*cuts[a % len(cuts)])
    world.settle()


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 5), steps)
def test_deaths_joins_and_leaves_end_in_one_view_of_the_living(n: int, program: list[tuple[int, int, int]]) -> None:
    world = World.founded(n)
    play(world, n, program, bipartition=False, links=False)
    world.check_one_side()
    assert not any(isinstance(last, Evicted) for last in world.last.values()), (
        "nobody was silent, so nobody may be evicted"
    )
    waiting = [p for p in world.open_peers() if world.processes[p].view is None]
    assert not waiting or not world.views_now(), "who asks to join is let in"


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 5), steps)
def test_whatever_happens_at_the_start_there_is_one_view(n: int, program: list[tuple[int, int, int]]) -> None:
    world = World.collected(n)
    play(world, n, program, bipartition=False, links=False)
    world.check_one_side()
    waiting = [p for p in world.open_peers() if world.processes[p].view is None]
    assert not waiting or not world.views_now(), "who knows of a view tells those in it"


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 6), steps)
def test_at_most_one_side_of_a_cut_goes_on(n: int, program: list[tuple[int, int, int]]) -> None:
    world = World.founded(n)
    play(world, n, program, bipartition=True, links=False)
    world.check_one_side()


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 6), steps)
@example(3, [(0, 0, 3), (9, 0, 0), (11, 0, 1)])  # a successor asks in a view that ends before it is answered
def test_any_cuts_leave_one_view_whose_members_all_reach_each_other(
    n: int, program: list[tuple[int, int, int]]
) -> None:
    world = World.founded(n)
    play(world, n, program, bipartition=True, links=True)
    world.check_one_side()
