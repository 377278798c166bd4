"""What tasks put and get in worker processes."""

from __future__ import annotations

import sys
from typing import Any

import cloudpickle
import numpy as np

import exoflow_hpc as ef
from exoflow_hpc.rank.naming import is_of_run, reference_id
from exoflow_hpc.serialize import pack
from exoflow_hpc.worker import ArenaInput, InlineInput, TaskDone, TaskFailed, WorkerPool
from exoflow_hpc.worker.protocol import Given, Put, Reply, TaskRequest
from hoplite_mpi import ObjectID
from hoplite_mpi.memory.arena import Arena
from hoplite_mpi.meta import Meta

from .test_arena import arena, pool, taking  # fixtures

cloudpickle.register_pickle_by_value(sys.modules[__name__])

__all__ = ["arena", "pool"]


def sealed(arena: Arena) -> list[Any]:
    return sorted(info.oid for info in arena.objects() if is_of_run(info.oid, "r"))


def test_put_and_given_to_another(arena: Arena, pool: WorkerPool, tools: Any) -> None:
    def make() -> Any:
        ef.put("nobody is given this")
        inner = ef.put(np.arange(1000))
        outer = ef.put({"inner": inner, "own": int(ef.get(inner)[5])})
        return [outer]

    what = tools.request(make, task_id="make", run="r")
    done = tools.Submitted(pool, what).result()
    assert isinstance(done, TaskDone)
    assert done.refers == (("make", 0, 2),)
    assert [(one.index, one.refers) for one in done.puts] == [(1, ()), (2, (("make", 0, 1),))]
    assert sealed(arena) == sorted(reference_id("r", what.output, index) for index in (1, 2))

    def use(given: Any) -> Any:
        outer = ef.get(given[0])
        array = ef.get(outer["inner"])
        assert not array.flags.writeable
        return outer["own"], int(array.sum()), outer["inner"]

    objects = [
        Given("make", 0, index, ArenaInput(reference_id("r", what.output, index), 0, refers))
        for index, refers in ((2, (1,)), (1, ()))
    ]
    assert done.inline is not None
    result = tools.call(
        pool,
        use,
        args=taking(0),
        inputs={0: InlineInput(done.meta, done.inline, (0,))},
        references=tuple(objects),
        task_id="use",
        run="r",
    )
    assert isinstance(result, TaskDone), result
    assert (result.refers, result.puts) == ((("make", 0, 1),), ())


def test_a_task_that_fails_leaves_nothing(arena: Arena, pool: WorkerPool, tools: Any) -> None:
    def fail() -> None:
        ef.put(1)
        ef.put(np.zeros(10**5))
        raise ValueError("no")

    assert isinstance(tools.call(pool, fail, run="r"), TaskFailed)
    assert sealed(arena) == []


def test_what_another_attempt_has_put_is_nobodys(arena: Arena, pool: WorkerPool, tools: Any) -> None:
    def keep() -> None:
        sys.modules["kept_by_a_test"] = ef.put(1)  # type: ignore[assignment]

    def use(how: str) -> Any:
        import os

        kept: Any = sys.modules.get("kept_by_a_test")
        if kept is None:
            return os.getpid()
        return ef.get(kept) if how == "get" else [kept]

    with WorkerPool(1, arena={"run": arena.directory.split("-", 2)[2], "rank": 0, "incarnation": 0}) as one:
        assert isinstance(tools.call(one, keep, run="r"), TaskDone)
        for how, text in (("get", "an attempt of a task that is over"), ("return", "belongs to another task")):
            failed = tools.call(one, use, how, run="r")
            assert isinstance(failed, TaskFailed)
            assert text in failed.message


def test_threads_put_and_forks_do_not(arena: Arena, pool: WorkerPool, tools: Any) -> None:
    def make() -> Any:
        import os
        from concurrent.futures import ThreadPoolExecutor

        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                ef.put(1)
                os.write(writer, b"it was put")
            except ef.ExoFlowError as error:
                os.write(writer, str(error).encode())
            os._exit(0)
        os.waitpid(child, 0)
        text = os.read(reader, 1000).decode()
        with ThreadPoolExecutor(4) as threads:
            return text, list(threads.map(ef.put, range(20)))

    result = tools.call(pool, make, run="r", task_id="t")
    assert isinstance(result, TaskDone), result
    assert sorted(result.refers) == [("t", 0, index) for index in range(20)]
    assert len(sealed(arena)) == 20


def test_full_arena(arena: Arena, tools: Any) -> None:
    address = {"run": arena.directory.split("-", 2)[2], "rank": 0, "incarnation": 0, "memory_limit": 1 << 20}
    with WorkerPool(1, arena=address) as pool:
        result = tools.call(pool, lambda: ef.put(np.zeros(2 << 20, "u1")), run="r")
        assert isinstance(result, TaskFailed)
        assert result.type_names[0].endswith("StoreFullError")
    assert sealed(arena) == []


def test_round_trips(tools: Any) -> None:
    plan = pack("x")
    given = Given("t", 1, 2, InlineInput(plan.meta, plan.to_bytes(), (0,)))
    what = tools.request(len, references=(given,), run="r", inputs={0: ArenaInput(ObjectID.from_name("x"), 1, (0,))})
    assert TaskRequest.from_wire(what.to_wire()) == what
    keys = (("t", 1, 2), ("u", 0, 0))
    done = TaskDone(plan.meta, 1, b"x", 0.5, keys, (Put(2, Meta.of_bytes(4), keys[1:]), Put(3, Meta.of_bytes(0))))
    assert Reply.from_wire(Reply(1, done, True).to_wire()) == Reply(1, done, True)
