"""What end-to-end checksums cost: bytes per second of a get, a chain of gets and a reduce, with them and without.

    python bench/checksums.py [MIB] [ROUNDS]

Four ranks on this machine, each on a node of its own, so that all bytes go over MPI's TCP. Runs with and without take turns; medians.
On few cores the sums compete with the copies of the network stack: beside a NIC, CRC-32 (2.5 GB/s a core) is what is added.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
import zlib

RANKS, TURNS = 4, 3


def measure(nbytes: int, rounds: int) -> dict[str, list[float]]:
    """Return, as one of the ranks, the seconds of each round by what was done; those of rank 0 count."""
    os.environ["HOPLITE_NODE"] = f"node{os.environ['HOPLITE_RANK']}"
    import numpy as np

    import hoplite_mpi as hm

    store = hm.init()
    seconds: dict[str, list[float]] = {"put": [], "get": [], "broadcast": [], "reduce": []}
    data = np.ones(nbytes // 8)

    def timed(what: str, action: object) -> None:
        store.barrier()
        began = time.perf_counter()
        action()  # type: ignore[operator]
        store.barrier()
        seconds[what].append(time.perf_counter() - began)

    for number in range(rounds):
        oid, parts = hm.ObjectID.from_name(f"x/{number}"), [f"part/{number}/{rank}" for rank in range(RANKS)]
        sources, rid = [hm.ObjectID.from_name(part) for part in parts], hm.ObjectID.from_name(f"sum/{number}")
        timed("put", lambda oid=oid: store.rank == 0 and store.put(data, oid))
        timed("get", lambda oid=oid: store.rank == 1 and store.get(oid))
        if store.rank == 0:
            store.delete(oid)
        store.barrier()
        again = hm.ObjectID.from_name(f"y/{number}")
        if store.rank == 0:
            store.put(data, again)
        timed("broadcast", lambda again=again: store.get(again))
        store.put(data, sources[store.rank])
        if store.rank == 0:
            store.reduce(sources, object_id=rid)
        timed("reduce", lambda rid=rid: store.rank == 0 and store.get(rid))
        store.barrier()
        if store.rank == 0:
            for each in (again, rid, *sources):
                store.delete(each)
        store.barrier()
    assert store.statistics().chunks_corrupt == 0
    store.close()
    return {what: times[1:] for what, times in seconds.items()}  # the first round touches its memory for the first time


def main() -> None:
    """Measure and print."""
    from hoplite_mpi.testing import run_ranks

    mib, rounds = int((sys.argv[1:] or ["128"])[0]), int((sys.argv[2:] or ["6"])[0])
    found: dict[tuple[str, bool], list[float]] = {}
    for _ in range(TURNS):
        for on in (False, True):
            env = {"HOPLITE_CHECKSUMS": str(int(on))}
            result = run_ranks(RANKS, measure, (mib << 20, rounds), env=env, timeout=300)
            assert result[0].value is not None, result[0].output
            for what, times in result[0].value.items():
                found.setdefault((what, on), []).extend(times)
    block = bytes(1 << 20)
    began = time.perf_counter()
    for _ in range(200):
        zlib.crc32(block)
    rate = 200 * len(block) / (time.perf_counter() - began) / 1e9
    print(
        f"{time.strftime('%Y-%m-%d %H:%M')}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}, Linux {platform.release()}, "
        f"Python {platform.python_version()}; {RANKS} ranks, {mib} MiB, {TURNS} x {rounds - 1} rounds; CRC-32 {rate:.1f} GB/s"
    )
    print(f"{'MB/s, median':<16}{'without':>10}{'with':>10}{'ratio':>8}")
    for what in ("put", "get", "broadcast", "reduce"):
        without, with_sums = ((mib << 20) / statistics.median(found[what, on]) / 1e6 for on in (False, True))
        print(f"{what:<16}{without:>10.0f}{with_sums:>10.0f}{with_sums / without:>8.2f}")


if __name__ == "__main__":
    main()
