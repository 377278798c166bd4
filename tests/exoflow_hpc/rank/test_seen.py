"""Tests of what is held against an output that is made again (R12)."""

from __future__ import annotations

from typing import Any

from exoflow_hpc.history import Facts
from exoflow_hpc.rank.seen import Seen
from exoflow_hpc.rank.writes import Writes
from tests.exoflow_hpc.semantics.world import make_spec

__all__: list[str] = []

VARIES: dict[str, Any] = {"deterministic": False}


def seen(rows: list[dict[str, Any]], **facts: Any) -> Seen:
    return Seen(make_spec(rows), Facts(**facts))


def test_another_output_than_before() -> None:
    known = seen([{}], seen={0: "aa"})
    assert known.deviation(0, "bb") == "aa"
    assert known.deviation(0, "aa") is None
    known.committed(0)
    assert known.deviation(0, "cc") is None, "nothing is known of it any more"
    assert known.deviation(0, "dd") == "cc"


def test_what_varies_may_be_another_and_so_may_what_is_computed_from_it() -> None:
    known = seen([VARIES, {"data": (0,)}, {"data": (1,)}, {}], seen={1: "aa", 2: "bb", 3: "cc"})
    known.begin([0, 3])
    assert [known.deviation(task, "zz") for task in (0, 1, 2, 3)] == [None, None, None, "cc"]
    known.dispatched(0)
    assert known.deviation(1, "yy") == "zz", "it ran for the first time"
    known.dispatched(0)
    assert known.deviation(1, "xx") is None


def test_what_varies_and_is_not_run_lets_nothing_be_another() -> None:
    known = seen([VARIES, {"data": (0,)}], seen={1: "aa"})
    known.begin([1])
    assert known.deviation(1, "bb") == "aa"


def test_one_that_has_deviated_varies() -> None:
    assert seen([{}], seen={0: "aa"}, deviant={0}).deviation(0, "bb") is None


def test_a_checksum_of_another_form_is_not_compared() -> None:
    known = seen([{}], seen={0: "aa"})
    assert known.deviation(0, "tree-bb") is None
    assert known.deviation(0, "tree-cc") == "tree-bb"


def test_what_a_record_says_of_its_inputs() -> None:
    known = seen([{}, {}, {}, {"data": (0, 1, 2)}], seen={0: "aa", 1: "bb"})
    assert known.by(3, committed={1}) == [["t0", "aa"]]
    known.voided(2, "cc")
    assert known.by(3, committed={1}) == [["t0", "aa"], ["t2", "cc"]]


def test_the_time_of_a_write_follows_what_was_measured() -> None:
    writes = Writes()
    first = writes.seconds(1 << 30)
    assert writes.seconds(0) > 0.0
    for task in range(20):
        writes.began(task)
        writes._began[task] -= 100.0  # it took so long
        writes.ended(task, 1 << 30)
    assert writes.seconds(1 << 30) > 10 * first
    writes.ended(99, 1 << 30)  # of one that was never begun here
