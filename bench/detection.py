"""Time until every survivor has a view without a rank that died: by kill -9, by its host's power, by its cable.

    python bench/detection.py [TRIALS]              kill -9 on this machine; as root the rest too, on emulated hosts

Idle: nobody sends anything. Busy: all ranks are in one allreduce of 4 MiB after the other, each on a node of its own.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hoplite_mpi.testing import EmulatedHosts, run_ranks

RANKS, VICTIM = 4, 2
#: what issue and docs promise, in seconds
LIMIT = {"kill": 0.5, "power_off": 5.0, "pull_cable": 5.0}


def rank_main(directory: str, how: str, busy: bool) -> float | None:
    """Return the time (monotonic, the same clock for all processes of the machine) at which the victim was out of this rank's view."""
    import numpy as np

    os.environ["HOPLITE_NODE"] = f"node{os.environ['HOPLITE_RANK']}"
    import hoplite_mpi as hm

    store = hm.init()
    gone: list[float] = []
    noticed = threading.Event()

    def look(view: Any, _: Any) -> None:
        if VICTIM not in view.members and not gone:
            gone.append(time.monotonic())
            noticed.set()

    store.on_view(look)
    data = np.ones((4 << 20) // 8)
    for _ in range(2):
        store.allreduce(data)
    if store.rank == VICTIM and how == "kill":
        # in the middle of whatever the progress thread is doing, a moment from now
        def die() -> None:
            Path(directory, "died.tmp").write_text(str(time.monotonic()))
            Path(directory, "died.tmp").rename(Path(directory, "died"))
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Timer(1.0, die).start()
    Path(directory, f"ready.{store.rank}").touch()
    if busy:
        while not store.closed and (VICTIM in store.took_part() or not gone):
            store.allreduce(data)
    elif store.rank == VICTIM:
        while not store.closed:
            time.sleep(0.1)
    else:
        noticed.wait(60)
    if store.rank == VICTIM:
        return None
    store.barrier()
    return gone[0]


def trial(how: str, busy: bool) -> list[float]:
    """Return each survivor's seconds until it had the view without the victim."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="detection-")))
        hosts = stack.enter_context(EmulatedHosts(RANKS)) if how != "kill" else None

        def darken() -> None:
            end = time.monotonic() + 60
            while not all((directory / f"ready.{rank}").exists() for rank in range(RANKS)):
                if time.monotonic() > end:
                    return
                time.sleep(0.01)
            time.sleep(1)
            (directory / "died").write_text(str(time.monotonic()))
            getattr(hosts, how)(VICTIM)

        thread = threading.Thread(target=darken)
        if hosts is not None:
            thread.start()
        # the victim of a pulled cable goes on alone until it finds itself out
        results = run_ranks(RANKS, rank_main, (str(directory), how, busy), hosts=hosts, timeout=90)
        if hosts is not None:
            thread.join()
        died = float((directory / "died").read_text())
        survivors = [rank for rank in range(RANKS) if rank != VICTIM]
        for rank in survivors:
            if results[rank].value is None:
                raise RuntimeError(f"rank {rank} did not survive:\n{results[rank].output}")
        return [results[rank].value - died for rank in survivors]


def main() -> int:
    """Measure and print one JSON line for each case; return 1 if a limit was passed."""
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    late = False
    for how in ("kill", "power_off", "pull_cable") if os.geteuid() == 0 else ("kill",):
        for busy in (False, True):
            times = [max(trial(how, busy)) for _ in range(trials)]
            late |= max(times) > LIMIT[how]
            line = {
                "what": how,
                "load": "busy" if busy else "idle",
                "ranks": RANKS,
                "trials": trials,
                "median_s": round(statistics.median(times), 3),
                "worst_s": round(max(times), 3),
                "limit_s": LIMIT[how],
            }
            print(json.dumps(line), flush=True)
    return int(late)


if __name__ == "__main__":
    sys.exit(main())
