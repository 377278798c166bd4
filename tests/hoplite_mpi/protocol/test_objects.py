"""The object protocol, case by case."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from hoplite_mpi.ids import ObjectID
from hoplite_mpi.meta import Meta
from hoplite_mpi.protocol import events as ev
from hoplite_mpi.protocol import messages as ms
from hoplite_mpi.protocol.entry import Entry
from hoplite_mpi.protocol.wire import decode, encode
from tests.hoplite_mpi.protocol.world import CHUNKS, Node, World, digest_of, meta_of

SOURCES = [ObjectID.from_name(f"source {i}") for i in range(6)]


def owned_by(world: World, rank: int, text: str = "") -> ObjectID:
    """Return an id whose shard that rank owns."""
    return next(
        oid for i in range(10_000) if world.view.owner(bytes(oid := ObjectID.from_name(f"{text}{rank}/{i}"))) == rank
    )


def make(ranks: int, machines: int | None = None, seed: int = 0) -> World:
    world = World(random.Random(seed), ranks, machines or ranks)
    world.settle()
    return world


def until(world: World, done: Callable[[], bool]) -> None:
    """Step until *done*."""
    while not done():
        assert world.step(), "nothing more happens"


def partial(world: World, rank: int, oid: ObjectID) -> bool:
    return any(o == oid and 0 < len(chunks) < CHUNKS for (o, _), chunks in world.nodes[rank].data.items())


def value(node: Node, oid: ObjectID) -> int:
    (chunks,) = {tuple(c) for (o, _), c in node.data.items() if o == oid}
    (found,) = set(chunks)
    return found


def test_get_before_put_waits_and_wakes() -> None:
    world = make(3)
    oid = owned_by(world, 0)
    world.get(1, oid)
    world.settle()
    assert not world.nodes[1].delivered
    world.put(2, oid, 7)
    world.settle()
    assert value(world.nodes[1], oid) == 7


def test_inline_object_needs_no_transfer() -> None:
    world = make(3)
    oid = owned_by(world, 0)
    world.put(1, oid, 7, small=True)
    world.get(2, oid)
    world.settle()
    assert oid in world.nodes[2].delivered
    assert not world.starts


@pytest.mark.parametrize("dead", [[0], [1], [0, 1]])
def test_inline_bytes_outlive_owner_or_putter(dead: list[int]) -> None:
    world = make(4)
    oid = owned_by(world, 0)
    world.put(1, oid, 7, small=True)
    world.settle()
    world.change(kill=dead)
    world.get(3, oid)
    world.settle()
    assert (oid in world.nodes[3].delivered) == (len(dead) == 1)


def test_many_getters_form_a_pipeline() -> None:
    world = make(8)
    oid = owned_by(world, 0)
    world.put(1, oid, 7)
    for rank in range(2, 8):
        world.get(rank, oid)
    world.settle()
    assert all(oid in world.nodes[rank].delivered for rank in range(2, 8))
    assert sum(t.sender == 1 for t in world.starts) < 4


def test_getters_that_come_one_by_one_are_spread_over_the_copies() -> None:
    world = make(8)
    oid = owned_by(world, 0)
    world.put(1, oid, 7)
    for rank in range(2, 8):
        world.get(rank, oid)
        world.settle()
    senders = [t.sender for t in world.starts]
    assert len(senders) == 6 and senders.count(1) == 1


def test_who_waits_behind_a_stalled_receiver_gets_the_sender_itself() -> None:
    world = make(4)
    oid = owned_by(world, 0)
    world.put(1, oid, 7)
    world.get(2, oid)
    while not any(t.sender == 1 for t in world.starts):
        assert world.step()
    world.get(3, oid)
    while not any(t.sender == 2 for t in world.starts):
        assert world.step()
    stalled = world.nodes[2].transfers[oid]  # rank 2 does nothing any more
    world.fail_transfer(world.nodes[3], world.nodes[3].transfers[oid])
    while not any(t.sender == 1 and t is not stalled for t in world.starts):
        assert world.step()
    assert world.nodes[3].transfers[oid].sender == 1
    assert oid not in world.nodes[2].transfers, "the sender has ended it"
    world.settle()
    assert oid in world.nodes[2].delivered and oid in world.nodes[3].delivered


def test_one_transfer_per_machine() -> None:
    world = make(8, machines=2)
    oid = owned_by(world, 0)
    world.put(1, oid, 7)
    for rank in (0, *range(2, 8)):
        world.get(rank, oid)
    world.settle()
    assert len(world.nodes[0].delivered) == len(world.nodes[7].delivered) == 1
    assert len(world.starts) == 1


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


def test_delete_reaches_copies_waiters_and_later_getters() -> None:
    world = make(4)
    oid, never = owned_by(world, 0), owned_by(world, 0, "never")
    world.put(1, oid, 7)
    world.get(2, oid)
    world.get(2, never)
    world.settle()
    world.delete(3, oid)
    world.delete(3, never)
    world.settle()
    assert not world.nodes[1].data
    assert not world.nodes[2].data
    assert world.nodes[2].failed == {never: "deleted"}
    world.change(kill=[0])
    world.get(1, oid)
    world.put(2, oid, 7)
    world.settle()
    assert world.nodes[1].failed[oid] == world.nodes[2].failed[oid] == "deleted"


def chain_of_three(world: World) -> ObjectID:
    """Rank 1 has an object, 2 receives it from 1 and 3 from 2, both have a part."""
    oid = owned_by(world, 0)
    world.put(1, oid, 7)
    world.settle()
    world.get(2, oid)
    until(world, lambda: oid in world.nodes[2].transfers)
    world.get(3, oid)
    until(world, lambda: partial(world, 3, oid))
    assert world.nodes[3].transfers[oid].sender == 2  # type: ignore[union-attr]
    return oid


def test_orphan_waits_resumes_and_never_takes_its_descendant() -> None:
    world = make(5)
    oid = chain_of_three(world)
    world.change(kill=[1])
    world.settle()
    assert not world.nodes[2].delivered
    had = len(world.nodes[2].data[oid, 0])
    assert 0 < had < CHUNKS
    world.put(4, oid, 7)
    world.settle()
    assert value(world.nodes[2], oid) == value(world.nodes[3], oid) == 7


def test_world_notices_a_cycle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Entry, "fed", lambda entry, rank: True)
    world = make(5)
    chain_of_three(world)
    world.change(kill=[1])
    with pytest.raises(AssertionError, match=r"cycle|itself"):
        world.settle()


def test_prefix_of_lost_bytes_is_not_mixed_with_new_ones() -> None:
    world = make(5)
    oid = chain_of_three(world)
    world.change(kill=[1])
    world.settle()
    world.values[oid] = 9
    world.put(4, oid, 9)
    world.settle()
    assert value(world.nodes[2], oid) == value(world.nodes[3], oid) == 9


def test_stale_failure_does_not_evict_live_sender() -> None:
    world = make(4)
    oid = owned_by(world, 0)
    world.put(1, oid, 7)
    world.settle()
    world.get(2, oid)
    until(world, lambda: oid in world.nodes[2].transfers)
    node = world.nodes[2]
    first = node.transfers[oid]
    world.fail_transfer(node, first)
    until(world, lambda: oid in node.transfers)
    second = node.transfers[oid]
    for _ in range(3):
        world.handle(node, ev.TransferFailed(oid, first.version, first.attempt))
        world.handle(node, ev.TransferDone(oid, first.version, first.attempt))
        world.handle(world.nodes[0], ev.MessageReceived(2, ms.Get(world.view.number, oid, first.attempt, 1)))
    assert node.transfers[oid] is second
    assert not node.delivered
    world.get(3, oid)
    world.settle()
    assert world.nodes[3].delivered


def test_owner_is_silent_before_the_last_report() -> None:
    world = make(3)
    oid = owned_by(world, 0)
    world.put(1, oid, 7)
    world.settle()
    world.change(join=[9])
    for rank in (0, 2, 9):
        world.install(world.nodes[rank])
    world.get(2, oid)
    while any(queue for (_, dst), queue in world.links.items() if dst == 0):
        for (src, dst), queue in list(world.links.items()):
            if dst == 0 and queue:
                world.receive(src, dst)
    assert not world.nodes[0].protocol.ready
    assert oid not in world.nodes[2].transfers
    world.settle()
    assert world.nodes[2].delivered


def test_locations_are_those_that_live() -> None:
    world = make(4)
    kept, lost = owned_by(world, 0, "kept"), owned_by(world, 3, "lost")
    world.put(1, kept, 7)
    world.put(2, lost, 8)
    world.settle()
    world.change(kill=[2])
    world.handle(world.nodes[1], ev.LocationsRequested(5, (kept, lost, ObjectID.from_name("never"))))
    world.settle()
    assert world.nodes[1].queries == {5: frozenset([kept])}


# -- reduce ------------------------------------------------------------------------------------------------------------


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


# -- wire --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.complex128, [("a", "<f4", (2,)), ("b", "i8")], bool])
def test_report_survives_the_wire(dtype: object) -> None:
    oid, meta = SOURCES[0], Meta.of_array(np.zeros((2, 3), np.dtype(dtype)))  # type: ignore[call-overload]
    record = ms.ObjectRecord(oid, 1 << 40, meta, b"x" * 16, True, True, False, True, True, frozenset(SOURCES), None, 3)
    spec = ms.ReduceSpec(oid, tuple(SOURCES), "sum", 2, None)
    bound = ms.Delivered(oid, 1, frozenset(SOURCES[:1]))
    requests = (ms.Get(3, oid, 1, None), ms.ReduceRequest(3, spec))
    report = ms.Report(3, (record,), (bound,), (oid,), (ms.SlotRecord(oid, 0, 1),), requests)
    assert decode(encode(report)) == report


def test_what_is_no_message_is_refused() -> None:
    with pytest.raises(ValueError, match="not a message"):
        decode(b"\x01")
