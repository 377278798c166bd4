"""The arena within one process; two Arena objects stand for two processes (each has a slot of its own)."""

from __future__ import annotations

import gc
import os
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hoplite_mpi.errors import ClosedError, HopliteError, StoreFullError
from hoplite_mpi.ids import ObjectID
from hoplite_mpi.memory import Arena, HostMemory, Memory, Region, arena_directory, op_by_name
from hoplite_mpi.meta import Meta
from tests.hoplite_mpi.memory.objects import MIB, A, B, get, numbers, put

# -- objects


_DTYPES = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(),
    hnp.floating_dtypes(),
    hnp.complex_number_dtypes(),
    hnp.byte_string_dtypes(min_len=1, max_len=9),
    hnp.unicode_string_dtypes(min_len=1, max_len=9),
    hnp.datetime64_dtypes(),
    hnp.array_dtypes(max_size=3),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_arrays_of_any_dtype_and_shape_come_back_bit_for_bit(arena: Arena, mate: Arena, data: st.DataObject) -> None:
    dtype = data.draw(_DTYPES)
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    raw = data.draw(st.binary(min_size=8, max_size=8))
    nbytes = int(np.prod(shape, dtype=int)) * dtype.itemsize
    array = np.ndarray(shape, dtype, buffer=bytearray((raw * (nbytes // 8 + 1))[: max(nbytes, 1)]))
    oid = ObjectID.random()
    meta = Meta.of_array(array)
    region = arena.allocate(oid, meta)
    region.data[:] = array.tobytes()
    assert region.seal()
    for one in (arena, mate):
        pinned = one.map(oid)
        assert pinned is not None
        assert pinned.meta == meta
        view = pinned.array()
        assert (view.dtype, view.shape) == (dtype, shape)
        assert view.tobytes() == array.tobytes() == bytes(pinned.buffer)
        assert not view.flags.writeable
    assert mate.delete(oid)


def test_raw_bytes(arena: Arena) -> None:
    region = arena.allocate(A, Meta.of_bytes(5))
    region.data[:] = b"hello"
    region.seal()
    pinned = arena.map(A)
    assert pinned is not None
    assert bytes(pinned.value()) == b"hello"
    assert pinned.buffer.readonly
    assert pinned.buffer.format == "B"


def test_data_is_page_aligned(arena: Arena) -> None:
    put(arena, A, numbers(3))
    assert get(arena, A).ctypes.data % 4096 == 0


def test_view_cannot_be_made_writable(arena: Arena, mate: Arena) -> None:
    put(arena, A, numbers(10))
    for one in (arena, mate):
        view = get(one, A)
        with pytest.raises(ValueError, match="WRITEABLE"):
            view.flags.writeable = True


def test_unsealed_object_is_not_there(arena: Arena, mate: Arena) -> None:
    region = arena.allocate(A, Meta.of_bytes(8))
    assert not mate.exists(A)
    assert mate.map(A) is None
    assert list(mate.objects()) == []
    region.seal()
    assert mate.exists(A)
    assert [(info.oid, info.version, info.rank, info.incarnation) for info in mate.objects()] == [(A, 0, 0, 0)]


def test_versions_are_apart(arena: Arena, mate: Arena) -> None:
    put(arena, A, numbers(4), version=0)
    put(arena, A, numbers(4, first=100), version=3)
    assert get(mate, A, 0)[0] == 0
    assert get(mate, A, 3)[0] == 100
    assert mate.map(A, 1) is None
    assert mate.delete(A, 0)
    assert {(info.oid, info.version) for info in arena.objects()} == {(A, 3)}


def test_seal_under_another_version(arena: Arena) -> None:
    region = arena.allocate(A, Meta.of_bytes(4))
    region.seal(version=7)
    assert arena.map(A) is None
    assert arena.exists(A, 7)


def test_second_seal_of_an_object_keeps_the_first(arena: Arena, mate: Arena) -> None:
    assert put(arena, A, numbers(4))
    region = mate.allocate(A, Meta.of_array(numbers(4)))
    region.array()[:] = numbers(4)
    data = region.data
    assert region.seal() is False
    assert get(mate, A).base is not None
    assert mate.used() == 0
    assert np.array_equal(np.frombuffer(data, np.int64), numbers(4)), "who is still sending from it may go on"
    assert [info.rank for info in arena.objects()] == [0]


def test_region_cannot_be_sealed_twice_or_after_abandon(arena: Arena) -> None:
    region = arena.allocate(A, Meta.of_bytes(4))
    region.seal()
    with pytest.raises(ClosedError, match="published"):
        region.seal()
    region = arena.allocate(B, Meta.of_bytes(4))
    region.abandon()
    region.abandon()
    with pytest.raises(ClosedError, match="abandoned"):
        _ = region.data
    with pytest.raises(ClosedError, match="private"):
        arena.allocate_private(10).seal()


def test_same_object_twice_is_the_same_memory(arena: Arena, mate: Arena) -> None:
    put(arena, A, numbers(10))
    first = get(mate, A)
    address = first.ctypes.data
    assert get(mate, A).ctypes.data == address
    del first
    assert get(mate, A).ctypes.data == address, "the mapping is kept without a view, too"


def test_no_descriptor_is_held_per_object(arena: Arena, mate: Arena) -> None:
    before = len(os.listdir("/proc/self/fd"))
    oids = [ObjectID.random() for _ in range(50)]
    for oid in oids:
        put(arena, oid, numbers(10))
    views = [get(mate, oid) for oid in oids]
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(views) == 50


def test_description_that_exceeds_the_header_is_refused(arena: Arena) -> None:
    array = np.zeros(2, np.dtype([(f"field_{k}", "f8") for k in range(200)]))
    with pytest.raises(ValueError, match="fewer fields"):
        arena.allocate(A, Meta.of_array(array))
    assert arena.used() == 0


def test_foreign_file_is_named(arena: Arena) -> None:
    path = os.path.join(arena.directory, A.hex())
    with open(path, "wb") as file:
        file.write(b"x" * 8192)
    with pytest.raises(HopliteError, match=A.hex()):
        arena.map(A)
    os.unlink(path)


@pytest.mark.parametrize("name", ["", "../x", "a b", "a/b", "x" * 65])
def test_run_ids_that_are_no_file_names(name: str) -> None:
    with pytest.raises(ValueError, match="run id"):
        Arena(name, 0, 0)


# -- limits


def test_memory_limit(run: str) -> None:
    with Arena(run, 0, 0, memory_limit=10 * MIB) as arena:
        put(arena, A, numbers())
        with pytest.raises(StoreFullError, match="memory_limit"):
            arena.allocate(B, Meta.of_array(numbers()))
        assert arena.used() == 8 * MIB
        arena.delete(A)
        put(arena, B, numbers())
        with pytest.raises(StoreFullError):
            arena.allocate_private(8 * MIB)


def test_memory_that_others_deleted_does_not_count(run: str) -> None:
    with Arena(run, 0, 0, memory_limit=10 * MIB) as arena, Arena(run, 1, 0) as mate:
        put(arena, A, numbers())
        mate.delete(A)
        put(arena, B, numbers())


def test_more_than_there_is(arena: Arena) -> None:
    with pytest.raises(StoreFullError, match="free|available"):
        arena.allocate(A, Meta.of_bytes(1 << 45))
    assert arena.used() == 0
    assert os.listdir(arena.directory) == ["members"]


# -- private memory, quarantine


def test_private_memory_has_no_name_and_is_recycled(arena: Arena) -> None:
    region = arena.allocate_private(MIB)
    assert os.listdir(arena.directory) == ["members"]
    region.data[:] = bytes(MIB)
    region.abandon()
    assert arena.used() == 0
    again = arena.allocate_private(MIB)
    assert arena.statistics().allocations_recycled == 1
    assert again.nbytes == MIB


def quarantined(arena: Arena, oid: ObjectID, *, seal: bool) -> tuple[Region, memoryview]:
    region = arena.allocate(oid, Meta.of_array(numbers()))
    region.array()[:] = numbers()
    if seal:
        region.seal()
    data = region.data
    region.quarantine()
    return region, data


@pytest.mark.parametrize("seal", [False, True])
def test_quarantine_within_this_process(run: str, seal: bool, child: Any) -> None:
    """A quarantined region is never recycled, though nobody holds it.

    (In a process of its own: it lasts as long as that.)
    """
    process = child(
        f"""
arena = Arena(run, 0, 0)
region = arena.allocate(A, Meta.of_bytes(1 << 23))
region.data[:4] = b"keep"
if {seal}:
    region.seal()
import ctypes
address = np.frombuffer(region.data, np.uint8).ctypes.data
region.quarantine()
region.quarantine()
region.abandon()
del region
assert os.listdir(arena.directory) == ["members"], os.listdir(arena.directory)
assert arena.map(A) is None
for k in range(3):
    put(arena, ObjectID.random(), np.full(1 << 23, 255, np.uint8))
assert arena.statistics().allocations_recycled == 0
assert arena.statistics().quarantined == 1 << 23
assert arena.used() == 4 << 23
arena.close()
late = (ctypes.c_char * 4).from_address(address)  # what a late message does
assert late.raw == b"keep"
late.raw = b"late"
say("done")
"""
    )
    assert process.hear() == "done"
    assert process.wait() == 0


# -- closing


def test_closed(run: str) -> None:
    arena = Arena(run, 0, 0)
    arena.close()
    arena.close()
    for call in (lambda: arena.map(A), lambda: arena.allocate(A, Meta.of_bytes(1)), lambda: arena.delete(A)):
        with pytest.raises(ClosedError):
            call()
    assert not os.path.exists(arena.directory)


def test_attach_does_not_make_a_run(run: str) -> None:
    with pytest.raises(ClosedError, match="gone"):
        Arena.attach(run, 0, 0)
    assert not os.path.exists(arena_directory(run))


def test_close_leaves_sealed_objects_to_the_others_and_the_last_one_removes_all(run: str) -> None:
    arena, mate = Arena(run, 0, 0), Arena(run, 1, 0)
    put(arena, A, numbers())
    region = arena.allocate(B, Meta.of_bytes(4))
    arena.close()
    assert get(mate, A)[-1] == MIB - 1
    assert sorted(os.listdir(mate.directory)) == sorted([A.hex(), "members"])
    with pytest.raises(ClosedError):
        region.seal()
    del region
    mate.close()
    assert not os.path.exists(mate.directory)


def test_views_outlive_close_and_pin_until_they_die(run: str) -> None:
    arena, mate = Arena(run, 0, 0), Arena(run, 1, 0)
    put(arena, A, numbers())
    view = get(mate, A)
    mate.close()
    arena.delete(A)
    put(arena, B, numbers(first=1))
    assert arena.statistics().allocations_recycled == 0
    assert np.array_equal(view, numbers())
    del view
    put(arena, A, numbers(first=2))
    assert arena.statistics().allocations_recycled == 1
    arena.close()


def test_views_outlive_their_arena(run: str) -> None:
    arena = Arena(run, 0, 0)
    put(arena, A, numbers())
    view = get(arena, A)
    arena.close()
    directory = arena.directory
    del arena
    gc.collect()
    assert not os.path.exists(directory)
    assert np.array_equal(view, numbers())


def test_directory_of_somebody_else_is_refused(run: str) -> None:
    directory = arena_directory(run)
    os.mkdir(directory, 0o777)
    os.chmod(directory, 0o777)
    try:
        with pytest.raises(PermissionError, match="private"):
            Arena(run, 0, 0)
    finally:
        os.rmdir(directory)


def test_arena_whose_files_were_removed_closes(run: str) -> None:
    arena = Arena(run, 0, 0)
    put(arena, A, numbers(10))
    for name in os.listdir(arena.directory):
        os.unlink(os.path.join(arena.directory, name))
    os.rmdir(arena.directory)
    assert arena.map(A) is None
    arena.close()


# -- the narrow interface


def test_host_memory(arena: Arena) -> None:
    memory = HostMemory(arena)
    assert isinstance(memory, Memory)
    target = np.frombuffer(memory.allocate_private(80).data, np.int64)
    event = memory.copy(target, numbers(10))
    assert event.wait(1)
    assert event.done()
    assert memory.reduce(op_by_name("sum"), target, target, numbers(10)).done()
    assert np.array_equal(target, 2 * numbers(10))
    with pytest.raises(TypeError):
        memory.copy(target, np.zeros(10))
