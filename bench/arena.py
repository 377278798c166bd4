"""Measure the arena: cold and recycled allocation, first and repeated map, pins.

    python bench/arena.py [MiB]

Prints one line per measurement: the median of its repetitions. Takes about four times the given size (default 256
MiB) of /dev/shm.
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

from hoplite_mpi.ids import ObjectID
from hoplite_mpi.memory import Arena, sweep
from hoplite_mpi.meta import Meta


def seconds(function: Callable[[], object], repeat: int = 1) -> float:
    """Return the seconds that one call takes, mean of *repeat*."""
    start = time.perf_counter()
    for _ in range(repeat):
        function()
    return (time.perf_counter() - start) / repeat


def report(what: str, times: list[float], nbytes: int = 0) -> None:
    """Print the median."""
    median = statistics.median(times)
    rate = f"{nbytes / median / 2**30:8.2f} GiB/s" if nbytes else ""
    print(f"{what:58} {median * 1e6:12.1f} us {rate}")


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def main() -> None:
    size = int(sys.argv[1] if len(sys.argv) > 1 else 256) << 20
    meta = Meta.of_bytes(size)
    sweep()
    print(
        f"{platform.node()}, {os.cpu_count()} cores, Linux {platform.release()}, {time.strftime('%Y-%m-%d')}; "
        f"object of {size >> 20} MiB"
    )
    source = np.ones(size, np.uint8)
    with Arena(f"bench-{os.getpid()}", 0, 0) as arena, Arena.attach(f"bench-{os.getpid()}", 1, 0) as mate:
        times: dict[str, list[float]] = {
            "cold": [],
            "cold fill": [],
            "warm": [],
            "warm fill": [],
            "map": [],
            "read": [],
        }
        for _ in range(3):
            for kind in ("cold", "warm"):  # the second one takes the memory that the first one freed
                oid = ObjectID.random()
                start = time.perf_counter()
                region = arena.allocate(oid, meta)
                times[kind].append(time.perf_counter() - start)
                target = np.frombuffer(region.data, np.uint8)
                times[f"{kind} fill"].append(seconds(lambda target=target: np.copyto(target, source)))  # type: ignore[misc]
                region.seal()
                if kind == "cold":
                    times["map"].append(seconds(lambda oid=oid: mate.map(oid)))  # type: ignore[misc]
                    pinned = mate.map(oid)
                    assert pinned is not None
                    array = pinned.array()
                    times["read"].append(seconds(array.max))
                    del pinned, array
                del region, target
                arena.delete(oid)
                mate.trim()
            arena._make_room()
        report("allocate, cold (reserve, populate)", times["cold"], size)
        report("fill, cold", times["cold fill"], size)
        report("allocate, recycled", times["warm"])
        report("fill, recycled", times["warm fill"], size)
        report("map for the first time", times["map"])
        report("read it for the first time (page faults)", times["read"], size)

        oid = ObjectID.random()
        region = arena.allocate(oid, meta)
        region.seal()
        mate.map(oid)
        report("map again, no view alive", [seconds(lambda: mate.map(oid), 2000) for _ in range(5)])
        view = mate.map(oid)
        before = faults()
        report("map again, with a view alive", [seconds(lambda: mate.map(oid), 2000) for _ in range(5)])
        print(f"{'page faults of these 10,000':58} {faults() - before:12}")
        del view, region
        arena.delete(oid)

        small = Meta.of_bytes(64 * 1024)

        def put() -> None:
            oid = ObjectID.random()
            arena.allocate(oid, small).seal()
            arena.delete(oid)

        report("allocate, seal, delete 64 KiB, recycled", [seconds(put, 500) for _ in range(5)])
        report(
            "allocate_private, abandon 256 KiB, recycled",
            [seconds(lambda: arena.allocate_private(1 << 18), 500) for _ in range(5)],
        )


if __name__ == "__main__":
    main()
