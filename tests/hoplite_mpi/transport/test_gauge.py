"""Latency and bandwidth, measured on live links."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import hoplite_mpi as hm
from hoplite_mpi.testing import EmulatedHosts, run_ranks

if TYPE_CHECKING:
    from hoplite_mpi.protocol.links import LinkClass
    from hoplite_mpi.store import ObjectStore

PATIENCE = 30.0


def _measured(store: ObjectStore) -> LinkClass:
    """Return what is known of the only class of links that there is, as soon as it was measured."""
    end = time.monotonic() + PATIENCE
    while True:
        found = store.explain_reduce(4, 1 << 20)
        known = [one for one in (found.same_node, found.other_node) if one.bandwidth_from == "measured"]
        if known and known[0].latency_from == "measured":
            return known[0]
        assert time.monotonic() < end, f"nothing was measured: {found}"
        time.sleep(0.01)


@pytest.mark.mpi
def test_links_are_measured_when_the_store_starts(store: ObjectStore) -> None:
    if len(store.ranks) == 1:
        assert store.explain_reduce(4, 1 << 20).same_node.latency_from == "assumed"
        return
    links = _measured(store)
    assert 0 < links.latency < 1.0
    assert 1e5 < links.bandwidth < 1e12


def _talk(settings: dict[str, Any]) -> Any:
    """Return what a rank on a node of its own knows after both have talked and rested, and what it has counted."""
    os.environ["HOPLITE_NODE"] = os.environ["HOPLITE_RANK"]
    store = hm.init(config=hm.Config(**settings))
    oid = hm.ObjectID.from_name("large")
    if store.rank == 1:
        store.put(np.zeros(1 << 19), oid)
    store.get(oid)
    time.sleep(0.5)  # longer than the gauge waits
    found, counted = store.explain_reduce(4, 1 << 20), store.statistics()
    store.barrier()
    store.close()
    return found, counted


def _run(**settings: Any) -> Any:
    result = run_ranks(2, _talk, (settings,), timeout=60)
    assert result[0].value is not None, result[0].output
    return result[0].value


def test_the_measurement_is_in_no_counter() -> None:
    found, counted = _run()
    assert (found.other_node.latency_from, found.other_node.bandwidth_from) == ("measured", "measured")
    assert (counted.transfers, counted.bytes_received, counted.bytes_sent) == (1, 1 << 22, 0)


def test_what_is_set_wins_and_is_not_measured() -> None:
    found, _ = _run(latency=1.5, bandwidth=1000.0, chunk_size=4096)
    assert (found.latency, found.bandwidth, found.chunk_size) == (1.5, 1000.0, 4096)
    assert (found.other_node.latency_from, found.other_node.bandwidth_from) == ("set", "set")
    found, _ = _run(bandwidth=1000.0)
    assert (found.other_node.latency_from, found.other_node.bandwidth_from) == ("measured", "set")
    assert found.other_node.bandwidth == 1000.0


def _traffic() -> Any:
    """Rank 1 receives 24 MiB; return its bandwidth before and after."""
    store = hm.init()
    oid = hm.ObjectID.from_name("much")
    if store.rank == 0:
        store.put(np.zeros(3 << 20), oid)
    else:
        store.wait([oid], timeout=30)
    store.barrier()
    before = _measured(store)
    if store.rank == 1:
        store.get(oid, timeout=30)
    found = store.explain_reduce(4, 1 << 20)
    store.barrier()
    store.close()
    return before, found


@pytest.mark.hosts
def test_the_bandwidth_is_that_of_the_wire() -> None:
    wire = 200e6 / 8
    with EmulatedHosts(2, rate="200mbit") as hosts:
        result = run_ranks(2, _traffic, hosts=hosts, timeout=90)
    assert result[1].value is not None, result[1].output
    before, found = result[1].value
    # The burst finds some room in the buffer of the emulated wire; traffic does not.
    assert 0.4 * wire < before.bandwidth < 4 * wire
    assert 0.7 * wire < found.other_node.bandwidth < 1.2 * wire
    assert found.chunk_size == 64 << 10
