"""What a workflow costs beside its tasks: tasks per second, latency in a chain, submit and resume, recovery after the loss of a rank.

    python bench/workflow.py [--rounds 3] [--directory .] [--peers PYTHON]

Rows are measured in turn in each round, beside `concurrent.futures.ProcessPoolExecutor` with as many workers and, with `--peers`,
beside other systems that are installed for that interpreter (`make bench-peers` makes one; see `_peer_tasks.py`), and the best of
the rounds is shown with all of them: on a machine that does other things as well, the rest measures those. "From first to last" is
from the start of the first task to that of one that waits for all others, by the clock of the tasks; "in all" is what the
caller sees, with the start of the rank and its workers; "without the start of the rank" is what the run itself says.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import exoflow_hpc as ef
from exoflow_hpc import api, records
from exoflow_hpc.compile import compile_workflow
from exoflow_hpc.journal import Journal
from exoflow_hpc.storage import Storage
from hoplite_mpi.launch import find_mpiexec

WORKERS = 2


@ef.task
def nothing(*_: Any) -> None:
    """Do nothing."""


@ef.task
def wait(seconds: float) -> None:
    """Do nothing for a while."""
    time.sleep(seconds)


@ef.task(checkpoint="skip")
def note(directory: str, seconds: float) -> None:
    """Note when this began, and on which rank: the parent of the worker's forkserver. Then sleep."""
    rank = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[1]
    Path(directory, f"{time.time()}-{rank}").touch()
    time.sleep(seconds)


@ef.task
def now() -> float:
    """Return the time."""
    return time.time()


@ef.task
def same(value: float) -> float:
    """Return what it was given."""
    return value


@ef.task
def since(began: float) -> float:
    """Return the seconds since then."""
    return time.time() - began


def fan_out(count: int, checkpoint: str) -> Any:
    """Return the seconds from the first to the last of *count* tasks that don't wait for each other."""
    each = nothing.options(checkpoint=checkpoint)
    began = now.options(checkpoint=checkpoint).bind()
    return since.bind(began).after(*(each.bind().after(began) for _ in range(count)))


def chain(count: int, checkpoint: str) -> Any:
    """Return the seconds from the first to the last of *count* tasks, each of which takes what the one before gives."""
    each = same.options(checkpoint=checkpoint)
    node = now.options(checkpoint=checkpoint).bind()
    for _ in range(count - 1):
        node = each.bind(node)
    return since.bind(node)


class Table:
    """Figures of all rounds, by row."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], list[float]] = {}

    def add(self, row: str, unit: str, value: float) -> None:
        """Take a figure and show it."""
        self.rows.setdefault((row, unit), []).append(value)
        print(f"  {row}: {_text(value)} {unit}", file=sys.stderr, flush=True)

    def show(self) -> None:
        """Print the best of each row, the median, and all."""
        for (row, unit), values in self.rows.items():
            best = max(values) if unit.endswith("/s") else min(values)
            rest = ", ".join(map(_text, values))
            print(f"{row:<66} {_text(best):>9} {unit:<8} median {_text(statistics.median(values))} of {rest}")


def _text(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3f}"


def executor(table: Table, tasks: int, links: int) -> None:
    """Measure ProcessPoolExecutor."""
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("forkserver")) as pool:
        for future in [pool.submit(_nothing) for _ in range(100)]:
            future.result()
        began = time.perf_counter()
        for future in [pool.submit(_nothing) for _ in range(tasks)]:
            future.result()
        table.add("no-op tasks, nothing durable: ProcessPoolExecutor", "tasks/s", tasks / (time.perf_counter() - began))
        began = time.perf_counter()
        for _ in range(links):
            pool.submit(_nothing).result()
        table.add("one in a chain: ProcessPoolExecutor", "ms", (time.perf_counter() - began) / links * 1e3)


def _nothing() -> None:
    """Do nothing."""


def peers(table: Table, python: str, tasks: int, links: int) -> None:
    """Measure other systems, and MPIPoolExecutor in our own environment; fewer tasks, since they take longer."""
    script, sizes = str(Path(__file__).parent / "_peer_tasks.py"), ["--tasks", str(tasks), "--links", str(links)]
    commands = {name: [python, script, name, *sizes] for name in ("dask", "ray", "parsl", "dbos")}
    own = [find_mpiexec(), "-n", "3", sys.executable, "-m", "mpi4py.futures", script]
    commands["mpi4py.futures"] = [*own, "mpi4py.futures", *sizes]
    path = f"{Path(python).parent.absolute()}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "RAY_AUTH_MODE": "disabled", "DO_NOT_TRACK": "1"}
    for name, command in commands.items():
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
        found = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if not found:
            print(f"  {name}: {(done.stderr.strip() or 'nothing').splitlines()[-1]}", file=sys.stderr, flush=True)
            continue
        for row, (value, unit) in json.loads(found[-1]).items():
            table.add(f"{row}: {name}", unit, value)


def throughput(table: Table, place: Storage, tasks: int, links: int) -> None:
    """Measure no-op tasks on one rank."""
    for name, node, count in (
        ("no-op tasks, nothing durable", fan_out(tasks, "skip"), tasks),
        ("one in a chain", chain(links, "skip"), links),
        ("no-op tasks, each committed and fsynced", fan_out(tasks, "sync"), tasks),
        ("one in a chain, committed before the next one starts", chain(links, "sync"), links),
    ):
        began = time.perf_counter()
        workflow_id = api.submit(place, node, None, None)
        summary = api.execute(place, workflow_id, 1, quiet=True)
        seconds = time.perf_counter() - began
        if summary["status"] != "SUCCESSFUL" or summary["tasks"]["run"] < count:
            raise RuntimeError(f"{name}: {summary}")
        if "chain" in name:
            table.add(name, "ms", summary["output"] / count * 1e3)
        else:
            table.add(f"{name}, from first to last", "tasks/s", count / summary["output"])
            table.add(f"{name}, in all", "tasks/s", count / seconds)


def large(table: Table, place: Storage, tasks: int) -> None:
    """Measure submit of a large DAG, and resume when all of it is committed, with the end of the run noted and without."""
    node = fan_out(tasks - 2, "sync")
    began = time.perf_counter()
    spec = compile_workflow(node)
    compiled = time.perf_counter()
    place.create("large", spec.to_bytes())
    ended = time.perf_counter()
    table.add(f"submit of {tasks} tasks", "s", ended - began)
    table.add("  of that: compile", "s", compiled - began)
    api.execute(place, "large", 1, quiet=True)
    began = time.perf_counter()
    api.resume("large", storage=place.path)
    table.add(f"resume of {tasks} tasks that has succeeded", "s", time.perf_counter() - began)
    _forget_the_end(place.directory("large"))
    began = time.perf_counter()
    summary = api.execute(place, "large", 1, quiet=True)
    table.add(f"resume of {tasks} committed tasks, without the start of the rank", "s", summary["seconds"])
    table.add(f"resume of {tasks} committed tasks, in all", "s", time.perf_counter() - began)
    if summary["tasks"]["run"]:
        raise RuntimeError(f"tasks ran again: {summary}")
    place.delete("large")


def _forget_the_end(directory: Path) -> None:
    """Have the journal say that a run began after the last one, and was interrupted."""
    journal, _ = Journal.open(directory)
    with journal:
        journal.append(records.encode(records.WorkflowStarted("bench", 0, 0.0))).result()


def recovery(table: Table, place: Storage) -> None:
    """Measure from SIGKILL of a rank until the task that it ran starts elsewhere; the detection is part of it."""
    directory = Path(tempfile.mkdtemp(prefix="notes-", dir=place.path.parent))
    everyone_is_there = wait.bind(5.0)
    nodes = [note.options(name=f"t{number}").bind(str(directory), 5.0).after(everyone_is_there) for number in range(2)]
    thread = threading.Thread(target=lambda: ef.run(nothing.bind().after(*nodes), ranks=2, storage=place.path))
    thread.start()
    while len(notes := set(directory.iterdir())) < 2:
        time.sleep(0.001)
    victim = next(pid for pid in (int(path.name.split("-")[1]) for path in notes) if not _is_head(pid))
    killed = time.time()
    os.kill(victim, signal.SIGKILL)
    while len(again := set(directory.iterdir()) - notes) < 1:
        time.sleep(0.001)
    began = float(again.pop().name.split("-")[0])
    table.add("from kill -9 of a rank to the start of its task elsewhere", "s", began - killed)
    thread.join()


def _is_head(rank: int) -> bool:
    return b"HOPLITE_RANK=0" in Path(f"/proc/{rank}/environ").read_bytes().split(b"\0")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", default=".", help="on the file system to be measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--chain", type=int, default=1000)
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter that has distributed, ray, parsl and dbos")
    parser.add_argument("--only", choices=["throughput", "large", "recovery"])
    options = parser.parse_args()
    os.environ["EXOFLOW_WORKERS"] = str(WORKERS)
    directory = Path(tempfile.mkdtemp(prefix="bench-workflow-", dir=options.directory))
    table, began = Table(), time.time()
    try:
        place = Storage(directory / "storage")
        for _ in range(options.rounds):
            if options.only in (None, "throughput"):
                executor(table, options.tasks, options.chain)
                if options.peers:
                    peers(table, options.peers, options.tasks // 5, options.chain // 5)
                throughput(table, place, options.tasks, options.chain)
            if options.only in (None, "large"):
                large(table, place, options.tasks)
            if options.only in (None, "recovery"):
                recovery(table, place)
    finally:
        shutil.rmtree(directory)
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    date = time.strftime("%Y-%m-%d %H:%M", time.gmtime(began))
    machine = f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, CPython {platform.python_version()}"
    print(f"{machine}, {WORKERS} workers, one rank; {date} UTC; load average at the end {load}")
    table.show()


if __name__ == "__main__":
    main()
