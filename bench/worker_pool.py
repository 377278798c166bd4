"""Cost of a no-op task in the worker pool: latency one at a time, tasks per second with all workers busy, start, idle.

    python bench/worker_pool.py [--workers 2] [--tasks 5000]

Beside it: `concurrent.futures.ProcessPoolExecutor` with a no-op in the same processes' number.
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import cloudpickle

from exoflow_hpc.worker import TaskDone, TaskIdentity, TaskRequest, TaskResult, WorkerPool
from hoplite_mpi import ObjectID


def _nothing() -> None:
    """Do nothing."""


def _request() -> TaskRequest:
    blob = cloudpickle.dumps(lambda: None)
    arguments = cloudpickle.dumps(((), {}))
    return TaskRequest(TaskIdentity("bench", "nothing"), "f", arguments, {"f": blob}, {}, ObjectID.random())


def _one(pool: WorkerPool, request: TaskRequest) -> float:
    """Run one task and return its seconds, from `submit` to this thread knowing the result."""
    done = threading.Event()
    results: list[TaskResult] = []

    def keep(result: TaskResult) -> None:
        results.append(result)
        done.set()

    begin = time.perf_counter()
    pool.submit(request, keep)
    done.wait()
    seconds = time.perf_counter() - begin
    if not isinstance(results[0], TaskDone):
        raise RuntimeError(f"the no-op task did not return: {results[0]}")
    return seconds


def _many(pool: WorkerPool, request: TaskRequest, count: int) -> float:
    """Submit *count* tasks at once and return the seconds until the last result."""
    done = threading.Event()
    left = [count]

    def count_down(_result: TaskResult) -> None:
        left[0] -= 1
        if not left[0]:
            done.set()

    begin = time.perf_counter()
    for _ in range(count):
        pool.submit(request, count_down)
    done.wait()
    return time.perf_counter() - begin


def _ours(workers: int, tasks: int) -> None:
    begin = time.perf_counter()
    request = _request()
    with WorkerPool(workers) as pool:
        _one(pool, request)
        print(f"first result after             {time.perf_counter() - begin:8.3f} s (forkserver and fork included)")
        latencies = sorted(_one(pool, request) for _ in range(tasks))
        print(f"latency, median                {statistics.median(latencies) * 1e3:8.3f} ms")
        print(f"latency, 99th percentile       {latencies[int(0.99 * tasks)] * 1e3:8.3f} ms")
        print(f"tasks per second               {tasks / _many(pool, request, tasks):8.0f}")
        used = os.times()
        time.sleep(2.0)
        idle = os.times()
        print(f"CPU of the idle rank           {(idle.user + idle.system - used.user - used.system) / 2.0:8.2%}")
        begin = time.perf_counter()
    print(f"close                          {time.perf_counter() - begin:8.3f} s")


def _executor(workers: int, tasks: int) -> None:
    with ProcessPoolExecutor(workers, mp_context=get_context("forkserver")) as executor:
        executor.submit(_nothing).result()
        latencies = []
        for _ in range(tasks):
            begin = time.perf_counter()
            executor.submit(_nothing).result()
            latencies.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        for future in [executor.submit(_nothing) for _ in range(tasks)]:
            future.result()
        rate = tasks / (time.perf_counter() - begin)
    print(f"ProcessPoolExecutor            {statistics.median(latencies) * 1e3:8.3f} ms, {rate:.0f} tasks per second")


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tasks", type=int, default=5000)
    arguments = parser.parse_args()
    _ours(arguments.workers, arguments.tasks)
    _executor(arguments.workers, arguments.tasks)


if __name__ == "__main__":
    main()
