from __future__ import annotations

from typing import Any

import pytest

from hoplite_mpi.testing import run_ranks


def _talk(size: int) -> Any:
    import hoplite_mpi as hm

    with hm.init() as store:
        box = hm.Mailbox(store, 3)
        other, before = (store.rank + 1) % 3, (store.rank - 1) % 3
        store.barrier()
        for number in range(200):
            box.send(other, number.to_bytes(2, "big") + bytes(size))
        got = [box.receive(20) for _ in range(200)]
        with pytest.raises(hm.GetTimeoutError):
            box.receive(0.01)
        with pytest.raises(hm.PeerLostError):
            box.send(99, b"nobody")
        store.barrier()
        numbers = [int.from_bytes(payload[:2], "big") for _, payload in got]
        misplaced = [(place, number) for place, number in enumerate(numbers) if place != number]
        return misplaced, {source for source, _ in got} == {before}, {len(p) for _, p in got}


@pytest.mark.parametrize("size", [0, 64, 300_000], ids=["empty", "small", "several fragments"])
def test_messages_arrive_whole_and_in_order(size: int) -> None:
    results = run_ranks(3, _talk, args=(size,), timeout=90)
    assert {rank: result.value for rank, result in results.items()} == dict.fromkeys(
        range(3), ([], True, {size + 2})
    ), results


def _talk_early() -> Any:
    """Rank 1 opens its mailbox only when rank 0 has sent everything."""
    import hoplite_mpi as hm

    with hm.init() as store:
        if store.rank == 0:
            box = hm.Mailbox(store, 3)
            for number in range(5):
                box.send(1, bytes([number]))
        store.barrier()
        got = []
        if store.rank == 1:
            box = hm.Mailbox(store, 3)
            got = [box.receive(20)[1][0] for _ in range(5)]
        store.barrier()
        return got


def test_messages_wait_for_a_mailbox_that_is_opened_late() -> None:
    results = run_ranks(2, _talk_early, timeout=60)
    assert results[1].value == [0, 1, 2, 3, 4], results[1].output


def _talk_to_myself() -> Any:
    import hoplite_mpi as hm

    with hm.init() as store:
        box = hm.Mailbox(store, 3)
        box.send(0, b"me")
        return box.receive(20)


def test_a_rank_can_write_to_itself() -> None:
    assert run_ranks(1, _talk_to_myself, timeout=60)[0].value == (0, b"me")


def test_numbers_are_checked() -> None:
    from hoplite_mpi import Mailbox

    with pytest.raises(ValueError, match="1 to 100"):
        Mailbox(None, 0)  # type: ignore[arg-type]
