"""What becomes of freed memory: deleting, recycling, and the pins that keep it."""

from __future__ import annotations

import gc
import os
import threading
from typing import Any

import numpy as np
import pytest

from hoplite_mpi.ids import ObjectID
from hoplite_mpi.memory import Arena
from hoplite_mpi.meta import Meta
from tests.hoplite_mpi.memory.objects import MIB, A, B, get, numbers, put


def test_delete(arena: Arena, mate: Arena) -> None:
    put(arena, A, numbers(10))
    assert mate.delete(A)
    assert not arena.delete(A)
    assert arena.used() == 0
    assert arena.map(A) is None
    assert not arena.exists(A)


def test_object_deleted_by_another_is_not_found_in_the_cache(arena: Arena, mate: Arena) -> None:
    put(arena, A, numbers(10))
    view = get(arena, A)
    assert mate.delete(A)
    assert arena.map(A) is None
    assert view[9] == 9


def test_freed_memory_is_recycled(arena: Arena) -> None:
    put(arena, A, numbers())
    arena.delete(A)
    assert arena.statistics().recyclable == 8 * MIB
    put(arena, B, numbers(first=5))
    statistics = arena.statistics()
    assert (statistics.allocations_fresh, statistics.allocations_recycled, statistics.recyclable) == (1, 1, 0)
    assert np.array_equal(get(arena, B), numbers(first=5))


def test_much_larger_memory_is_not_wasted_on_a_small_object(arena: Arena) -> None:
    put(arena, A, numbers())
    arena.delete(A)
    put(arena, B, numbers(10))
    assert arena.statistics().allocations_recycled == 0


def test_recycle_limit(run: str) -> None:
    with Arena(run, 0, 0, recycle_limit=MIB) as arena:
        put(arena, A, numbers())
        arena.delete(A)
        assert arena.statistics().recyclable == 0
        assert len(os.listdir(arena.directory)) == 1, "only the members file is left"


@pytest.mark.parametrize("deleter", ["owner", "mate"])
def test_recycled_memory_never_changes_under_a_reader(arena: Arena, mate: Arena, deleter: str) -> None:
    put(arena, A, numbers())
    view = get(mate, A)[100:200]
    who = arena if deleter == "owner" else mate
    who.delete(A)
    for k in range(3):
        oid = ObjectID.random()
        put(arena, oid, numbers(first=-MIB))
        put(mate, oid, numbers(first=-MIB), version=1)
        assert np.array_equal(view, np.arange(100, 200)), k
        arena.delete(oid)
        mate.delete(oid, 1)
    recycled = who.statistics().recyclable
    assert recycled > 0
    del view
    who.trim()
    before = who.statistics().allocations_fresh
    regions = [who.allocate(ObjectID.random(), Meta.of_array(numbers())) for _ in range(recycled // (8 * MIB))]
    assert who.statistics().allocations_fresh == before, "all of it is used again once nobody looks"
    del regions


def test_any_derived_view_keeps_the_pin(arena: Arena, mate: Arena) -> None:
    put(arena, A, numbers())
    pinned = mate.map(A)
    assert pinned is not None
    views: list[Any] = [
        pinned.buffer[8:16],
        pinned.array()[1:2].reshape(1, 1).view(np.uint8),
        memoryview(pinned.array())[1:2],
    ]
    del pinned
    arena.delete(A)
    while views:
        put(arena, B, numbers(first=7))
        assert bytes(views[-1]) == numbers(2)[1:].tobytes()
        assert arena.statistics().allocations_recycled == 0
        arena.delete(B)
        arena._pool.clear()  # what was just freed must not be what is recycled below
        del views[-1]
    put(arena, B, numbers())
    assert arena.statistics().allocations_recycled == 1


def test_buffer_of_a_deleted_region_keeps_its_bytes(arena: Arena) -> None:
    """As it is while MPI still sends from it."""
    region = arena.allocate(A, Meta.of_array(numbers()))
    region.array()[:] = numbers()
    region.seal()
    sending = region.data[: 8 * MIB]
    del region
    arena.delete(A)
    put(arena, B, numbers(first=9))
    assert arena.statistics().allocations_recycled == 0
    assert np.array_equal(np.frombuffer(sending, np.int64), numbers())


def test_dropped_region_comes_back(arena: Arena) -> None:
    region = arena.allocate(A, Meta.of_array(numbers()))
    data = region.data
    del region
    assert arena.used() == 8 * MIB, "somebody may still write to it"
    del data
    assert arena.used() == 0
    assert arena.statistics().recyclable == 8 * MIB


def test_views_die_in_other_threads_and_in_cycles(arena: Arena, mate: Arena) -> None:
    """The pins come off wherever the last view dies.

    In any thread, and in a garbage collection within an arena call.
    """
    oids = [ObjectID.random() for _ in range(20)]
    for oid in oids:
        put(arena, oid, numbers(1000))
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for k in range(200):
                cycle: list[Any] = [get(mate, oids[k % len(oids)])]
                cycle.append(cycle)
                assert cycle[0][999] == 999
        except BaseException as error:
            errors.append(error)

    threshold = gc.get_threshold()
    gc.set_threshold(5)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    finally:
        gc.set_threshold(*threshold)
    assert errors == []
    gc.collect()
    for oid in oids:
        assert arena.delete(oid)
    for _ in oids:
        put(arena, ObjectID.random(), numbers(1000))
    assert arena.statistics().allocations_recycled == len(oids)


def test_threads_allocate_seal_map_and_delete(arena: Arena, mate: Arena) -> None:
    errors: list[BaseException] = []

    def work(number: int) -> None:
        mine = (arena, mate)[number % 2]
        try:
            for k in range(60):
                oid = ObjectID.random()
                put(mine, oid, numbers(1000, first=number * 1000 + k))
                view = get((arena, mate)[k % 2], oid)
                (arena, mate)[(k // 2) % 2].delete(oid)
                put(mine, ObjectID.from_name(f"{number}.{k}"), numbers(1000))
                mine.delete(ObjectID.from_name(f"{number}.{k}"))
                assert np.array_equal(view, numbers(1000, first=number * 1000 + k))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert errors == []
    for one in (arena, mate):
        one.trim()
        assert one.used() == 0


def test_adopt(arena: Arena, mate: Arena) -> None:
    put(arena, A, numbers())
    assert mate.adopt(A)
    assert [info.rank for info in arena.objects()] == [1]
    assert mate.used() == 8 * MIB
    assert mate.delete(A)
    assert mate.used() == 0
    put(mate, B, numbers(first=3))
    assert mate.statistics().allocations_recycled == 1
    assert get(arena, B)[0] == 3
    assert not mate.adopt(A)


def test_warm(arena: Arena) -> None:
    arena.warm(8 * MIB)
    put(arena, A, numbers())
    assert arena.statistics().allocations_recycled == 1
    assert arena.used() == 8 * MIB
