"""The arena between real processes, some of which are killed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hoplite_mpi.ids import ObjectID
from hoplite_mpi.memory import Arena
from hoplite_mpi.meta import Meta

A, B = ObjectID.from_name("a"), ObjectID.from_name("b")
MIB = 1 << 20

Start = Callable[..., Any]


def put(arena: Arena, oid: ObjectID, array: np.ndarray[Any, Any]) -> None:
    region = arena.allocate(oid, Meta.of_array(array))
    region.array()[...] = array
    assert region.seal()


def test_bytes_outlive_their_killed_owner(run: str, child: Start) -> None:
    with Arena(run, 0, 0) as arena:
        process = child("arena = Arena(run, 1, 4); say(put(arena, A, np.arange(1 << 20))); hear()")
        assert process.hear() is True
        process.kill()
        (info,) = arena.objects()
        assert (info.oid, info.rank, info.incarnation) == (A, 1, 4)
        pinned = arena.map(A)
        assert pinned is not None
        assert np.array_equal(pinned.array(), np.arange(MIB))


def test_pin_of_a_live_process_holds_and_of_a_killed_one_does_not(run: str, child: Start) -> None:
    with Arena(run, 0, 0) as arena:
        put(arena, A, np.arange(MIB))
        process = child(
            "arena = Arena.attach(run, 0, 0); view = arena.map(A).array(); say(1); hear(); say(int(view.sum())); hear()"
        )
        process.hear()
        arena.delete(A)
        put(arena, B, np.zeros(MIB, np.int64))
        assert arena.statistics().allocations_recycled == 0
        process.tell()
        assert process.hear() == MIB * (MIB - 1) // 2
        process.kill()
        put(arena, A, np.ones(MIB, np.int64))
        assert arena.statistics().allocations_recycled == 1


def test_pins_of_a_killed_process_are_not_those_of_its_slots_next_holder(run: str, child: Start) -> None:
    with Arena(run, 0, 0) as arena:
        put(arena, A, np.arange(MIB))
        hold = """
arena = Arena.attach(run, 0, 0)
view = arena.map(ObjectID.from_name(sys.argv[2]))
say(arena._roster.slot)
hear()
"""
        first = child(hold, "a")
        slot = first.hear()
        first.kill()
        second = child(hold, "none")
        assert second.hear() == slot
        arena.delete(A)
        put(arena, B, np.arange(MIB))
        assert arena.statistics().allocations_recycled == 1


def test_files_of_a_worker_killed_while_it_writes_are_reaped(run: str, child: Start) -> None:
    with Arena(run, 0, 0) as arena:
        filling = child(
            "arena = Arena.attach(run, 0, 0); put(arena, A, np.arange(10));"
            "region = arena.allocate(B, Meta.of_bytes(1 << 20)); say(1); hear()"
        )
        filling.hear()
        assert arena.reap(filling.pid) == 0, "it lives"
        filling.kill()
        assert arena.reap(filling.pid + 1) == 0
        assert arena.reap(filling.pid) == 1
        assert not arena.exists(B)
        assert arena.exists(A)
        assert sorted(os.listdir(arena.directory)) == sorted([A.hex(), "members"])


@pytest.mark.parametrize("point", ["seal", "deleted", "created", "reserved"])
def test_killed_at_the_worst_moment(run: str, child: Start, point: str) -> None:
    """Whenever it dies, the object is there whole or not at all, and what it leaves is reaped."""
    code = """
import signal
import hoplite_mpi.memory._allocator as allocator
import hoplite_mpi.memory.arena as module
die = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
arena = Arena.attach(run, 0, 0)
point = sys.argv[2]
say(put(arena, A, np.arange(1000)))
if point == "seal":
    module.rename_new = die
elif point == "deleted":
    arena._retire = die
elif point == "created":
    os.posix_fallocate = die
elif point == "reserved":
    allocator.Mapping = die
arena.delete(A) if point == "deleted" else put(arena, B, np.arange(1000))
"""
    with Arena(run, 0, 0) as arena:
        process = child(code, point)
        assert process.hear() is True
        assert process.wait() == -9
        assert arena.exists(A) == (point != "deleted")
        assert arena.map(B) is None
        assert not arena.delete(B)
        assert arena.reap() == 1
        put(arena, B, np.arange(1000))


def test_full_file_system_is_an_error_and_not_a_crash(child: Start, tmp_path: Path) -> None:
    """A tmpfs of 8 MiB; the bytes of every region that was given out can be written."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a tmpfs")
    process = child(
        """
root = sys.argv[2]
arena = Arena(run, 0, 0, root=root)
mate = Arena(run, 1, 0, root=root)
regions = []
while True:
    oid = ObjectID.random()
    try:
        regions.append(arena.allocate(oid, Meta.of_bytes(1 << 20)))
    except StoreFullError as error:
        say(str(error))
        break
for region in regions:
    region.data[:] = b"x" * (1 << 20)
    assert region.seal()
say(len(regions))
small = Arena(run, 2, 0, root=root, recycle_limit=0)
try:
    kept = []
    while True:
        kept.append(small.allocate(ObjectID.random(), Meta.of_bytes(4096)))
except StoreFullError:
    say("small ones too")
kept.clear()
names = [name for name in os.listdir(arena.directory) if name.startswith("tmp.")]
assert names == [], names
# a neighbour gets the room that we keep warm, though we have it mapped; we notice
oids = [info.oid for info in arena.objects()]
del regions, region
for oid in oids[:3]:
    assert arena.delete(oid)
assert arena.statistics().recyclable == 3 << 20
big = mate.allocate(A, Meta.of_bytes(3 << 20))
big.data[:] = b"y" * (3 << 20)
say(mate.statistics().allocations_fresh)
try:
    arena.allocate(B, Meta.of_bytes(1 << 20))
except StoreFullError:
    say("full again")
big.abandon()
arena.allocate(B, Meta.of_bytes(1 << 20)).data[:] = b"z" * (1 << 20)
say("room again")
os._exit(0)
""",
        str(tmp_path),
        prefix=("unshare", "-m", "sh", "-c", f'mount -t tmpfs -o size=8m none {tmp_path} && exec "$0" "$@"'),
    )
    message = process.hear()
    assert "1048576 bytes" in message
    assert "free" in message
    assert process.hear() == 7
    assert process.hear() == "small ones too"
    assert process.hear() == 1
    assert process.hear() == "full again"
    assert process.hear() == "room again"
    assert process.wait() == 0


def test_fork_leaves_pins_and_files_to_the_parent(run: str, child: Start) -> None:
    process = child(
        """
arena = Arena(run, 0, 0)
put(arena, A, np.arange(1 << 20))
mate = Arena(run, 1, 0)
view = mate.map(A).array()
region = arena.allocate(B, Meta.of_bytes(10))
pid = os.fork()
if pid == 0:
    ok = int(view[5]) == 5
    del view, region
    try:
        arena.map(A)
        ok = False
    except ClosedError:
        pass
    arena.close(), mate.close()
    os._exit(0 if ok else 1)
assert os.waitpid(pid, 0)[1] == 0
arena.delete(A)
put(arena, ObjectID.random(), np.zeros(1 << 20, np.int64))
say(arena.statistics().allocations_recycled)
say(region.seal())
del view, region
put(arena, A, np.zeros(1 << 20, np.int64))
say(arena.statistics().allocations_recycled)
arena.close(), mate.close()
"""
    )
    assert [process.hear() for _ in range(3)] == [0, True, 1]
    assert process.wait() == 0


def test_reader_that_writes_through_a_pointer_crashes_itself(run: str, child: Start) -> None:
    with Arena(run, 0, 0) as arena:
        put(arena, A, np.arange(1000))
        process = child(
            "import ctypes; arena = Arena.attach(run, 0, 0); view = arena.map(A).array(); say(1);"
            "ctypes.memset(view.ctypes.data, 0, 8)"
        )
        process.hear()
        assert process.wait() == -11
        pinned = arena.map(A)
        assert pinned is not None
        assert pinned.array()[1] == 1


def test_stress_readers_never_see_bytes_of_another_object(run: str, child: Start) -> None:
    """One process publishes and deletes as fast as it can, recycling; readers map what they find, and look twice."""
    reader = """
arena = Arena.attach(run, 1, 0)
say("ready")
seen = 0
while not os.path.exists(os.path.join(arena.directory, ObjectID.from_name("end").hex())):
    for k in range(4):
        pinned = arena.map(ObjectID.from_name(f"hot{k}"))
        if pinned is not None:
            array = pinned.array()
            first = int(array[0])
            assert first % 4 == k, (first, k)
            assert (array == first).all() and (array == first).all(), "it changed under the reader"
            seen += 1
            del array, pinned
say(seen)
arena.close()
"""
    with Arena(run, 0, 0) as arena:
        readers = [child(reader) for _ in range(2)]
        for one in readers:
            assert one.hear() == "ready"
        for count in range(4000):
            oid = ObjectID.from_name(f"hot{count % 4}")
            arena.delete(oid)
            put(arena, oid, np.full(2048, count))
        put(arena, ObjectID.from_name("end"), np.zeros(1))
        assert sum(one.hear() for one in readers) > 0
        assert arena.statistics().allocations_recycled > 0
        for one in readers:
            assert one.wait() == 0
