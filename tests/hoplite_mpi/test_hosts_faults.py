"""Hosts that lose their power or their cable at a fault point: in the middle of a broadcast, of a reduce, of a cut in halves."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hoplite_mpi.testing import EmulatedHosts, run_ranks
from hoplite_mpi.transport import guard

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(not guard.load().loaded, reason=f"the guard is not there: {guard.load().why}"),
]

KILLED = -signal.SIGKILL
CHUNK = 64 * 1024
CHUNKS = 64
ENV = {"HOPLITE_CHUNK_SIZE": str(CHUNK), "HOPLITE_WINDOW": "1", "HOPLITE_DEFAULT_TIMEOUT": "40"}
PATIENCE = 60.0


def _until(condition: Any, what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.005)


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except (FileNotFoundError, ProcessLookupError):  # it has left
        return False


def _cut_at_stop(hosts: EmulatedHosts, how: str, host: int, directory: Path) -> None:
    """Wait until the victim has stopped itself at its fault point, cut its host off, and let it go on if it still can.

    Its cable is plugged in again when the others say that it is out.
    """
    _until((directory / "pid").exists, "the victim has not begun")
    pid = int((directory / "pid").read_text())
    _until(lambda: _is_stopped(pid), "the victim has not come to the fault point")
    getattr(hosts, how)(host)
    if how == "pull_cable":

        def going_on(what: Any) -> bool:
            if Path(f"/proc/{pid}").exists() and _is_stopped(pid):  # there may be a second fault point in its way
                os.kill(pid, signal.SIGCONT)
            return bool(what())

        _until(lambda: going_on((directory / "out").exists), "the others did not go on")
        hosts.plug_in(host)
        _until(lambda: going_on(lambda: not Path(f"/proc/{pid}").exists()), "the victim did not leave")


def _tell(directory: str, name: str, text: str = "") -> None:
    Path(directory, f"{name}.tmp").write_text(text)
    Path(directory, f"{name}.tmp").rename(Path(directory, name))


def _run(program: Any, how: str, victim: int, tmp_path: Path, args: tuple[Any, ...]) -> Any:
    with EmulatedHosts(4) as hosts:
        cutter = threading.Thread(target=_cut_at_stop, args=(hosts, how, victim, tmp_path))
        cutter.start()
        results = run_ranks(4, program, (str(tmp_path), *args), hosts=hosts, env=ENV, timeout=90)
        cutter.join()
    survivors = [rank for rank in range(4) if rank != victim]
    assert [results[rank].exitcode for rank in survivors] == [0, 0, 0], [results[rank].output for rank in survivors]
    if how == "pull_cable":
        assert results[victim].value == "EvictedError", results[victim].output
    else:
        assert results[victim].exitcode == KILLED
    return [results[rank].value for rank in survivors]


def _leave(store: Any, victim: int, directory: str) -> None:
    _until(lambda: victim not in store.ranks, "it is still a member")
    store.barrier()
    if store.rank == store.ranks[0]:
        _tell(directory, "out")


def _evicted(call: Any) -> str:
    import hoplite_mpi as hm

    try:
        call()
    except hm.HopliteError as error:
        return type(error).__name__
    return "none"


# -- broadcast -----------------------------------------------------------------------------------------------------------------


def _broadcast(directory: str, victim: int) -> Any:
    """Rank 0 puts, rank 1 has a copy; 2 and 3 get it, while the victim, 0 or 1, sends and is cut off."""
    import numpy as np

    import hoplite_mpi as hm
    from hoplite_mpi.testing import fault

    store, oid = hm.init(), hm.ObjectID.from_name("x")
    data = np.random.default_rng(0).integers(0, 1000, CHUNK * CHUNKS // 8)
    if store.rank == 0:
        store.put(data, oid)
    if store.rank == 1:
        store.get(oid)
    store.barrier()
    if store.rank == victim:
        fault.enable(f"transfer.chunk_sent=stop@{CHUNKS // 2}")
        _tell(directory, "pid", str(os.getpid()))
    store.barrier()
    if store.rank == victim:
        never = hm.ObjectID.from_name("never")
        return _evicted(lambda: store.get(never))
    got = store.get(oid)
    received = store.statistics().bytes_received
    right = bool(np.array_equal(got, data))
    _leave(store, victim, directory)
    right &= bool(np.array_equal(store.get(oid), data))
    store.barrier()
    return right, received


@pytest.mark.parametrize("how", ["power_off", "pull_cable"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_sending_host_goes_dark(how: str, victim: int, tmp_path: Path) -> None:
    values = _run(_broadcast, how, victim, tmp_path, (victim,))
    assert [right for right, _ in values] == [True] * 3
    total = CHUNK * CHUNKS
    for _, received in values[1:]:
        # the prefix is kept, but for what was on its way
        assert total <= received <= total + 2 * CHUNK, values


# -- reduce --------------------------------------------------------------------------------------------------------------------


def _reduce(directory: str, victim: int) -> Any:
    """All have a part; the victim is cut off in the middle; the sum is that of who is left, or of all, on all survivors."""
    import numpy as np

    import hoplite_mpi as hm
    from hoplite_mpi.testing import fault

    store, rid = hm.init(), hm.ObjectID.from_name("sum")
    if store.rank == victim:
        at = CHUNKS // 2  # the first is passed by a leaf, the second by all others
        fault.enable(f"transfer.chunk_sent=stop@{at};reduce.chunk=stop@{at}")
        _tell(directory, "pid", str(os.getpid()))
    store.barrier()
    store.put(np.full(CHUNK * CHUNKS // 8, 10.0**store.rank), hm.ObjectID.from_name("part", (store.rank, 0)))
    store.reduce([hm.ObjectID.from_name("part", (r, 0)) for r in range(4)], object_id=rid, skip_lost=True)
    if store.rank == victim:
        _evicted(lambda: store.get(rid))
        never = hm.ObjectID.from_name("never")
        return _evicted(lambda: store.get(never))
    got, used = store.get(rid), store.reduced_from(rid)
    ranks = sorted(oid.origin[0] for oid in used if oid.origin)
    right = bool((got == sum(10.0**r for r in ranks)).all())
    _leave(store, victim, directory)
    right &= bool(np.array_equal(store.get(rid), got))
    store.barrier()
    return right, ranks


@pytest.mark.parametrize("how", ["power_off", "pull_cable"])
@pytest.mark.parametrize("victim", [0, 2])
def test_a_reducing_host_goes_dark(how: str, victim: int, tmp_path: Path) -> None:
    values = _run(_reduce, how, victim, tmp_path, (victim,))
    assert values == [(True, [rank for rank in range(4) if rank != victim])] * 3


# -- a cut in two parts --------------------------------------------------------------------------------------------------------


def _halves(directory: str) -> Any:
    """Ranks 1 and 3 are cut off together. Each side goes on putting under the same names, of which rank 1 keeps the entries."""
    import hoplite_mpi as hm

    store = hm.init()
    names = (hm.ObjectID.from_name(f"name {i}") for i in range(100_000))
    view = store.runtime.view
    kept_by_1 = [oid for oid, _ in zip((n for n in names if view.owner(bytes(n)) == 1), range(3000), strict=False)]
    store.barrier()
    _tell(directory, f"ready.{store.rank}")
    _until(Path(directory, "dark").exists, "the cable was not pulled")
    cut = float(Path(directory, "dark").read_text())
    minority = store.rank in (1, 3)
    if minority:
        last, error, put = 0.0, "none", 0
        for oid in kept_by_1:
            time.sleep(0.01)
            try:
                store.put(b"minority", oid)
            except hm.HopliteError as raised:
                error = type(raised).__name__
                break
            last, put = time.monotonic() - cut, put + 1
        return error, last, put, store.closed
    _until(lambda: store.ranks == [0, 2, 4], f"{store.ranks} are members")
    since = time.monotonic() - cut
    ours = [bytes(store.get(store.put(b"majority", oid))) for oid in kept_by_1[:500]]
    store.barrier()
    return since, set(ours) == {b"majority"}


def test_of_two_parts_of_a_cut_the_smaller_ends(tmp_path: Path) -> None:
    with EmulatedHosts(2) as hosts:

        def cut() -> None:
            _until(lambda: all((tmp_path / f"ready.{r}").exists() for r in range(5)), "not all are ready")
            hosts.pull_cable(1)
            _tell(str(tmp_path), "dark", str(time.monotonic()))

        cutter = threading.Thread(target=cut)
        cutter.start()
        results = run_ranks(5, _halves, (str(tmp_path),), hosts=hosts, env=ENV, timeout=90)
        cutter.join()
    assert [results[rank].exitcode for rank in range(5)] == [0] * 5, [r.output for r in results.values()]
    print({rank: result.value for rank, result in results.items()})
    for rank in (1, 3):
        error, _, _, closed = results[rank].value
        assert error == "EvictedError", results[rank].output
        assert closed
    for rank in (0, 2, 4):
        assert results[rank].value[1]


# -- how long it takes ---------------------------------------------------------------------------------------------------------


def _speaks_late(directory: str) -> Any:
    """A message sent just before keepalive gives the other host up does not make the wait begin again."""
    import hoplite_mpi as hm

    store = hm.init()
    store.barrier()
    if store.rank == 1:
        never = hm.ObjectID.from_name("never")
        return _evicted(lambda: store.get(never))
    time.sleep(1.0)  # until nothing is said any more
    _tell(directory, "ready")
    _until(Path(directory, "dark").exists, "the cable was not pulled")
    cut, runtime = float(Path(directory, "dark").read_text()), store.runtime
    time.sleep(max(0.0, cut + 1.7 - time.monotonic()))
    runtime.engine.run(lambda: runtime.side.send((1, 0), 21, None))  # a ping
    _until(lambda: store.ranks == [0], "it is still a member")
    return time.monotonic() - cut


def test_a_dark_host_is_noticed_in_time_whatever_is_sent_to_it(tmp_path: Path) -> None:
    with EmulatedHosts(2) as hosts:

        def cut() -> None:
            _until((tmp_path / "ready").exists, "rank 0 is not ready")
            hosts.pull_cable(1)
            _tell(str(tmp_path), "dark", str(time.monotonic()))

        cutter = threading.Thread(target=cut)
        cutter.start()
        results = run_ranks(2, _speaks_late, (str(tmp_path),), hosts=hosts, env=ENV, timeout=60)
        cutter.join()
    assert results[1].value == "EvictedError", results[1].output
    assert results[0].value < 4.3, "keepalive_timeout, which is 3 s, began again when the message was sent"
