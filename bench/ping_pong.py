"""Latency of a 64-byte request and reply from user thread to user thread, beside raw mpi4py on the same connection.

    python bench/ping_pong.py                       two ranks started one by one, as a run has them
    mpiexec -n 2 python bench/ping_pong.py          two ranks of an MPI world

Raw and ours take turns, so that both see the same load of the machine; medians over the turns.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable

TURNS, MESSAGES, ASLEEP = 15, 400, 25
PAYLOAD = bytes(64)


def per_round_trip(first: bool, send: Callable[[], None], receive: Callable[[], object]) -> float:
    """Return microseconds for one round trip, over MESSAGES of them."""
    began = time.perf_counter()
    for _ in range(MESSAGES):
        if first:
            send()
            receive()
        else:
            receive()
            send()
    return (time.perf_counter() - began) / MESSAGES * 1e6


def main() -> None:
    """Measure, as one of the two ranks."""
    import hoplite_mpi as hm

    store = hm.init()
    first, other = store.rank == 0, 1 - store.rank
    box = hm.Mailbox(store, 1)
    box.send(other, PAYLOAD)  # the first message brings the connection up
    box.receive()
    link = store.runtime.fabric.link((other, 0))
    comm, buffer = link.comm, bytearray(64)
    assert comm is not None
    raw, ours, asleep = [], [], []
    for _ in range(TURNS):
        store.barrier()
        time.sleep(0.01)  # both progress threads block now and leave MPI alone
        raw.append(
            per_round_trip(first, lambda: comm.Send(buffer, link.dest, 9), lambda: comm.Recv(buffer, link.dest, 9))
        )
        store.barrier()
        ours.append(per_round_trip(first, lambda: box.send(other, PAYLOAD), box.receive))
    for _ in range(ASLEEP):
        time.sleep(0.05)
        began = time.perf_counter()
        if first:
            box.send(other, PAYLOAD)
            box.receive()
            asleep.append((time.perf_counter() - began) * 1e6)
        else:
            box.receive()
            box.send(other, PAYLOAD)
    store.barrier()
    if first:
        result = {
            "UCX_TLS": os.environ.get("UCX_TLS", ""),
            "fault_mode": store.fault_mode.name,
            "raw_us": round(statistics.median(raw), 1),
            "ours_us": round(statistics.median(ours), 1),
            "ratio": round(statistics.median(o / r for o, r in zip(ours, raw, strict=True)), 2),
            "asleep_us": round(statistics.median(asleep), 1),
        }
        print(json.dumps(result))
    store.close()


if __name__ == "__main__":
    if "HOPLITE_RENDEZVOUS" in os.environ or "PMI_RANK" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ:
        main()
    else:
        from hoplite_mpi.launch import LocalRanks

        with LocalRanks(2, [os.path.abspath(__file__)]) as ranks:
            sys.exit(max(map(abs, ranks.wait(120).values())))
