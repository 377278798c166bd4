"""End-to-end checksums: bytes that are changed on their way, or in the memory of who forwards them, on live ranks."""

from __future__ import annotations

import os
import signal
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import hoplite_mpi as hm
from hoplite_mpi.checksums import BLOCK, Retries, Sums, whole_blocks
from hoplite_mpi.testing import fault, run_ranks
from hoplite_mpi.transport import guard

live = pytest.mark.skipif(not guard.load().loaded, reason=f"the guard is not there: {guard.load().why}")

CHUNK = BLOCK
CHUNKS = 32
NBYTES = CHUNK * CHUNKS
ENV = {
    "HOPLITE_CHUNK_SIZE": str(CHUNK),
    "HOPLITE_WINDOW": "1",
    "HOPLITE_TRACE": "1",
    "HOPLITE_STALL_TIMEOUT": "30",
    "HOPLITE_KEEPALIVE_TIMEOUT": "35",
    "HOPLITE_JOIN_TIMEOUT": "40",
    "HOPLITE_DEFAULT_TIMEOUT": "40",
}
ON = ENV | {"HOPLITE_CHECKSUMS": "1"}


# -- sums ------------------------------------------------------------------------------------------------------------------


def _bytes(nbytes: int) -> memoryview:
    return memoryview(np.random.default_rng(1).integers(0, 256, nbytes, "u1").tobytes())


@pytest.mark.parametrize("nbytes", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 17])
def test_a_sum_for_each_block(nbytes: int) -> None:
    data = _bytes(nbytes)
    sums = Sums.of(data)
    packed, end = sums.pack(0, 100)
    assert end == nbytes
    expected = [zlib.crc32(data[at : at + BLOCK]) for at in range(0, nbytes, BLOCK)]
    assert np.frombuffer(packed, "<u4").tolist() == expected
    assert sums.known(0, nbytes)
    assert sums.wrong(data, 0) is None


@pytest.mark.parametrize("at", [0, BLOCK, 2 * BLOCK + 5, 3 * BLOCK + 16])
def test_a_changed_byte_is_found(at: int) -> None:
    data = bytearray(_bytes(3 * BLOCK + 17))
    sums = Sums.of(data)
    data[at] ^= 1
    start = BLOCK if at >= BLOCK else 0
    assert sums.wrong(memoryview(data)[start:], start) == at // BLOCK * BLOCK


def test_what_came_along_is_not_made_again() -> None:
    data = _bytes(4 * BLOCK)
    producer, forwarder = Sums.of(data), Sums(len(data))
    packed, end = producer.pack(BLOCK, 2)
    assert end == 3 * BLOCK
    forwarder.take(BLOCK, packed)
    assert forwarder.known(BLOCK, 3 * BLOCK)
    assert not forwarder.known(0, BLOCK)
    assert not forwarder.known(2 * BLOCK, 4 * BLOCK)
    rotten = bytearray(data)
    rotten[BLOCK + 3] ^= 1
    forwarder.make(memoryview(rotten), 0, len(rotten))
    assert forwarder.wrong(data, 0) is None, "the sum of the rotten block is that of the right one"
    forwarder.forget(2 * BLOCK)
    assert forwarder.pack(0, 100) == (producer.pack(0, 2)[0], 2 * BLOCK)


@pytest.mark.parametrize(
    ("itemsizes", "unit"), [((1,), BLOCK), ((8,), BLOCK // 8), ((2, 4), BLOCK // 2), ((12,), BLOCK // 4)]
)
def test_chunks_are_whole_blocks(itemsizes: tuple[int, ...], unit: int) -> None:
    assert whole_blocks(1, *itemsizes) == unit
    assert whole_blocks(3 * unit + 1, *itemsizes) == 3 * unit
    assert all(unit * itemsize % BLOCK == 0 for itemsize in itemsizes)


def test_retries_begin_at_once_grow_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("hoplite_mpi.checksums.time.monotonic", lambda: now)
    retries = Retries()
    assert [retries.delay(5, 10.0) for _ in range(4)] == [0.0, 0.01, 0.02, 0.04]
    now = 110.0
    assert retries.delay(5, 10.0) is not None
    now = 110.1
    assert retries.delay(5, 10.0) is None
    assert retries.delay(6, 10.0) == 0.0, "something was right meanwhile"
    assert max(retries.delay(6, 10.0) or 0.0 for _ in range(20)) == 1.0


# -- live --------------------------------------------------------------------------------------------------------------------


def _open() -> Any:
    os.environ["HOPLITE_NODE"] = f"node{os.environ['HOPLITE_RANK']}"
    return hm.init()


def _data(seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 1000, NBYTES // 8)


def _owned_by(rank: int, store: Any, what: str) -> Any:
    oids = (hm.ObjectID.from_name(f"{what}/{i}") for i in range(1000))
    return next(oid for oid in oids if store.runtime.view.owner(bytes(oid)) == rank)


def _until(condition: Callable[[], bool], what: str) -> None:
    import time

    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.005)


def _values(result: Any) -> list[Any]:
    assert [one.exitcode for one in result.values()] == [0] * len(result), [one.output for one in result.values()]
    return [one.value for one in result.values()]


def _broadcast() -> Any:
    """Rank 0 puts, and rank 1 gets; return whether the bytes are right, the counters and the trace."""
    store, oid = _open(), hm.ObjectID.from_name("x")
    if store.rank == 0:
        store.put(_data(), oid)
    right = bool(np.array_equal(store.get(oid), _data()))
    store.barrier()
    return right, store.statistics(), store.trace()


CORRUPT = f"1:transfer.chunk_corrupt=corrupt@{CHUNKS // 2}"


@live
def test_a_corrupt_chunk_is_fetched_again() -> None:
    result = run_ranks(2, _broadcast, env=ON | {"HOPLITE_FAULT": CORRUPT}, timeout=60)
    (_, sent, _), (right, received, events) = _values(result)
    assert right
    assert (received.chunks_corrupt, sent.chunks_corrupt) == (1, 0)
    assert (received.transfers, received.transfers_resumed) == (2, 1)
    assert received.bytes_received == NBYTES + CHUNK, "nothing else is fetched again"
    (corrupt,) = (event for event in events if event.name == "transfer.corrupt")
    at = (CHUNKS // 2 - 1) * CHUNK
    assert (corrupt["oid"], corrupt["peer"], corrupt["at"]) == (hm.ObjectID.from_name("x"), 0, at)
    assert [event["offset"] for event in events if event.name == "transfer.begin"] == [0, at]
    oid = str(hm.ObjectID.from_name("x"))
    assert f"{oid}, version 0 from rank 0.0 have a wrong checksum at offset {at}" in result[1].output


@live
def test_without_checksums_nobody_notices() -> None:
    _, (right, received, _) = _values(run_ranks(2, _broadcast, env=ENV | {"HOPLITE_FAULT": CORRUPT}, timeout=60))
    assert not right
    assert (received.chunks_corrupt, received.transfers, received.bytes_received) == (0, 1, NBYTES)


@live
@pytest.mark.parametrize("window", ["1", "8"])
@pytest.mark.parametrize("chunk", [1000, 3 * BLOCK, 1 << 20])
def test_any_window_and_chunk_size(window: str, chunk: int) -> None:
    """The first, one in the middle, and the last chunk; sizes are those of whole blocks."""
    chunks = NBYTES // max(BLOCK, chunk // BLOCK * BLOCK)
    where = {1, chunks // 2 + 1, chunks + 3 * int(window)}  # the last: what is fetched again counts as well
    env = ON | {
        "HOPLITE_WINDOW": window,
        "HOPLITE_CHUNK_SIZE": str(chunk),
        "HOPLITE_FAULT": ";".join(f"1:transfer.chunk_corrupt=corrupt@{k}" for k in where),
    }
    _, (right, received, _) = _values(run_ranks(2, _broadcast, env=env, timeout=60))
    assert right
    assert received.chunks_corrupt >= 1
    assert received.transfers > 1
    assert received.transfers == received.transfers_completed + received.transfers_failed


def _forwarded() -> Any:
    """Rank 0 stops while it sends to rank 1, whose memory rots; rank 2 gets it from there, and then from rank 0."""
    rank = int(os.environ["HOPLITE_RANK"])
    store = _open()
    mail = hm.Mailbox(store, 1)
    for other in {0, 1, 2} - {rank}:
        mail.send(other, str(os.getpid()).encode())
    pids = {peer: int(text) for peer, text in (mail.receive() for _ in range(2))}
    oid = _owned_by(2, store, "x")
    if rank == 0:
        store.put(_data(), oid)
    store.barrier()

    def first() -> bool:
        return any(e.name == "transfer.first" and e["oid"] == oid for e in store.trace())

    def stopped() -> bool:
        with open(f"/proc/{pids[0]}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "T"

    future = None
    if rank == 1:
        future = store.get_async(oid)
        _until(stopped, "rank 0 has not stopped")
        _until(first, "nothing comes")
        mail.send(2, b"come")
    if rank == 2:
        mail.receive()
        future = store.get_async(oid)
        _until(lambda: store.statistics().chunks_corrupt > 0, "it was not noticed")
        os.kill(pids[0], signal.SIGCONT)
    right = future is None or bool(np.array_equal(future.result(), _data()))
    store.barrier()
    return right, store.statistics(), store.trace()


@live
def test_who_lets_bytes_rot_and_forwards_them_is_found_out() -> None:
    rules = f"0:transfer.chunk_sent=stop@{CHUNKS // 2};1:transfer.verified=corrupt@3"
    result = run_ranks(3, _forwarded, env=ON | {"HOPLITE_FAULT": rules}, timeout=60)
    _, (rotten, forwarder, _), (right, last, events) = _values(result)
    assert not rotten, "what rots behind the check is not noticed by the same rank"
    assert forwarder.chunks_corrupt == 0
    assert right
    assert last.chunks_corrupt >= 1
    corrupt = [event for event in events if event.name == "transfer.corrupt"]
    assert {(event["peer"], event["at"]) for event in corrupt} == {(1, 2 * CHUNK)}
    begun = [(event["peer"], event["offset"]) for event in events if event.name == "transfer.begin"]
    assert begun[0] == (1, 0)
    assert begun[-1] == (0, 2 * CHUNK), "it goes on from the source, at the rotten block"
    assert set(begun[1:-1]) <= {(1, 2 * CHUNK)}


def _hopeless() -> Any:
    """All that rank 1 gets is corrupt; then it is not."""
    store, oid = _open(), hm.ObjectID.from_name("x")
    sources, rid = [hm.ObjectID.from_name(f"source {rank}") for rank in range(2)], hm.ObjectID.from_name("sum")
    store.put(_data(store.rank), sources[store.rank])
    if store.rank == 0:
        store.put(_data(), oid)
    store.barrier()
    if store.rank == 1:
        fault.enable("transfer.chunk_corrupt=corrupt@*")
        with pytest.raises(hm.CorruptObjectError, match=r"offset 0 .* wrong checksum .* rank 0 was the last"):
            store.get(oid)
        store.reduce(sources, object_id=rid, deterministic=True)  # rank 1 has the root
    with pytest.raises(hm.ReduceError, match=r"slot 0, rank 0, .* wrong checksum"):
        store.get(rid)
    store.barrier()
    fault.disable()
    again = store.get(oid)
    store.barrier()
    return bool(np.array_equal(again, _data())), store.statistics().chunks_corrupt


@live
def test_what_is_corrupt_for_ever_is_an_error() -> None:
    result = run_ranks(2, _hopeless, env=ON | {"HOPLITE_CORRUPT_TIMEOUT": "0.5"}, timeout=60)
    (right, none), (again, several) = _values(result)
    assert right and again
    assert none == 0
    assert several > 4


def _reduce(dtype: str) -> Any:
    """Three ranks reduce in a chain, 0 → 1 → 2; all get the sum, the others when rank 2 has it: until then only the chain flows."""
    store, rid = _open(), hm.ObjectID.from_name("sum")
    sources = [hm.ObjectID.from_name(f"source {rank}") for rank in range(3)]
    source = np.tile(np.arange(16), NBYTES // 16 // np.dtype(dtype).itemsize).astype(dtype)
    store.put(source, sources[store.rank])
    store.barrier()
    if store.rank == 1:
        store.reduce(sources, object_id=rid, deterministic=True, shape="chain")
    if store.rank == 2:
        store.get(rid)
    store.barrier()
    right = bool(np.array_equal(store.get(rid), 3 * source))
    store.barrier()
    return right, store.statistics(), store.trace()


@live
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("dtype", ["i8", "f2", "f4"])
def test_a_corrupt_chunk_of_a_child_is_fetched_again(dtype: str, rank: int) -> None:
    """Rank 1 receives a source as it is, rank 2 what rank 1 has added up; halves flow as they are, and then as float32."""
    rules = f"{rank}:transfer.chunk_corrupt=corrupt@{CHUNKS // 4}"
    found = _values(run_ranks(3, _reduce, (dtype,), env=ON | {"HOPLITE_FAULT": rules}, timeout=60))
    assert [right for right, _, _ in found] == [True] * 3
    assert [statistics.chunks_corrupt for _, statistics, _ in found] == [int(r == rank) for r in range(3)]
    assert sum(statistics.slots_restarted for _, statistics, _ in found) == 0, "only the chunk is fetched again"
    begun = [event for event in found[rank][2] if event.name == "transfer.begin" and event.get("slot") is not None]
    assert [event["offset"] for event in begun] == [0, begun[1]["offset"]]
    assert begun[1]["offset"] > 0


@live
def test_a_reduce_without_checksums_is_wrong() -> None:
    rules = f"1:transfer.chunk_corrupt=corrupt@{CHUNKS // 4}"
    found = _values(run_ranks(3, _reduce, ("i8",), env=ENV | {"HOPLITE_FAULT": rules}, timeout=60))
    assert [right for right, _, _ in found] == [False] * 3


def _allreduce(nbytes: int) -> Any:
    store = _open()
    mine = np.random.default_rng(store.rank).integers(0, 1000, nbytes // 8)
    store.barrier()
    total = store.allreduce(mine)
    expected = sum(np.random.default_rng(rank).integers(0, 1000, nbytes // 8) for rank in range(3))
    store.barrier()
    return bool(np.array_equal(total, expected)), store.statistics()


@live
@pytest.mark.parametrize("patience", ["0", "30"])
def test_an_allreduce_with_a_corrupt_chunk(patience: str) -> None:
    """In one tree, or in stripes."""
    env = ON | {"HOPLITE_STRIPE_PATIENCE": patience, "HOPLITE_FAULT": "transfer.chunk_corrupt=corrupt@7"}
    found = _values(run_ranks(3, _allreduce, (NBYTES,), env=env, timeout=60))
    assert [right for right, _ in found] == [True] * 3
    corrupt = [statistics.chunks_corrupt for _, statistics in found]
    assert sum(corrupt) >= 1
    assert max(corrupt) <= 1


def _small() -> Any:
    """Rank 1 gets an object that comes in a control message, which is changed on its way."""
    store = _open()
    store.barrier()
    oid = _owned_by(0, store, "small")
    if store.rank == 0:
        store.put(bytes(50_000), oid)
        _until(lambda: store.ranks == [0], "rank 1 is still a member")
        return bytes(store.get(oid)) == bytes(50_000)
    fault.enable("fabric.message_corrupt=corrupt@1")
    if int(os.environ["HOPLITE_CHECKSUMS"]):
        with pytest.raises(hm.HopliteError, match=r"control message of rank 0\.0 came with a wrong checksum"):
            store.get(oid)
        with pytest.raises(hm.HopliteError, match="wrong checksum"):
            store.put(b"")
    elif bytes(store.get(oid)) == bytes(50_000):
        return False
    return True


@live
@pytest.mark.parametrize("checksums", ["0", "1"])
def test_a_rank_that_gets_a_corrupt_control_message_leaves(checksums: str) -> None:
    """Without checksums it goes on, with what came."""
    result = run_ranks(2, _small, env=ENV | {"HOPLITE_CHECKSUMS": checksums}, timeout=60)
    assert _values(result) == [True, True]


def _differing() -> Any:
    """Rank 0 has checksums and rank 1 hasn't; each gets what the other has put."""
    store = _open()
    names = [hm.ObjectID.from_name(f"of {rank}") for rank in range(2)]
    store.put(_data(store.rank), names[store.rank])
    right = bool(np.array_equal(store.get(names[1 - store.rank]), _data(1 - store.rank)))
    store.barrier()
    return right, store.statistics().chunks_corrupt


def _with_different_settings() -> Any:
    os.environ["HOPLITE_CHECKSUMS"] = str(1 - int(os.environ["HOPLITE_RANK"]))
    return _differing()


@live
def test_ranks_with_different_settings_say_so_and_go_on() -> None:
    """Each is served as it asks: rank 0 notices what is changed on its way, and rank 1 doesn't."""
    rules = "transfer.chunk_corrupt=corrupt@5"
    result = run_ranks(2, _with_different_settings, env=ENV | {"HOPLITE_FAULT": rules}, timeout=60)
    assert _values(result) == [(True, 1), (False, 0)]
    assert "rank 1.0 verifies what it receives: no, and this rank: yes" in result[0].output
    assert "rank 0.0 verifies what it receives: yes, and this rank: no" in result[1].output


def _killed() -> Any:
    """Rank 0 is killed while it sends, rank 1 goes on from rank 2; rank 1 gets something corrupt before and after that."""
    rank = int(os.environ["HOPLITE_RANK"])
    store = _open()
    oid, there = hm.ObjectID.from_name("x"), hm.ObjectID.from_name("there")
    store.barrier()
    if rank == 0:
        store.put(_data(), oid)
        store.get(there)
        fault.enable(f"transfer.chunk_sent=kill@{CHUNKS // 2}")
        store.put(b"", hm.ObjectID.from_name("go"))
        _until(lambda: False, "rank 0 was to be killed")
    if rank == 2:
        store.get(oid)
        store.put(b"", there)
    store.get(hm.ObjectID.from_name("go"))
    right = bool(np.array_equal(store.get(oid), _data()))
    if rank == 3:
        right = bool(np.array_equal(store.get(oid), _data()))
    _until(lambda: 0 not in store.ranks, "rank 0 is still a member")
    store.barrier()
    return right, store.statistics()


@live
def test_corrupt_chunks_and_a_death_in_the_middle() -> None:
    rules = ";".join(f"{rank}:transfer.chunk_corrupt=corrupt@{k}" for rank in (1, 3) for k in (4, CHUNKS - 2))
    result = run_ranks(4, _killed, env=ON | {"HOPLITE_FAULT": rules, "HOPLITE_WINDOW": "4"}, timeout=60)
    assert [result[rank].exitcode for rank in range(4)] == [-signal.SIGKILL, 0, 0, 0], result[1].output
    assert [result[rank].value[0] for rank in (1, 2, 3)] == [True] * 3
    assert all(result[rank].value[1].chunks_corrupt >= 1 for rank in (1, 3))


def _mapped() -> Any:
    """Ranks 1 and 2 are on one node: rank 2 maps what rank 1 received, and serves it to rank 3."""
    rank = int(os.environ["HOPLITE_RANK"])
    os.environ["HOPLITE_NODE"] = "shared" if rank in (1, 2) else f"node{rank}"
    store, oid = hm.init(), hm.ObjectID.from_name("x")
    if rank == 0:
        store.put(_data(), oid)
    store.barrier()
    if rank == 1:
        store.get(oid)
    store.barrier()
    if rank == 2:
        store.get(oid)
    store.barrier()
    if rank < 2:
        os.kill(os.getpid(), signal.SIGKILL)
    _until(lambda: store.ranks == [2, 3], "the others are still members")
    right = bool(np.array_equal(store.get(oid), _data()))
    store.barrier()
    return right, store.statistics()


@live
def test_a_mapped_copy_gets_its_sums_from_who_serves_it() -> None:
    result = run_ranks(4, _mapped, env=ON, timeout=60)
    assert [result[rank].exitcode for rank in (2, 3)] == [0, 0], result[2].output
    assert (result[3].value[0], result[3].value[1].bytes_received) == (True, NBYTES)
