"""Objects that go to the node's disk when memory is short, and come back."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hoplite_mpi.errors import StoreFullError
from hoplite_mpi.ids import ObjectID
from hoplite_mpi.memory import Arena, HostMemory, Spill, arena_directory, spill_directory, sweep_spilled
from hoplite_mpi.meta import Meta
from tests.hoplite_mpi.memory.objects import MIB, numbers

#: bytes of one object, of which two fit in
SIZE = MIB
OIDS = [ObjectID.from_name(f"object {i}") for i in range(5)]


def memory_of(arena: Arena, parent: Path) -> HostMemory:
    directory = spill_directory(arena.directory, str(parent))
    assert directory is not None
    return HostMemory(arena, Spill(arena, directory))


@pytest.fixture
def memory(run: str, tmp_path: Path) -> Iterator[HostMemory]:
    with Arena(run, 0, 0, memory_limit=2 * SIZE, recycle_limit=0) as arena:
        memory = memory_of(arena, tmp_path)
        yield memory
    assert memory.spill is not None
    memory.spill.close()
    assert list(tmp_path.iterdir()) == [], "the last one out removes the directory"


def put(memory: HostMemory, number: int, version: int = 0) -> None:
    array = numbers(SIZE // 8, number)
    meta = Meta.of_array(array)
    region = memory.with_room(SIZE, lambda: memory.allocate(OIDS[number], meta, version))
    region.array()[...] = array
    assert region.seal()


def get(memory: HostMemory, number: int, version: int = 0) -> np.ndarray[Any, Any]:
    pinned = memory.fetch(OIDS[number], version)
    assert pinned is not None
    return pinned.array()


def test_the_longest_unused_goes_and_comes_back(memory: HostMemory) -> None:
    for number in range(2):
        put(memory, number)
    assert (get(memory, 0) == numbers(SIZE // 8, 0)).all()  # now 1 is the one that was used longest ago
    put(memory, 2)
    assert [memory.map(oid) is None for oid in OIDS[:3]] == [False, True, False]
    assert [memory.spilled(oid) for oid in OIDS[:3]] == [False, True, False]
    for number in range(3):
        assert (get(memory, number) == numbers(SIZE // 8, number)).all()
    assert memory.arena.used() <= 2 * SIZE
    assert memory.spill is not None
    assert memory.spill.statistics().restored == 2


def files(memory: HostMemory) -> list[str]:
    assert memory.spill is not None
    return sorted(name for name in os.listdir(memory.spill.directory) if name != "lock")


def test_what_is_in_memory_is_not_on_disk_as_well(memory: HostMemory) -> None:
    assert memory.spill is not None
    for number in range(3):
        put(memory, number)
    assert files(memory) == [OIDS[0].hex()]
    assert (get(memory, 0) == numbers(SIZE // 8, 0)).all()  # 1 goes
    assert files(memory) == [OIDS[1].hex()]
    assert (get(memory, 1) == numbers(SIZE // 8, 1)).all()  # 2 goes
    assert files(memory) == [OIDS[2].hex()]
    assert memory.spill.statistics().spilled == 3


@pytest.mark.parametrize("at", ["spill.written", "spill.renamed"])
def test_what_is_deleted_while_it_is_written_is_deleted(
    memory: HostMemory, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is put under its id after that is never taken for it."""
    put(memory, 0)
    put(memory, 1)
    threads = []

    def point(name: str) -> None:
        if name == at and not threads:
            threads.append(threading.Thread(target=memory.delete, args=(OIDS[0],)))
            threads[0].start()
            threads[0].join(0.5)  # it may have to wait for the one who spills

    monkeypatch.setattr("hoplite_mpi.testing._fault.point", point)
    put(memory, 2)  # 0 goes, to disk or altogether
    threads[0].join(20)
    monkeypatch.undo()
    assert memory.fetch(OIDS[0]) is None
    assert files(memory) in ([], [OIDS[1].hex()])
    other = np.full(SIZE // 8, 7)
    region = memory.with_room(SIZE, lambda: memory.allocate(OIDS[0], Meta.of_array(other)))
    region.array()[...] = other
    assert region.seal()
    del region
    for number in (3, 4):
        put(memory, number)
    assert memory.map(OIDS[0]) is None
    assert (get(memory, 0) == other).all()


@pytest.mark.parametrize("point", ["spill.written", "spill.renamed", "spill.unnamed", "spill.vacated"])
def test_a_mate_has_it_after_a_kill_while_it_is_spilled(
    run: str, child: Callable[..., Any], tmp_path: Path, point: str
) -> None:
    with Arena(run, 1, 0) as arena:
        memory = memory_of(arena, tmp_path)
        put(memory, 0)
        one = child(
            "from hoplite_mpi.testing import fault; fault.enable(sys.argv[3] + '=kill'); arena = Arena(run, 0, 0); "
            "spill = Spill(arena, spill_directory(arena.directory, sys.argv[2])); spill.make_room(1 << 60)",
            str(tmp_path),
            point,
        )
        assert one.wait() == -signal.SIGKILL
        assert (get(memory, 0) == numbers(SIZE // 8)).all()
        assert memory.delete(OIDS[0])
        assert memory.fetch(OIDS[0]) is None
        put(memory, 0)
        assert (get(memory, 0) == numbers(SIZE // 8)).all()
    assert memory.spill is not None
    memory.spill.close()


def test_what_is_in_use_stays(memory: HostMemory) -> None:
    put(memory, 0)
    put(memory, 1)
    views = [get(memory, 0), get(memory, 1)]
    with pytest.raises(StoreFullError):
        put(memory, 2)
    del views[0]
    put(memory, 2)
    assert memory.map(OIDS[0]) is None
    assert (views[0] == numbers(SIZE // 8, 1)).all()


def test_what_another_process_uses_stays(memory: HostMemory, child: Callable[..., Any]) -> None:
    put(memory, 0)
    put(memory, 1)
    other = child(
        "arena = Arena.attach(run, 0, 0); views = [arena.map(ObjectID.from_name(f'object {i}')).array() for i in (0, 1)]; "
        "say(1); hear(); say([int(view[0]) for view in views]); hear()"
    )
    other.hear()
    with pytest.raises(StoreFullError):
        put(memory, 2)
    other.tell()
    assert other.hear() == [0, 1]
    other.kill()
    put(memory, 2)


def test_what_nobody_has_confirmed_stays(memory: HostMemory) -> None:
    array = numbers(SIZE // 8)
    region = memory.allocate(OIDS[0], Meta.of_array(array), 0, bytes(range(16)), True)
    region.array()[...] = array
    region.seal()
    del region
    put(memory, 1)
    put(memory, 2)  # 1 goes
    assert memory.map(OIDS[0]) is not None
    memory.arena.confirm(OIDS[0])
    put(memory, 3)
    put(memory, 4)
    assert memory.map(OIDS[0]) is None
    (info,) = [one for one in memory.objects() if one.oid == OIDS[0]]
    assert (info.digest, info.provisional, info.rank) == (bytes(range(16)), False, 0)
    assert (get(memory, 0) == array).all()


def test_a_copy_that_can_go_is_not_written(memory: HostMemory) -> None:
    assert memory.spill is not None
    asked = []

    def give_up(key: tuple[ObjectID, int]) -> bool:
        asked.append(key)
        return memory.delete(*key)

    memory.spill.give_up = give_up
    for number in range(3):
        put(memory, number)
    assert asked == [(OIDS[0], 0)]
    assert not os.path.exists(memory.spill.directory)
    assert memory.fetch(OIDS[0]) is None


def test_a_deleted_object_is_gone_from_the_disk(memory: HostMemory) -> None:
    for number in range(3):
        put(memory, number, version=7)
    assert memory.spilled(OIDS[0], 7) and not memory.spilled(OIDS[0])
    assert memory.delete(OIDS[0], 7)
    assert not memory.spilled(OIDS[0], 7)
    assert memory.fetch(OIDS[0], 7) is None
    assert not memory.delete(OIDS[0], 7)


def test_damage_is_found(memory: HostMemory) -> None:
    assert memory.spill is not None
    for number in range(3):
        put(memory, number)
    (file,) = [path for path in Path(memory.spill.directory).iterdir() if path.name != "lock"]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert memory.fetch(OIDS[0]) is None
    assert not memory.spilled(OIDS[0])
    put(memory, 0)
    put(memory, 3)
    cut = [oid for oid in OIDS if memory.map(oid) is None and memory.spilled(oid)]
    for path in Path(memory.spill.directory).iterdir():
        os.truncate(path, min(path.stat().st_size, SIZE // 2))
    assert len(cut) == 2
    assert [memory.fetch(oid) for oid in cut] == [None, None]


def test_a_full_disk_says_so_and_loses_nothing(run: str, small_disk: Path) -> None:
    with Arena(run, 0, 0, memory_limit=2 * SIZE) as arena:
        memory = memory_of(arena, small_disk)
        put(memory, 0)
        put(memory, 1)
        with pytest.raises(StoreFullError, match="could not be written"):
            put(memory, 2)
        for number in range(2):
            assert (get(memory, number) == numbers(SIZE // 8, number)).all()
        assert memory.spill is not None
        assert os.listdir(memory.spill.directory) == ["lock"]
    memory.spill.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for less than one object."""
    import subprocess

    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE // 2}", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting a file system needs root")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_mate_spills_for_the_node_and_reads_back_what_another_has_spilled(run: str, tmp_path: Path) -> None:
    with Arena(run, 0, 0) as arena, Arena(run, 1, 0) as other:
        memory, mate = memory_of(arena, tmp_path), memory_of(other, tmp_path)
        assert memory.spill is not None and mate.spill is not None
        put(memory, 0)
        assert mate.spill.make_room(1 << 60)  # as if there was no room on the node
        assert memory.map(OIDS[0]) is None and mate.map(OIDS[0]) is None
        assert (get(memory, 0) == numbers(SIZE // 8)).all()
        assert (get(mate, 0) == numbers(SIZE // 8)).all()
        memory.spill.close()
        assert os.path.exists(memory.spill.directory)
        assert sweep_spilled(str(tmp_path)) == []  # its run lives
    mate.spill.close()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_swept(run: str, child: Callable[..., Any], tmp_path: Path) -> None:
    one = child(
        "arena = Arena(run, 0, 0); spill = Spill(arena, spill_directory(arena.directory, sys.argv[2])); "
        "put(arena, A, np.arange(1 << 17)); say(spill.make_room(1)); hear()",
        str(tmp_path),
    )
    assert one.hear() is True
    assert sweep_spilled(str(tmp_path)) == []
    one.kill()
    shutil.rmtree(arena_directory(run))
    (left,) = tmp_path.iterdir()
    foreign = tmp_path / f"{arena_directory('x').rsplit('/')[-1]}.elsewhere.spill"
    foreign.mkdir()
    assert sweep_spilled(str(tmp_path)) == [left.name]
    assert list(tmp_path.iterdir()) == [foreign], "another host's is not ours to judge"


def test_the_directory_goes_with_the_last_process_although_it_has_views(
    run: str, child: Callable[..., Any], tmp_path: Path
) -> None:
    one = child(
        "arena, mate = Arena(run, 0, 0), Arena(run, 1, 0); spill = Spill(arena, spill_directory(arena.directory, sys.argv[2])); "
        "put(arena, A, np.arange(1 << 17)); view = arena.map(A); put(arena, B, np.arange(1 << 17)); spill.make_room(1); "
        "arena.close(); spill.close(); mate.close(); say(len(os.listdir(sys.argv[2])))",
        str(tmp_path),
    )
    assert one.hear() == 1
    assert one.wait() == 0
    assert list(tmp_path.iterdir()) == []


def test_where_to() -> None:
    assert spill_directory("/dev/shm/hoplite-0-x", None) is None
    assert spill_directory("/dev/shm/hoplite-0-x", "/scratch") is not None
    automatic = spill_directory("/dev/shm/hoplite-0-x", "")
    assert automatic is None or not automatic.startswith("/dev/shm")
    assert sweep_spilled(None) == []


@pytest.mark.parametrize("size", [0, 1, 4096, (4 << 20) + 1])
def test_sizes(run: str, tmp_path: Path, size: int) -> None:
    with Arena(run, 0, 0) as arena:
        memory = memory_of(arena, tmp_path)
        assert memory.spill is not None
        data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
        region = memory.allocate(OIDS[0], Meta.of_bytes(size))
        region.data[:] = data.data
        region.seal()
        del region
        assert memory.spill.make_room(1)
        assert memory.map(OIDS[0]) is None
        pinned = memory.fetch(OIDS[0])
        assert pinned is not None
        assert pinned.meta == Meta.of_bytes(size) and bytes(pinned.buffer) == data.tobytes()
    memory.spill.close()
