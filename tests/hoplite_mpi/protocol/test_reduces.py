"""Reduces in the object protocol, case by case."""

from __future__ import annotations

import numpy as np
import pytest

from hoplite_mpi.ids import ObjectID
from hoplite_mpi.meta import Meta
from hoplite_mpi.protocol import events as ev
from hoplite_mpi.protocol import messages as ms
from tests.hoplite_mpi.protocol.cases import make, owned_by, until
from tests.hoplite_mpi.protocol.world import CHUNKS, Node, digest_of, meta_of

SOURCES = [ObjectID.from_name(f"source {i}") for i in range(6)]


def request(
    rid: ObjectID, n: int, number: int | None = None, shape: str | None = "chain", degree: int | None = None
) -> ev.ReduceRequested:
    return ev.ReduceRequested(rid, tuple(SOURCES[:n]), "sum", number, shape, degree=degree)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("shape", ["chain", "star", "tree_of_chains", "d_ary", None])
def test_reduce_of_all(small: bool, shape: str | None) -> None:
    world = make(6)
    rid = owned_by(world, 0)
    world.reduce(1, request(rid, 6, shape=shape))
    for rank in range(6):
        world.get(rank, rid)
        world.put(rank, SOURCES[rank], 1 << rank, small)
    world.settle()
    assert all(node.delivered[rid].sources == frozenset(SOURCES) for node in world.nodes.values())
    assert not any(node.slots for node in world.nodes.values())


@pytest.mark.parametrize(
    ("shape", "degree", "children"),
    [
        ("chain", None, [0, 1, 1, 1, 1, 1]),
        ("star", None, [0, 5, 0, 0, 0, 0]),
        ("d_ary", 2, [0, 2, 0, 2, 0, 1]),
        ("d_ary", 3, [0, 2, 0, 3, 0, 0]),
        ("tree_of_chains", None, [0, 2, 0, 2, 0, 1]),
    ],
)
@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4, 5), (5, 4, 3, 2, 1, 0), (3, 0, 5, 1, 4, 2)])
def test_the_shape_asked_for_is_filled_in_order_of_arrival(
    shape: str, degree: int | None, children: list[int], order: tuple[int, ...]
) -> None:
    world = make(7)
    rid = owned_by(world, 0)
    world.reduce(6, request(rid, 6, shape=shape, degree=degree))
    for rank in order:
        world.put(rank, SOURCES[rank], 1 << rank)
        until(world, lambda: not any(world.links.values()))
    assert [(start.slot, start.num_children) for _, start in world.slot_starts] == list(enumerate(children))
    assert [rank for rank, _ in world.slot_starts] == list(order)


@pytest.mark.parametrize(("shape", "degree", "root"), [("chain", None, 5), ("star", None, 1), ("d_ary", 2, 3)])
def test_the_source_of_the_caller_is_the_root_whenever_it_comes(shape: str, degree: int | None, root: int) -> None:
    for caller in range(6):
        world = make(6)
        rid = owned_by(world, 0)
        world.reduce(caller, request(rid, 6, shape=shape, degree=degree))
        for rank in range(6):
            world.put(rank, SOURCES[rank], 1 << rank)
            until(world, lambda: not any(world.links.values()))
        slot_of = {rank: start.slot for rank, start in world.slot_starts}
        # Later than the others it finds the root taken, if the root isn't the last slot.
        assert slot_of[caller] == (root if caller <= root else caller)
        others = [slot_of[rank] for rank in range(6) if rank != caller]
        assert others == sorted(others)
        world.get(caller, rid)
        world.settle()
        assert world.nodes[caller].delivered[rid].sources == frozenset(SOURCES)


def test_the_source_of_the_caller_does_not_come_before_earlier_ones() -> None:
    world = make(6)
    rid = owned_by(world, 0)
    world.reduce(1, request(rid, 6, 2))
    world.get(1, rid)
    for rank in (3, 4, 5, 1):
        world.put(rank, SOURCES[rank], 1 << rank)
        until(world, lambda: not any(world.links.values()))
    assert not world.nodes[1].delivered
    world.change(kill=[4])
    assert world.view.owner(bytes(rid)) == 0
    world.settle()
    assert world.nodes[1].delivered[rid].sources == {SOURCES[3], SOURCES[5]}


@pytest.mark.parametrize(("shape", "degree"), [("ring", None), ("chain", 2), ("d_ary", 0)])
def test_a_shape_that_there_is_not_fails_at_once(shape: str, degree: int | None) -> None:
    world = make(2)
    rid = owned_by(world, 0)
    world.reduce(1, request(rid, 2, shape=shape, degree=degree))
    assert world.nodes[1].failed == {rid: "reduce"}


def test_reduce_takes_the_first_to_arrive() -> None:
    world = make(6)
    rid = owned_by(world, 0)
    world.reduce(1, request(rid, 6, 3))
    for rank in (4, 2, 5, 1):
        world.put(rank, SOURCES[rank], 1 << rank)
        until(world, lambda rank=rank: len(world.slot_starts) > 0 and not any(world.links.values()))  # type: ignore[misc]
    world.get(0, rid)
    world.settle()
    assert world.nodes[0].delivered[rid].sources == {SOURCES[4], SOURCES[2], SOURCES[5]}


def test_inline_source_announced_twice_counts_once() -> None:
    world = make(3)
    rid = owned_by(world, 0)
    world.reduce(1, request(rid, 3, 2))
    world.put(1, SOURCES[0], 1, small=True)
    world.settle()
    again = ms.Source(world.view.number, SOURCES[0], meta_of(True), 1, 0, np.full(2, 1, np.int64).tobytes())
    for _ in range(3):
        world.handle(world.nodes[0], ev.MessageReceived(1, again))
    world.get(2, rid)
    world.settle()
    assert not world.nodes[2].delivered
    world.put(2, SOURCES[1], 2, small=True)
    world.settle()
    assert world.nodes[2].delivered[rid].sources == {SOURCES[0], SOURCES[1]}


def test_death_restarts_ancestors_only_and_a_backup_takes_the_slot() -> None:
    world = make(8)
    rid = owned_by(world, 7)
    world.reduce(6, request(rid, 6, 5, "d_ary", 2))
    world.get(6, rid)
    order = [0, 1, 2, 3, 4, 5]
    for rank in order:
        world.put(rank, SOURCES[rank], 1 << rank)
        until(world, lambda rank=rank: not any(world.links.values()))  # type: ignore[misc]
    slot_of = dict(world.slot_starts)
    if world.nodes[6].delivered:
        pytest.fail("the reduce was over before the death")
    victim = next(rank for rank, start in slot_of.items() if start.num_children == 0 and start.slot == 0)
    before = len(world.slot_starts)
    world.change(kill=[victim])
    if world.view.owner(bytes(rid)) != 7:
        pytest.fail("the coordinator has changed")
    world.settle()
    # binary tree over 5: 0 → 1 → 3, 2 → 1, 4 → 3
    again = {start.slot for _, start in world.slot_starts[before:]}
    assert again == {0, 1, 3}
    assert world.nodes[6].delivered[rid].sources == frozenset(SOURCES) - {SOURCES[victim]}


@pytest.mark.parametrize("seed", range(20))
def test_death_of_coordinator_starts_a_new_version(seed: int) -> None:
    world = make(5, seed=seed)
    rid = owned_by(world, 0)
    world.reduce(1, request(rid, 4))
    for rank in range(1, 5):
        world.put(rank, SOURCES[rank - 1], 1 << rank)
        world.get(rank, rid)
    for _ in range(seed * 5):
        world.step()
    world.change(kill=[0])
    world.settle()
    seen = {node.delivered[rid].version for node in world.nodes.values()}
    assert len(seen) == 1


@pytest.mark.parametrize("seed", range(20))
def test_death_of_root_after_final_makes_it_again(seed: int) -> None:
    world = make(5, seed=seed)
    rid = owned_by(world, 0)
    world.reduce(1, request(rid, 4, 3))
    for rank in range(1, 5):
        world.put(rank, SOURCES[rank - 1], 1 << rank)
    until(world, lambda: any(node.protocol.client.holds(rid) for node in world.nodes.values()))
    root = next(rank for rank, node in world.nodes.items() if node.protocol.client.holds(rid))
    caller = 1 if root != 1 else 2
    world.change(kill=[root])
    world.get(caller, rid)
    world.settle()
    assert world.nodes[caller].delivered[rid].sources is not None


def test_sources_that_differ_fail_with_both_named() -> None:
    world = make(3)
    rid = owned_by(world, 0)
    world.reduce(1, request(rid, 2))
    world.get(2, rid)
    world.put(1, SOURCES[0], 1)
    world.settle()
    other = Meta("ndarray", 8 * CHUNKS, np.dtype(np.float64), (CHUNKS,))
    node, texts = world.nodes[2], []
    world.nodes[2].data[SOURCES[1], 0] = [2] * CHUNKS
    plain = world.carry_out

    def record(node: Node, instruction: ev.Instruction) -> None:
        if isinstance(instruction, ev.Fail):
            texts.append(instruction.text)
        plain(node, instruction)

    world.carry_out = record  # type: ignore[method-assign]
    world.handle(node, ev.ObjectStored(SOURCES[1], other, digest_of(2)))
    world.settle()
    assert node.failed[rid] == "reduce"
    assert all(word in texts[0] for word in ("float64", "int64", repr(SOURCES[0]), repr(SOURCES[1])))


@pytest.mark.parametrize("number", [0, 4])
def test_impossible_number_of_sources_fails_at_once(number: int) -> None:
    world = make(2)
    rid = owned_by(world, 0)
    world.reduce(1, request(rid, 3, number))
    assert world.nodes[1].failed == {rid: "reduce"}
