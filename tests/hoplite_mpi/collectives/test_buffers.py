from __future__ import annotations

import pytest

from hoplite_mpi.collectives.buffers import items_for


@pytest.mark.parametrize(
    ("items", "ranks", "expected"),
    [
        ("abcd", [0, 1, 2, 3], "abcd"),
        ("abcd", [0, 2, 3], "acd"),
        ("acd", [0, 2, 3], "acd"),
        ("abcd", [0, 2], "ac"),  # rank 3, for whom there is one, has died
        ("abcd", [1], "b"),
    ],
)
def test_items_by_rank_or_in_the_order_of_those_who_take_part(items: str, ranks: list[int], expected: str) -> None:
    processes = [(rank, 0) for rank in ranks]
    assert items_for("scatter", items, processes) == dict(zip(processes, expected, strict=True))


def test_too_few_items_are_refused() -> None:
    with pytest.raises(ValueError, match=r"alltoall: 2 items were given for ranks \[0, 2, 3\]"):
        items_for("alltoall", "ab", [(0, 0), (2, 0), (3, 0)])
