"""Small tasks in one other system, as `bench/workflow.py --peers` measures them; run in an environment that has it.

    python bench/_peer_tasks.py dask|ray|parsl|dbos|mpi4py.futures --tasks 2000 --links 200

Prints one JSON object: what is measured → [figure, unit]. Two workers each; what is started before the first task, and 100 tasks, are not
measured. mpi4py.futures is to be started by ``mpiexec -n 3 python -m mpi4py.futures``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

WORKERS = 2
#: small tasks that are run first
WARM = 100

Figures = dict[str, tuple[float, str]]


def nothing(_: Any = None) -> None:
    """Do nothing."""


def seconds(call: Callable[[], Any]) -> float:
    """Return how long a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def tasks_and_chain(many: Callable[[int], Any], one: Callable[[], Any], tasks: int, links: int) -> Figures:
    """Measure *many(n)*, which runs n tasks that don't wait for each other, and *one()*, which runs one and waits for it."""
    many(WARM)
    rate = tasks / seconds(lambda: many(tasks))
    return {
        "no-op tasks, nothing durable": (rate, "tasks/s"),
        "one in a chain": (seconds(lambda: [one() for _ in range(links)]) / links * 1e3, "ms"),
    }


def dask(tasks: int, links: int) -> Figures:
    """Measure Dask on a local cluster of processes."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(
            WORKERS, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1"
        ) as cluster,
        Client(cluster) as client,
    ):
        return tasks_and_chain(
            lambda count: client.gather(client.map(nothing, range(count), pure=False)),
            lambda: client.submit(nothing, pure=False).result(),
            tasks,
            links,
        )


def ray(tasks: int, links: int) -> Figures:
    """Measure Ray on this machine."""
    import ray

    ray.init(
        num_cpus=WORKERS, include_dashboard=False, configure_logging=False, _node_ip_address="127.0.0.1"
    )  # loopback only
    task = ray.remote(nothing)
    figures = tasks_and_chain(
        lambda count: ray.get([task.remote() for _ in range(count)]), lambda: ray.get(task.remote()), tasks, links
    )
    ray.shutdown()
    return figures


def parsl(tasks: int, links: int) -> Figures:
    """Measure Parsl with the high-throughput executor; and with a checkpoint at the exit of each task."""
    import parsl
    from parsl.config import Config
    from parsl.dataflow.memoization import BasicMemoizer
    from parsl.executors import HighThroughputExecutor
    from parsl.providers import LocalProvider

    figures: Figures = {}
    for mode in (None, "task_exit"):
        with tempfile.TemporaryDirectory() as directory:
            executor = HighThroughputExecutor(
                address="127.0.0.1",
                loopback_address="127.0.0.1",
                max_workers_per_node=WORKERS,
                cores_per_worker=1,
                provider=LocalProvider(init_blocks=1, max_blocks=1),
            )
            memoizer = BasicMemoizer(checkpoint_mode=mode)
            with parsl.load(Config(executors=[executor], memoizer=memoizer, run_dir=directory)):
                task = parsl.python_app(nothing, cache=mode is not None)
                serial = iter(range(10**9))  # with a cache only what is new is run

                def many(count: int, task: Any = task, serial: Any = serial) -> None:
                    for future in [task(next(serial)) for _ in range(count)]:
                        future.result()

                if mode is None:
                    figures.update(tasks_and_chain(many, lambda many=many: many(1), tasks, links))
                else:
                    many(WARM)
                    rate = tasks / seconds(lambda many=many: many(tasks))
                    figures["no-op tasks, checkpoint at exit, not fsynced"] = (rate, "tasks/s")
            parsl.clear()
    return figures


def dbos(tasks: int, links: int) -> Figures:
    """Measure steps of one DBOS workflow, in this process, on SQLite."""
    from dbos import DBOS

    with tempfile.TemporaryDirectory(dir=".") as directory:
        DBOS(
            config={"name": "bench", "system_database_url": f"sqlite:///{directory}/dbos.sqlite", "log_level": "ERROR"}
        )
        step = DBOS.step()(nothing)

        @DBOS.workflow()
        def steps(count: int) -> None:
            for _ in range(count):
                step()

        DBOS.launch()
        steps(WARM)
        took = seconds(lambda: steps(tasks))
        DBOS.destroy()
    return {"steps, each durable, in one process": (tasks / took, "tasks/s")}


def mpi4py_futures(tasks: int, links: int) -> Figures:
    """Measure MPIPoolExecutor over two more ranks."""
    from mpi4py.futures import MPIPoolExecutor

    with MPIPoolExecutor(WORKERS) as pool:
        return tasks_and_chain(
            lambda count: list(pool.map(nothing, range(count))), lambda: pool.submit(nothing).result(), tasks, links
        )


PEERS: dict[str, Callable[[int, int], Figures]] = {
    "dask": dask,
    "ray": ray,
    "parsl": parsl,
    "dbos": dbos,
    "mpi4py.futures": mpi4py_futures,
}


def main() -> None:
    """Measure one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--tasks", type=int, default=2000)
    parser.add_argument("--links", type=int, default=200)
    options = parser.parse_args()
    figures = PEERS[options.peer](options.tasks, options.links)
    print(json.dumps(figures), flush=True)
    os._exit(0)  # some leave threads behind that would hold it up


if __name__ == "__main__":
    main()
