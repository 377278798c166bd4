"""MiB/s and outputs/s of the checkpoint writer, beside write + fsync. Run: python bench/checkpoint.py [directory]."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from exoflow_hpc import checkpoint, serialize
from exoflow_hpc.checkpoint import FileSource, WriterClient, WriteRequest, Written
from exoflow_hpc.errors import ExoFlowError

__all__ = ["main"]


def raw(path: Path, data: memoryview) -> float:
    """Return the seconds that write + fsync to a new file takes."""
    start = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        done = 0
        while done < len(data):
            done += file.write(data[done : done + (1 << 30)])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def through_writer(client: WriterClient, requests: list[WriteRequest]) -> tuple[float, list[Written]]:
    """Return the seconds until all are durable, and where they are."""
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
    if not done.wait(600):
        raise TimeoutError("the writer didn't finish within 600 s")
    return time.perf_counter() - start, written


def main() -> None:
    """Print the rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", default=".", help="on the file system to be measured")
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="bench-checkpoint-", dir=options.directory))
    source = Path(tempfile.mkstemp(prefix="bench-checkpoint-", dir="/dev/shm")[1])
    try:
        (directory / "checkpoints").mkdir()
        array = np.random.default_rng(0).random(options.mib << 17)
        source.write_bytes(array.data)
        meta = serialize.pack(array).meta
        large = WriteRequest(str(directory), 1, "large", "large", meta, FileSource(str(source), 0, array.nbytes))
        plans = [serialize.pack({"step": n, "loss": np.full(64, float(n))}) for n in range(options.count)]
        small = [WriteRequest(str(directory), 1, f"t{n}", f"t{n}", p.meta, p.to_bytes()) for n, p in enumerate(plans)]
        with WriterClient(0, 0) as client:
            through_writer(client, small[:1])  # it is up and has h5py loaded
            for _ in range(options.repeat):
                seconds = raw(directory / "raw", memoryview(array).cast("B"))
                print(f"raw write + fsync of {options.mib} MiB: {options.mib / seconds:,.0f} MiB/s")
                seconds, written = through_writer(client, [large])
                print(f"checkpoint of one array of {options.mib} MiB: {options.mib / seconds:,.0f} MiB/s")
                start = time.perf_counter()
                checkpoint.read(directory, written[0].file, written[0].entry, written[0].checksum)
                print(f"checked read of it: {options.mib / (time.perf_counter() - start):,.0f} MiB/s")
                seconds, written = through_writer(client, small)
                files = len({one.file for one in written})
                print(f"{options.count} small outputs: {options.count / seconds:,.0f}/s in {files} files", flush=True)
    finally:
        source.unlink()
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
