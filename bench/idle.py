"""What an idle rank costs: processor time of each of four ranks that wait, with the objects and links of a used store.

python bench/idle.py [SECONDS]
"""

from __future__ import annotations

import json
import os
import sys
import time

RANKS = 4


def main(seconds: float) -> None:
    """Measure, as one of the ranks."""
    import numpy as np

    import hoplite_mpi as hm

    store = hm.init()
    ids = [hm.ObjectID.from_name(f"idle/{rank}") for rank in range(store.size)]
    store.put(np.full(1 << 18, store.rank), ids[store.rank])
    for oid in ids:
        store.get(oid)
    store.barrier()
    pending = store.get_async(hm.ObjectID.from_name("idle/never"))  # somebody waits for something
    time.sleep(1.0)
    began, used = time.perf_counter(), time.process_time()
    time.sleep(seconds)
    share = (time.process_time() - used) / (time.perf_counter() - began)
    pending.cancel()
    print(json.dumps({"rank": store.rank, "ranks": store.size, "percent_of_a_core": round(100 * share, 3)}), flush=True)
    store.barrier()
    store.close()


if __name__ == "__main__":
    duration = float(sys.argv[1]) if len(sys.argv) > 1 else 5.0
    if "HOPLITE_RENDEZVOUS" in os.environ or "PMI_RANK" in os.environ:
        main(duration)
    else:
        from hoplite_mpi.launch import LocalRanks

        with LocalRanks(RANKS, [os.path.abspath(__file__), str(duration)]) as ranks:
            sys.exit(max(map(abs, ranks.wait(duration + 120).values())))
