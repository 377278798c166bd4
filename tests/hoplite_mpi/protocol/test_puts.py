"""Puts in the object protocol, whole and in pieces, and copies that go to make room, case by case."""

from __future__ import annotations

import pytest

from hoplite_mpi.protocol import events as ev
from tests.hoplite_mpi.protocol.cases import make, owned_by, partial, until, value
from tests.hoplite_mpi.protocol.world import CHUNKS, digest_of, meta_of


def test_second_put_with_other_bytes_fails() -> None:
    world = make(3)
    oid = owned_by(world, 0)
    world.put(1, oid, 7)
    world.settle()
    world.put(2, oid, 8)
    world.put(0, oid, 7)
    world.settle()
    assert world.nodes[2].failed == {oid: "exists"}
    assert not world.nodes[0].failed
    world.get(2, oid)
    world.settle()
    assert value(world.nodes[2], oid) == 7


@pytest.mark.parametrize("seed", range(20))
def test_of_racing_puts_one_stays(seed: int) -> None:
    world = make(4, seed=seed)
    oid = owned_by(world, 0)
    world.values[oid] = 0
    world.put(1, oid, 7)
    world.put(2, oid, 8)
    world.change(kill=[0])
    world.settle()
    failed = [rank for rank in (1, 2) if world.nodes[rank].failed.get(oid) == "exists"]
    assert len(failed) == 1
    world.values[oid] = {1: 8, 2: 7}[failed[0]]
    world.get(failed[0], oid)
    world.get(3, oid)
    world.settle()
    assert world.nodes[3].delivered
    assert world.nodes[failed[0]].delivered


def test_others_receive_what_is_being_put() -> None:
    world = make(3)
    oid = owned_by(world, 0)
    world.get(2, oid)
    world.start_put(1, oid, 7)
    until(world, lambda: partial(world, 2, oid))
    assert world.nodes[1].writing[oid] < CHUNKS
    assert not world.nodes[2].delivered
    world.settle()
    assert value(world.nodes[2], oid) == 7
    assert not world.nodes[1].putting


def test_what_is_being_put_is_bound_to_its_bytes() -> None:
    world = make(3)
    oid = owned_by(world, 0)
    world.start_put(1, oid, 7)
    until(world, lambda: world.nodes[0].protocol.directory.entry(oid).bound)
    world.put(2, oid, 8)
    until(world, lambda: world.nodes[2].failed.get(oid) == "exists")
    world.settle()
    assert world.nodes[1].protocol.client.holds(oid)


def test_an_answer_to_a_put_that_was_given_up_is_none_to_the_next() -> None:
    """Of the next one, with other bytes: somebody else has put in between, so it is refused and never confirmed."""
    world = make(3)
    oid = owned_by(world, 0)
    world.start_put(1, oid, 7)
    while world.links[1, 0]:
        world.receive(1, 0)  # accepted; rank 1 has not heard of it
    world.fail_put(1)
    while world.links[1, 0]:
        world.receive(1, 0)
    world.put(2, oid, 8)
    while world.links[2, 0]:
        world.receive(2, 0)
    world.nodes[1].putting.add(oid)
    world.handle(world.nodes[1], ev.ObjectStored(oid, meta_of(False), digest_of(9), None, True))
    world.nodes[1].data[oid, 0] = [9] * CHUNKS
    world.receive(0, 1)  # the answer to the first one
    assert not world.nodes[1].protocol.client.holds(oid)
    assert oid in world.nodes[1].putting
    world.values[oid] = 8
    world.get(1, oid)
    world.settle()
    assert world.nodes[1].failed == {oid: "exists"}
    assert value(world.nodes[1], oid) == 8


def test_a_put_takes_no_other_put_s_copy() -> None:
    world = make(2)
    oid = owned_by(world, 0)
    world.start_put(1, oid, 7)
    node = world.nodes[1]
    world.handle(node, ev.ObjectStored(oid, meta_of(False), digest_of(8), None, True))
    assert node.failed == {oid: "exists"}
    assert node.protocol.client.writes(oid)


def test_a_rank_that_spills_speaks_for_its_node() -> None:
    world = make(3, machines=1)
    oid = owned_by(world, 0)
    world.put(1, oid, 7)
    world.get(2, oid)
    world.settle()
    for spilled in (True, False):
        # rank 0 has no copy, but the same memory and disk
        world.handle(world.nodes[0], ev.ObjectSpilled(oid, 0, spilled))
        world.settle()
        places = world.nodes[0].protocol.directory.entry(oid).places
        assert {rank: place.spilled for rank, place in places.items()} == {1: spilled, 2: spilled}


def test_a_copy_in_memory_is_taken_before_one_on_disk() -> None:
    world = make(4)
    oid = owned_by(world, 0)
    world.put(1, oid, 7)
    world.get(2, oid)
    world.settle()
    world.handle(world.nodes[2], ev.ObjectSpilled(oid, 0, True))
    world.settle()
    world.get(3, oid)
    world.settle()
    assert world.starts[-1].sender == 1
