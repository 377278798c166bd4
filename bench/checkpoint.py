"""Checkpoints beside what the disk and other tools do with the same bytes, and what incremental ones write.

    python bench/checkpoint.py [DIRECTORY] [--mib 1024] [--repeat 5]

DIRECTORY is on the file system to be measured. All ways take turns in one run; medians, and ratios to the raw rate of the same run.
"""

from __future__ import annotations

import argparse
import mmap
import os
import platform
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from exoflow_hpc import checkpoint, serialize
from exoflow_hpc.checkpoint import FileSource, WriterClient, WriteRequest, Written
from exoflow_hpc.errors import ExoFlowError

__all__ = ["main"]

_CHUNK = 64 << 20


def raw(path: Path, data: memoryview, flags: int = 0) -> None:
    """Write to a new file and fsync."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | flags)
    try:
        step = _CHUNK if flags else 1 << 30
        for start in range(0, len(data), step):
            assert os.pwrite(fd, data[start : start + step], start) == len(data[start : start + step])
        os.fsync(fd)
    finally:
        os.close(fd)


def with_h5py(path: Path, array: np.ndarray[Any, Any]) -> None:
    """Write one dataset with h5py and fsync."""
    with h5py.File(path, "x") as file:
        file["x"] = array
    sync(path)


def with_numpy(path: Path, array: np.ndarray[Any, Any]) -> None:
    """Write with np.save and fsync."""
    with path.open("xb") as file:
        np.save(file, array)
    sync(path)


def sync(path: Path) -> None:
    """Make a file durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def through_writer(client: WriterClient, requests: list[WriteRequest]) -> tuple[float, float, list[Written]]:
    """Return the seconds that the caller was held up, those until all are durable, and where they are."""
    written: list[Written] = []
    done = threading.Event()

    def answer(_: WriteRequest, outcome: Written | ExoFlowError) -> None:
        if isinstance(outcome, ExoFlowError):
            raise outcome
        written.append(outcome)
        if len(written) == len(requests):
            done.set()

    start = time.perf_counter()
    client.submit(requests, answer)
    blocked = time.perf_counter() - start
    if not done.wait(600):
        raise TimeoutError("the writer didn't finish within 600 s")
    return blocked, time.perf_counter() - start, written


def writer(direct: int) -> WriterClient:
    """Start a writer process whose arrays of at least *direct* bytes go by direct I/O; 0: none."""
    os.environ["EXOFLOW_DIRECT_IO"] = str(direct)
    return WriterClient(0, 0 if direct else 1)


class Bench:
    """One directory on disk, and sources in shared memory as the store has them."""

    def __init__(self, directory: Path, mib: int, repeat: int) -> None:
        self.directory = directory
        self.mib = mib
        self.repeat = repeat
        self.checkpoints = directory / "checkpoints"
        self.checkpoints.mkdir()
        self.source = Path(tempfile.mkstemp(prefix="bench-checkpoint-", dir="/dev/shm")[1])
        os.truncate(self.source, (mib << 20) + 4096)
        with self.source.open("r+b") as file:
            self.memory = mmap.mmap(file.fileno(), 0)
        self.array = np.frombuffer(self.memory, np.float64, mib << 17)
        self.array[:] = np.random.default_rng(0).random(len(self.array))
        self.epoch = 0

    def request(self, value: np.ndarray[Any, Any], offset: int = 0) -> WriteRequest:
        """Return the request to save *value*, which lies at *offset* of the source."""
        self.epoch += 1  # nothing is linked to what an earlier turn has written
        meta = serialize.pack(value).meta
        return WriteRequest(
            str(self.directory), self.epoch, "x", "x", meta, FileSource(str(self.source), offset, value.nbytes)
        )

    def large(self) -> None:
        """One array, every way, in turns."""
        view = memoryview(self.array).cast("B")
        path = self.directory / "one"
        shifted = np.frombuffer(self.memory, np.float64, len(self.array), 64)
        buffered, direct = writer(0), writer(1 << 20)
        buffered.start()
        direct.start()
        blocked: list[float] = []
        files: list[Written] = []

        def ours(client: WriterClient, value: np.ndarray[Any, Any], offset: int) -> None:
            files.clear()
            waited, seconds, written = through_writer(client, [self.request(value, offset)])
            files.extend(written)
            blocked.append(waited / seconds)

        ways: dict[str, Callable[[], None]] = {
            "raw write + fsync": lambda: raw(path, view),
            "raw O_DIRECT + fsync": lambda: raw(path, view, os.O_DIRECT),
            "h5py + fsync": lambda: with_h5py(path, self.array),
            "np.save + fsync": lambda: with_numpy(path, self.array),
            "checkpoint": lambda: ours(buffered, self.array, 0),
            "checkpoint, direct I/O": lambda: ours(direct, self.array, 0),
            "checkpoint, buffer of a container": lambda: ours(direct, shifted, 64),
            "its checksum alone": lambda: print("", end=serialize.checksum(serialize.pack(self.array).meta, view)[:0]),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        reads: list[float] = []
        for turn in range(self.repeat + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                seconds = time.perf_counter() - start
                if turn:  # the first one loads and touches everything
                    rates[name].append(self.mib / seconds)
                if files:
                    start = time.perf_counter()
                    checkpoint.read(self.directory, files[0].file, files[0].entry, files[0].checksum)
                    reads.append(self.mib / (time.perf_counter() - start))
                    files.clear()
                for left in (path, *self.checkpoints.iterdir()):
                    left.unlink(missing_ok=True)
                os.sync()
        buffered.close()
        direct.close()
        raw_rate, direct_rate = (statistics.median(rates[name]) for name in list(rates)[:2])
        print(f"{f'one array of {self.mib} MiB':<44}{'MiB/s':>8}{'of raw':>8}{'of raw direct':>15}   all")
        for name, found in rates.items():
            rate = statistics.median(found)
            every = " ".join(f"{one:.0f}" for one in sorted(found))
            print(f"{name:<44}{rate:>8.0f}{rate / raw_rate:>8.2f}{rate / direct_rate:>15.2f}   {every}")
        print(f"{'checked read':<44}{statistics.median(reads):>8.0f}")
        median, worst = 100 * statistics.median(blocked), 100 * max(blocked)
        print(f"async: the caller is held up for {median:.2f} % of the time that it takes, at most {worst:.2f} %")

    def incremental(self, steps: int = 10, arrays: int = 20, changed: int = 2) -> None:
        """A loop that saves a state, a tenth of which changes from step to step."""
        size = (self.mib << 17) // 4 // arrays
        state = {f"p{n}": np.random.default_rng(n).random(size) for n in range(arrays)}
        total = sum(each.nbytes for each in state.values())
        seconds, nbytes = [], []
        with writer(64 << 20) as client:
            self.epoch += 1
            for step in range(steps):
                for each in range(changed):
                    state[f"p{(step * changed + each) % arrays}"] += 1.0
                plan = serialize.pack(state)
                plan.write_into(memoryview(self.memory)[: plan.nbytes])
                source = FileSource(str(self.source), 0, plan.nbytes)
                request = WriteRequest(str(self.directory), self.epoch, f"s{step}", "state", plan.meta, source)
                _, taken, (written,) = through_writer(client, [request])
                seconds.append(taken)
                nbytes.append((self.checkpoints / written.file).stat().st_size)
        mib = [one / (1 << 20) for one in nbytes]
        print(
            f"state of {total / (1 << 20):.0f} MiB, {100 * changed / arrays:.0f} % changed: {mib[0]:.1f} MiB written at the first step, "
            f"then {statistics.median(mib[1:]):.1f} ({100 * statistics.median(mib[1:]) / mib[0]:.1f} %); "
            f"{seconds[0]:.2f} s, then {statistics.median(seconds[1:]):.2f}"
        )

    def small(self, count: int) -> None:
        """Many small outputs at once."""
        plans = [serialize.pack({"step": n, "loss": np.full(64, float(n))}) for n in range(count)]
        self.epoch += 1
        requests = [
            WriteRequest(str(self.directory), self.epoch, f"t{n}", f"t{n}", p.meta, p.to_bytes())
            for n, p in enumerate(plans)
        ]
        with writer(0) as client:
            through_writer(client, requests[:1])
            rates = []
            for _ in range(self.repeat):
                _, seconds, written = through_writer(client, requests)
                rates.append(count / seconds)
        print(f"{count} small outputs: {statistics.median(rates):,.0f}/s in {len({one.file for one in written})} files")

    def close(self) -> None:
        """Remove everything."""
        del self.array
        self.source.unlink()
        shutil.rmtree(self.directory)


def main() -> None:
    """Print the rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", default=".")
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    print(
        f"{time.strftime('%Y-%m-%d %H:%M')}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Linux {platform.release()}, "
        f"Python {platform.python_version()}, h5py {h5py.__version__}"
    )
    bench = Bench(
        Path(tempfile.mkdtemp(prefix="bench-checkpoint-", dir=options.directory)), options.mib, options.repeat
    )
    try:
        bench.large()
        bench.incremental()
        bench.small(options.count)
        print(f"load at the end {os.getloadavg()[0]:.1f}")
    finally:
        bench.close()


if __name__ == "__main__":
    main()
