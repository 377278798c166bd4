"""Commits per second of the journal, beside plain write + fdatasync. Run: python bench/journal.py [directory]."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

from exoflow_hpc.journal import Journal

__all__ = ["main"]


def raw(path: Path, count: int, payload: bytes, preallocate: bool) -> float:
    """Return appends per second, each with its own fdatasync."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    if preallocate:
        os.posix_fallocate(fd, 0, count * len(payload))
    start = time.perf_counter()
    for _ in range(count):
        os.write(fd, payload)
        os.fdatasync(fd)
    seconds = time.perf_counter() - start
    os.close(fd)
    return count / seconds


def journal(directory: Path, count: int, payload: bytes, together: int) -> float:
    """Return acknowledged records per second, *together* of them appended at a time."""
    (directory / "journal").mkdir(parents=True)
    (directory / "FENCE").touch()
    opened, _ = Journal.open(directory)
    start = time.perf_counter()
    for _ in range(0, count, together):
        futures = [opened.append({"type": "bench", "data": payload}) for _ in range(together)]
        futures[-1].result()
    seconds = time.perf_counter() - start
    opened.close()
    return count / seconds


def main() -> None:
    """Print the rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", default=".", help="on the file system to be measured")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--nbytes", type=int, default=200)
    options = parser.parse_args()
    payload = os.urandom(options.nbytes)
    directory = Path(tempfile.mkdtemp(prefix="bench-journal-", dir=options.directory))
    try:
        for preallocate in (False, True):
            rate = raw(directory / "raw", options.count, payload, preallocate)
            print(f"raw write + fdatasync, {'preallocated' if preallocate else 'growing'}: {rate:,.0f}/s", flush=True)
        for together in (1, 10, 100):
            rate = journal(directory / str(together), options.count, payload, together)
            print(
                f"journal, {together} records at a time: {rate:,.0f} records/s, {rate / together:,.0f} waits/s",
                flush=True,
            )
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
