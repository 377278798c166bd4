"""Inputs and outputs through the node's shared memory."""

from __future__ import annotations

import io
import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest

from exoflow_hpc.serialize import pack, unpack
from exoflow_hpc.worker import ArenaInput, TaskCrashed, TaskDone, TaskFailed, WorkerPool
from hoplite_mpi import ObjectID
from hoplite_mpi.memory.arena import Arena

cloudpickle.register_pickle_by_value(sys.modules[__name__])

MIB = 1 << 20


@pytest.fixture
def arena() -> Iterator[Arena]:
    with Arena(uuid.uuid4().hex[:16], 0, 0) as made:
        directory = Path(made.directory)
        yield made
    assert not directory.exists()


@pytest.fixture
def pool(arena: Arena) -> Iterator[WorkerPool]:
    address = {"run": Path(arena.directory).name.split("-", 2)[2], "rank": 0, "incarnation": 0}
    with WorkerPool(2, arena=address, on_exit=arena.reap) as made:
        yield made


def put(arena: Arena, value: Any) -> ObjectID:
    plan, oid = pack(value), ObjectID.random()
    region = arena.allocate(oid, plan.meta)
    plan.write_into(region.data)
    assert region.seal()
    return oid


def bytes_sent() -> int:
    """Bytes that this process has written to files and sockets."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["wchar"]) + int(fields["rchar"])


def taking(task: int) -> bytes:
    """Return the pickle of the arguments (output of *task*,)."""

    class Pickler(cloudpickle.Pickler):
        def persistent_id(self, found: Any) -> Any:
            return ("t", task) if found is Ellipsis else None

    file = io.BytesIO()
    Pickler(file).dump(((...,), {}))
    return file.getvalue()


def test_large_arrays_are_not_copied_through_the_socket(arena: Arena, pool: WorkerPool, tools: Any) -> None:
    array = np.arange(64 * MIB // 8, dtype="i8")
    what = tools.request(lambda x: x * 2, args=taking(3), inputs={3: ArenaInput(put(arena, array))})
    before = bytes_sent()
    result = tools.Submitted(pool, what).result()
    assert isinstance(result, TaskDone), result
    assert result.inline is None
    assert result.nbytes == array.nbytes
    assert bytes_sent() - before < MIB
    pinned = arena.map(what.output)
    assert pinned is not None
    assert pinned.meta == result.meta
    assert np.array_equal(unpack(pinned.meta, pinned.buffer), array * 2)


def test_inputs_are_read_only_and_containers_keep_their_buffers(arena: Arena, pool: WorkerPool, tools: Any) -> None:
    oid = put(arena, {"a": np.ones(MIB // 8), "b": [1, 2]})

    def task(found: dict[str, Any]) -> Any:
        return found["a"].flags.writeable, found["a"].flags.owndata, float(found["a"].sum()), found["b"]

    result = tools.call(pool, task, args=taking(0), inputs={0: ArenaInput(oid)})
    assert isinstance(result, TaskDone), result
    assert unpack(result.meta, result.inline) == (False, False, MIB / 8, [1, 2])


def test_lost_input_is_named(arena: Arena, pool: WorkerPool, tools: Any) -> None:
    oid = ObjectID.random()
    result = tools.call(pool, len, args=taking(4), inputs={4: ArenaInput(oid)})
    assert isinstance(result, TaskFailed)
    assert (result.stage, result.lost_inputs) == ("inputs", (4,))
    assert oid.hex() in result.message


def test_output_of_exactly_the_limit_is_inline(pool: WorkerPool, tools: Any) -> None:
    def make(nbytes: int) -> Any:
        return np.zeros(nbytes, "u1")

    at, above = (tools.call(pool, make, nbytes, inline_limit=1000) for nbytes in (1000, 1001))
    assert isinstance(at, TaskDone)
    assert isinstance(above, TaskDone)
    assert at.inline is not None
    assert above.inline is None


def test_full_arena_is_a_failure(arena: Arena, tools: Any) -> None:
    address = {"run": Path(arena.directory).name.split("-", 2)[2], "rank": 0, "incarnation": 0, "memory_limit": MIB}
    with WorkerPool(1, arena=address) as pool:
        what = tools.request(np.zeros, 2 * MIB, "u1")
        result = tools.Submitted(pool, what).result()
        assert isinstance(result, TaskFailed)
        assert result.stage == "output"
        assert result.type_names[0].endswith("StoreFullError")
        assert not arena.exists(what.output)
        assert isinstance(tools.call(pool, np.zeros, MIB // 2, "u1"), TaskDone)


def test_kill_while_the_output_is_written(arena: Arena, pool: WorkerPool, tools: Any) -> None:
    def task() -> Any:
        import exoflow_hpc.serialize as serialize

        plan_type = serialize.Plan

        class DeadlyPlan(plan_type):  # type: ignore[misc,valid-type]
            def write_into(self, target: memoryview) -> None:
                target[: len(target) // 2] = bytes(len(target) // 2)
                os.kill(os.getpid(), 9)

        serialize.Plan = DeadlyPlan  # type: ignore[misc]
        return np.zeros(MIB, "u1")

    what = tools.request(task)
    before = set(os.listdir(arena.directory))
    result = tools.Submitted(pool, what).result()
    assert isinstance(result, TaskCrashed)
    assert not arena.exists(what.output)
    # on_exit has come before the result: what was half-written is gone
    left = {name for name in set(os.listdir(arena.directory)) - before if not name.startswith(("slot", "."))}
    assert not left, left
    assert isinstance(tools.call(pool, int), TaskDone)
