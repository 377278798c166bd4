"""The object protocol, case by case."""

from __future__ import annotations

import numpy as np
import pytest

from hoplite_mpi.ids import ObjectID
from hoplite_mpi.meta import Meta
from hoplite_mpi.protocol import events as ev
from hoplite_mpi.protocol import messages as ms
from hoplite_mpi.protocol.entry import Entry
from hoplite_mpi.protocol.wire import decode, encode
from tests.hoplite_mpi.protocol.cases import make, owned_by, partial, until, value
from tests.hoplite_mpi.protocol.world import CHUNKS, World

SOURCES = [ObjectID.from_name(f"source {i}") for i in range(6)]


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
