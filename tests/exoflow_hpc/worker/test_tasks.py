"""What tasks see and what comes of them, in real worker processes that all live on."""

from __future__ import annotations

import dataclasses
import io
import os
import random
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest

from exoflow_hpc.serialize import pack, unpack
from exoflow_hpc.worker import InlineInput, TaskDone, TaskFailed, WorkerPool

# functions of the tests go to the workers by value, as those of a workflow file do
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def value(result: Any) -> Any:
    assert isinstance(result, TaskDone), result
    assert result.inline is not None
    return unpack(result.meta, result.inline)


def failure(result: Any) -> TaskFailed:
    assert isinstance(result, TaskFailed), result
    return result


def test_many_tasks_any_order(pool: WorkerPool, tools: Any) -> None:
    submitted = [tools.Submitted(pool, tools.request(lambda x: (x, os.getpid()), number)) for number in range(200)]
    random.shuffle(submitted)
    values = sorted(value(one.result()) for one in submitted)
    assert [number for number, _ in values] == list(range(200))
    assert {pid for _, pid in values} <= set(pool.statistics().pids)


def test_each_task_gets_one_result(pool: WorkerPool, tools: Any) -> None:
    submitted = [tools.Submitted(pool, tools.request(int)) for _ in range(20)]
    for one in submitted:
        one.result()
    value(tools.call(pool, int))
    assert all(one.results.empty() for one in submitted)


class Hole:
    def __init__(self, kind: str, key: Any) -> None:
        self.reference = (kind, key)


class _Pickler(cloudpickle.Pickler):
    def persistent_id(self, found: Any) -> Any:
        return found.reference if isinstance(found, Hole) else None


def arguments(*args: Any, **kwargs: Any) -> bytes:
    file = io.BytesIO()
    _Pickler(file, protocol=5).dump((args, kwargs))
    return file.getvalue()


def test_placeholders(pool: WorkerPool, tools: Any) -> None:
    plan = pack(np.arange(5))
    result = tools.call(
        pool,
        lambda a, b, *, c: (a["deep"].tolist(), b, c, a["deep"].flags.writeable),
        args=arguments({"deep": Hole("t", 3)}, Hole("b", "constant"), c=4),
        inputs={3: InlineInput(plan.meta, plan.to_bytes())},
        blobs={"constant": cloudpickle.dumps([1, 2])},
    )
    assert value(result) == ([0, 1, 2, 3, 4], [1, 2], 4, False)


def test_constants_do_not_leak_between_tasks(pool: WorkerPool, tools: Any) -> None:
    changes = {"args": arguments(Hole("b", "list")), "blobs": {"list": cloudpickle.dumps([])}}
    for _ in range(6):
        assert value(tools.call(pool, lambda found: found.append(1) or len(found), **changes)) == 1


def test_functions_are_loaded_once_per_worker(pool: WorkerPool, tools: Any) -> None:
    calls: list[int] = []

    def count() -> tuple[int, int]:
        calls.append(1)
        return os.getpid(), len(calls)

    what = tools.request(count)
    last: dict[int, int] = {}
    for _ in range(10):
        pid, seen = value(tools.Submitted(pool, what).result())
        assert seen == last.get(pid, 0) + 1
        last[pid] = seen


def test_missing_placeholder_is_a_load_failure(pool: WorkerPool, tools: Any) -> None:
    failed = failure(tools.call(pool, int, args=arguments(Hole("t", 5))))
    assert failed.stage == "load"
    assert "5" in failed.message


def test_function_that_cannot_be_loaded(pool: WorkerPool, tools: Any) -> None:
    what = dataclasses.replace(tools.request(int), function="bad", blobs={"bad": b"garbage"})
    failed = failure(tools.Submitted(pool, what).result())
    assert failed.stage == "load"
    assert "load_function" not in failed.traceback


def _raise_deep() -> None:
    def inner() -> None:
        raise KeyError("the user's own")

    try:
        inner()
    except KeyError as error:
        raise ValueError("outer") from error


def test_traceback_is_the_users(pool: WorkerPool, tools: Any) -> None:
    failed = failure(tools.call(pool, _raise_deep))
    assert failed.stage == "call"
    assert failed.type_names[0] == "builtins.ValueError"
    assert failed.message == "outer"
    first_line = _raise_deep.__code__.co_firstlineno
    assert f'"{__file__}", line {first_line + 2}, in inner' in failed.traceback
    assert f'"{__file__}", line {first_line + 7}, in _raise_deep' in failed.traceback
    assert "direct cause" in failed.traceback
    assert "/exoflow_hpc/worker/execute" not in failed.traceback
    assert failed.traceback.count('File "') == failed.traceback.count(f'File "{__file__}"') == 3
    assert isinstance(failed.load_exception(), ValueError)


class Unpicklable(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.frame = sys._getframe()


class Unloadable(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__("takes two, gives one")


@pytest.mark.parametrize("error", [Unpicklable("text"), Unloadable(1, 2)], ids=["unpicklable", "unloadable"])
def test_exception_that_does_not_travel(pool: WorkerPool, tools: Any, error: Exception) -> None:
    kind, text = type(error), str(error)

    def fail() -> None:
        raise kind(text) if kind is Unpicklable else kind(1, 2)

    failed = failure(tools.call(pool, fail))
    assert failed.pickled is None
    assert failed.message == text
    assert failed.type_names[0].endswith(kind.__name__)
    assert kind.__name__ in failed.traceback


def _stop(kind: type[BaseException]) -> None:
    raise kind(7)


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError])
def test_exits_are_failures(pool: WorkerPool, tools: Any, kind: type[BaseException]) -> None:
    failed = failure(tools.call(pool, _stop, kind))
    assert failed.type_names[0] == f"builtins.{kind.__name__}"
    assert pool.statistics().crashed == 0


class Flaky(Exception):
    pass


class Flakier(Flaky):
    pass


@pytest.mark.parametrize(("kind", "retryable"), [(Flakier, True), (Flaky, True), (ValueError, False)])
def test_retryable_is_found_in_the_worker(
    pool: WorkerPool, tools: Any, kind: type[BaseException], retryable: bool
) -> None:
    failed = failure(tools.call(pool, _stop, kind, retry="r", blobs={"r": cloudpickle.dumps((Flaky, OSError))}))
    assert failed.retryable is retryable


def test_output_that_cannot_be_pickled(pool: WorkerPool, tools: Any) -> None:
    failed = failure(tools.call(pool, lambda: {"a": [1, sys._getframe()]}))
    assert failed.stage == "output"
    assert "frame" in failed.message


def test_arena_input_without_an_arena(pool: WorkerPool, tools: Any) -> None:
    from exoflow_hpc.worker import ArenaInput
    from hoplite_mpi import ObjectID

    failed = failure(tools.call(pool, int, inputs={0: ArenaInput(ObjectID.random())}))
    assert failed.stage == "inputs"


def test_large_frames_both_ways(pool: WorkerPool, tools: Any) -> None:
    array = np.arange(3_000_000, dtype="f8")  # 24 MB each way, while the other worker does the same
    submitted = [tools.Submitted(pool, tools.request(lambda x: x + 1, array)) for _ in range(4)]
    for one in submitted:
        assert np.array_equal(value(one.result()), array + 1)


def test_request_that_msgpack_refuses(pool: WorkerPool, tools: Any) -> None:
    failed = failure(tools.call(pool, int, retry=object()))
    assert failed.stage == "load"
    assert value(tools.call(pool, int)) == 0


def test_context_and_progress(pool: WorkerPool, tools: Any) -> None:
    def task() -> tuple[str, str, int]:
        from exoflow_hpc.context import context

        context().progress(0.25, "a quarter")
        context().progress(1.0, "all")
        return context().workflow_id, context().task_id, context().attempt

    one = tools.Submitted(pool, tools.request(task, task_id="mine"))
    assert value(one.result()) == ("workflow", "mine", 0)
    assert [one.reported(), one.reported()] == ["a quarter", "all"]


def test_context_is_gone_after_the_task(pool: WorkerPool, tools: Any) -> None:
    def late() -> Any:
        from exoflow_hpc.context import context

        return context

    get = value(tools.call(pool, late))
    with pytest.raises(Exception, match="inside a running task"):
        get()


def test_sys_path(pool: WorkerPool, tools: Any, tmp_path: Path) -> None:
    (tmp_path / "helper_of_the_worker_test.py").write_text("ANSWER = 42\n")

    def task() -> int:
        import importlib

        return importlib.import_module("helper_of_the_worker_test").ANSWER

    assert value(tools.call(pool, task, sys_path=(str(tmp_path),))) == 42


def test_worker_is_clean(pool: WorkerPool, tools: Any) -> None:
    def task() -> Any:
        import signal
        import stat
        import threading

        links = {}
        for name in os.listdir("/proc/self/fd"):
            try:
                mode = os.fstat(int(name)).st_mode
            except OSError:
                continue  # that of the listing
            links[int(name)] = stat.S_ISSOCK(mode)
        return {
            "mpi": "mpi4py.MPI" in sys.modules,
            "sockets": sum(is_socket for number, is_socket in links.items() if number > 2),
            "descriptors": len([number for number in links if number > 2]),
            "threads": threading.active_count(),
            "blocked": signal.pthread_sigmask(signal.SIG_BLOCK, []),
            "chld": signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL,
            "stdin": os.readlink("/proc/self/fd/0"),
            "group": os.getpgid(0) == os.getpid(),
        }

    assert value(tools.call(pool, task)) == {
        "mpi": False,
        "sockets": 2,  # its connection and its letter box
        "descriptors": 2,
        "threads": 1,
        "blocked": set(),
        "chld": True,
        "stdin": "/dev/null",
        "group": True,
    }


def test_forkserver_has_one_thread_and_no_mpi(pool: WorkerPool, tools: Any) -> None:
    value(tools.call(pool, int))
    pid = pool.statistics().forkserver_pid
    assert len(os.listdir(f"/proc/{pid}/task")) == 1
    assert "libmpi" not in Path(f"/proc/{pid}/maps").read_text()


def test_workers_draw_different_numbers(tools: Any) -> None:
    def draw() -> tuple[float, float]:
        return random.random(), float(np.random.random())

    with WorkerPool(1) as one, WorkerPool(1) as other:
        first, second = value(tools.call(one, draw)), value(tools.call(other, draw))
        one_pid = one.statistics().pids[0]
        tools.Submitted(one, tools.request(os.kill, one_pid, 9)).result()
        third = value(tools.call(one, draw))  # a second fork of the same forkserver
    assert len({*first, *second, *third}) == 6


def test_child_that_a_task_forks_does_not_answer(pool: WorkerPool, tools: Any) -> None:
    def fork() -> str:
        pid = os.fork()
        if pid == 0:
            return "child"
        assert os.waitpid(pid, 0)[1] == 0
        return "parent"

    assert value(tools.call(pool, fork)) == "parent"
    assert value(tools.call(pool, int)) == 0


def test_output_of_a_task_whose_failures_are_caught(pool: WorkerPool, tools: Any) -> None:
    array, error = value(tools.call(pool, np.arange, 10, catch=True))
    assert error is None
    np.testing.assert_array_equal(array, np.arange(10))
    assert failure(tools.call(pool, int, "x", catch=True)).type_names[0] == "builtins.ValueError"


def test_late_progress_of_a_thread_is_dropped(tools: Any) -> None:
    def leave_thread() -> None:
        import threading

        from exoflow_hpc.context import context

        mine = context()
        release = threading.Event()
        sys.release = release  # type: ignore[attr-defined]

        def late() -> None:
            release.wait()
            mine.progress(1.0, "late")

        sys.late = threading.Thread(target=late)  # type: ignore[attr-defined]
        sys.late.start()  # type: ignore[attr-defined]

    def free_it() -> None:
        sys.release.set()  # type: ignore[attr-defined]
        sys.late.join()  # type: ignore[attr-defined]

    with WorkerPool(1) as pool:
        value(tools.call(pool, leave_thread))
        second = tools.Submitted(pool, tools.request(free_it))
        value(second.result())
        assert second.progress.empty()
