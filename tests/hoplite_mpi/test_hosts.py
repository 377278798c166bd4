"""The store across emulated hosts: network, host name and /dev/shm of their own, links of 1 Gbit/s."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hoplite_mpi.testing import EmulatedHosts, run_ranks

pytestmark = pytest.mark.hosts

NBYTES = 4 << 20


def _exchange() -> Any:
    import numpy as np

    import hoplite_mpi as hm

    with hm.init() as store:
        ids = [hm.ObjectID.from_name(f"host/{rank}") for rank in range(store.size)]
        store.put(np.full(NBYTES // 8, float(store.rank)), ids[store.rank])
        got = [float(store.get(oid, timeout=30)[-1]) for oid in ids]
        total = store.reduce(ids, object_id=hm.ObjectID.from_name("host/sum"))
        summed = float(store.get(total, timeout=30)[0])
        sources = len(store.reduced_from(total))
        received = store.statistics().bytes_received
        store.barrier()
        return got, summed, sources, received


def test_objects_and_reduces_cross_hosts() -> None:
    with EmulatedHosts(3) as hosts:
        results = run_ranks(3, _exchange, hosts=hosts, timeout=90)
    for rank, result in results.items():
        assert result.value is not None, result.output
        got, summed, sources, received = result.value
        assert (got, summed, sources) == ([0.0, 1.0, 2.0], 3.0, 3)
        assert received >= 2 * NBYTES, f"rank {rank} got other hosts' objects without receiving them"


def _outlive(directory: str) -> Any:
    """Rank 2's host goes dark; the others notice, and go on."""
    import numpy as np

    import hoplite_mpi as hm

    with hm.init() as store:
        oid = hm.ObjectID.from_name("before")
        if store.rank == 0:
            store.put(np.arange(NBYTES // 8), oid)
        assert store.get(oid, timeout=30)[-1] == NBYTES // 8 - 1
        store.barrier()
        Path(directory, f"ready.{store.rank}").touch()
        dark = Path(directory, "dark")
        end = time.monotonic() + 60
        if store.rank == 2:  # cut off, and alone: it must not go on
            while not store.closed and time.monotonic() < end:
                time.sleep(0.01)
            with pytest.raises(hm.EvictedError):
                store.get(hm.ObjectID.from_name("nothing"), timeout=5)
            return "evicted"
        while not dark.exists() and time.monotonic() < end:
            time.sleep(0.01)
        began = float(dark.read_text())
        while store.size == 3 and time.monotonic() < end:
            time.sleep(0.01)
        noticed = time.time() - began
        again = hm.ObjectID.from_name(f"after/{store.rank}")
        store.put(np.full(NBYTES // 8, store.rank + 1), again)
        total = store.reduce(
            [hm.ObjectID.from_name(f"after/{rank}") for rank in (0, 1)], object_id=hm.ObjectID.from_name("sum")
        )
        result = noticed, int(store.get(total, timeout=30)[-1]), store.ranks
        store.barrier()  # who leaves takes its objects along
        return result


@pytest.mark.parametrize("how", ["power_off", "pull_cable"])
def test_a_dark_host_is_noticed_and_outlived(how: str, tmp_path: Path) -> None:
    with EmulatedHosts(3) as hosts:

        def darken() -> None:
            end = time.monotonic() + 60
            while not all((tmp_path / f"ready.{rank}").exists() for rank in range(3)) and time.monotonic() < end:
                time.sleep(0.01)
            getattr(hosts, how)(2)
            (tmp_path / "dark.tmp").write_text(str(time.time()))
            (tmp_path / "dark.tmp").rename(tmp_path / "dark")

        thread = threading.Thread(target=darken)
        thread.start()
        results = run_ranks(3, _outlive, args=(str(tmp_path),), hosts=hosts, timeout=90)
        thread.join()
    for rank in (0, 1):
        assert results[rank].value is not None, results[rank].output
        noticed, total, ranks = results[rank].value
        assert (total, ranks) == (3, [0, 1])
    assert results[2].value == ("evicted" if how == "pull_cable" else None), results[2].output
    for noticed in (results[0].value[0], results[1].value[0]):
        assert noticed < 20, "a host that is gone is noticed by the kernel's keepalive, in some seconds"
