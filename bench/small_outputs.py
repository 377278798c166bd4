"""How many files, and how long, it takes to commit many small outputs that are too large for the journal.

    python bench/small_outputs.py [--tasks 10000] [--nbytes 8192] [--directory .]

Each task returns so many bytes and is committed (``checkpoint="sync"``). Beside it: the same tasks with outputs of 1 KiB, which live in the
journal, and as many files written and fsynced one by one, as a checkpoint at each task's exit would.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import exoflow_hpc as ef
from exoflow_hpc import api
from exoflow_hpc.storage import Storage


@ef.task(checkpoint="sync")
def some(number: int, nbytes: int) -> bytes:
    """Return bytes that no other task returns."""
    return number.to_bytes(8, "little") * (nbytes // 8)


@ef.task
def count(parts: list[bytes]) -> int:
    """Return how many there are."""
    return len(parts)


def run(directory: Path, tasks: int, nbytes: int) -> tuple[float, int]:
    """Return the seconds of the run, by its own clock, and the files of checkpoints."""
    storage = Storage(directory)
    node = count.bind([some.bind(number, nbytes) for number in range(tasks)])
    workflow_id = api.submit(storage, node, None, {})
    result = api.execute(storage, workflow_id, 1, quiet=True)
    assert result["output"] == tasks, result
    return result["seconds"], len(os.listdir(storage.directory(workflow_id) / "checkpoints"))


def one_by_one(directory: Path, tasks: int, nbytes: int) -> float:
    """Return the seconds that it takes to write and fsync a file for each output."""
    began = time.perf_counter()
    for number in range(tasks):
        with open(directory / f"{number}.bin", "wb") as file:
            file.write(bytes(nbytes))
            file.flush()
            os.fsync(file.fileno())
    return time.perf_counter() - began


def main() -> None:
    """Measure, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--nbytes", type=int, default=8192)
    parser.add_argument("--directory", default=".")
    options = parser.parse_args()
    os.environ.setdefault("EXOFLOW_WORKERS", "2")
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="small-outputs-") as name:
        directory = Path(name)
        for nbytes in (1024, options.nbytes):
            seconds, files = run(directory / f"of-{nbytes}", options.tasks, nbytes)
            rate = options.tasks / seconds
            print(f"{options.tasks} outputs of {nbytes} bytes: {seconds:.2f} s, {rate:.0f}/s, {files} files")
        seconds = one_by_one(directory, options.tasks, options.nbytes)
        print(
            f"{options.tasks} files of {options.nbytes} bytes, one by one: {seconds:.2f} s, {options.tasks / seconds:.0f}/s"
        )


if __name__ == "__main__":
    main()
