"""The trace and the counters of a store."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hoplite_mpi as hm
from hoplite_mpi.testing import run_ranks
from hoplite_mpi.trace import Recorder, TraceEvent, merge, to_chrome, write_chrome


def test_a_recorder_keeps_the_last_events_and_counts_the_others() -> None:
    recorder = Recorder(3, limit=4)
    for number in range(10):
        recorder.event("put", number=number)
    events = recorder.events()
    assert [event["number"] for event in events] == [6, 7, 8, 9]
    assert (recorder.recorded, recorder.dropped) == (10, 6)
    assert {event.rank for event in events} == {3}
    assert [event.time for event in events] == sorted(event.time for event in events)
    assert pickle.loads(pickle.dumps(events)) == events


def test_a_recorder_that_is_off_records_nothing() -> None:
    recorder = Recorder()
    recorder.event("put")
    assert (recorder.on, recorder.events(), recorder.dropped) == (False, [], 0)


def test_traces_are_merged_by_either_clock() -> None:
    one = TraceEvent(10.0, 100.0, 0, "put", {})
    other = TraceEvent(5.0, 106.0, 1, "get", {})
    assert merge([[one], [other]]) == [one, other]
    assert merge([[one], [other]], one_machine=True) == [other, one]


def test_chrome_reads_it(tmp_path: Path) -> None:
    oid = hm.ObjectID.from_name("x")
    recorder = Recorder(2, limit=100)
    recorder.event("transfer.begin", id=1, oid=oid, peer=0)
    recorder.event("location", oid=oid, to=1, sources=frozenset({oid}))
    recorder.event("transfer.end", id=1, oid=oid, peer=0, why="complete")
    write_chrome(tmp_path / "trace.json", recorder.events())
    begin, instant, end = json.loads((tmp_path / "trace.json").read_text())
    assert json.loads(json.dumps(to_chrome(recorder.events()))) == [begin, instant, end]
    assert [one["ph"] for one in (begin, instant, end)] == ["b", "i", "e"]
    assert (begin["id"], begin["name"]) == (end["id"], end["name"])
    assert begin["ts"] <= instant["ts"] <= end["ts"]
    assert {one["pid"] for one in (begin, instant, end)} == {2}
    assert instant["args"] == {"oid": str(oid), "to": 1, "sources": [str(oid)]}


@pytest.mark.parametrize(
    ("text", "value"), [("1", True), ("true", True), ("On", True), ("0", False), ("no", False), ("", False)]
)
def test_yes_and_no_in_the_environment(text: str, value: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOPLITE_TRACE", text)
    assert hm.Config.from_environment(hm.Config(trace=not value)).trace is value


def test_neither_yes_nor_no_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOPLITE_TRACE", "perhaps")
    with pytest.raises(ValueError, match="HOPLITE_TRACE='perhaps' in the environment is not a bool"):
        hm.Config.from_environment()


def _everything(settings: dict[str, Any]) -> Any:
    """Two ranks do a bit of everything."""
    rank = int(os.environ["HOPLITE_RANK"])
    os.environ["HOPLITE_NODE"] = f"node{rank}"
    store = hm.init(config=hm.Config(**settings))
    large, small, lost, result = (hm.ObjectID.from_name(name) for name in ("large", "small", "lost", "result"))
    sources = [hm.ObjectID.from_name(f"source {r}") for r in range(2)]
    store.barrier()
    before = store.statistics()
    store.put(np.full(50_000, rank), sources[rank])
    if rank == 0:
        store.put(np.arange(100_000), large)
        store.put(b"small", small)
        store.put(b"", lost)
        store.reduce(sources, object_id=result)
    store.wait([large, small, lost], num_returns=3)
    assert len(store.get(large)) == 100_000
    assert bytes(store.get(small)) == b"small"
    store.get(large)
    assert store.get(result)[0] == 1
    store.barrier()
    if rank == 1:
        store.delete(lost)
        with pytest.raises(hm.ObjectDeletedError):
            store.get(lost)
    store.barrier()
    after = store.statistics()
    return before, after, store.trace(), store.runtime.view.owner(bytes(result))


def test_every_primitive_is_traced_and_counted() -> None:
    result = run_ranks(2, _everything, ({"trace": True},), timeout=60)
    assert [result[rank].exitcode for rank in range(2)] == [0, 0], [one.output for one in result.values()]
    owner = result[0].value[3]
    events = [result[rank].value[2] for rank in range(2)]
    both = {event.name for event in events[0]} & {event.name for event in events[1]}
    assert both >= {
        *("put", "put.stored", "get", "get.delivered", "wait", "call.begin", "call.end", "view"),
        *("join.begin", "join.end", "slot.start", "slot.stop"),
    }
    either = {event.name for one in events for event in one}
    assert either >= {
        *("wait.over", "delete", "failed", "location", "transfer.begin", "transfer.first", "transfer.end"),
        *("serve.begin", "serve.end", "reduce", "slot.child", "slot.first", "slot.done", "reduce.final"),
    }
    assert not either & {"peer.lost", "evicted", "transfer.stalled", "slot.failed"}
    (failed,) = (event for event in events[1] if event.name == "failed")
    assert (failed["oid"], failed["kind"]) == (hm.ObjectID.from_name("lost"), "deleted")
    large = hm.ObjectID.from_name("large")
    assert [e["how"] for e in events[0] if e.name == "get.delivered" and e["oid"] == large] == ["here", "here"]
    assert [e["how"] for e in events[1] if e.name == "get.delivered" and e["oid"] == large] == ["received", "here"]

    for rank, puts in ((0, 4), (1, 1)):
        before, after = result[rank].value[:2]
        # a barrier puts a part
        assert after.puts - before.puts == puts + 2
        assert after.gets - before.gets == 4
        assert after.slots - before.slots == 1
        assert after.slots_restarted == 0
        assert (after.joins, after.views >= 1, after.trace_dropped) == (1, True, 0)
        assert after.transfers == after.transfers_completed
        assert (after.transfers_failed, after.transfers_resumed, after.objects_mapped) == (0, 0, 0)
    received = [one.value[1].objects_received for one in (result[0], result[1])]
    # rank 1 receives the large one; one of the two has the root of the reduce, and the other receives its result
    assert sum(received) == 2
    assert received[1] >= 1
    reduces = [one.value[1].reduces - one.value[0].reduces for one in (result[0], result[1])]
    assert reduces[owner] >= 1
    # the two barriers are reduces, too
    assert sum(reduces) == 3


def test_nothing_is_kept_unless_it_is_asked_for() -> None:
    result = run_ranks(2, _everything, ({},), timeout=60)
    assert [result[rank].exitcode for rank in range(2)] == [0, 0], [one.output for one in result.values()]
    assert [result[rank].value[2] for rank in range(2)] == [[], []]
    assert result[1].value[1].objects_received >= 1, "it is counted all the same"
