"""Tests of what a controller leaves to the one that follows it: lineages, and which survivors agree."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from exoflow_hpc.succession import (
    Lineage,
    Stand,
    Survivor,
    agreeing,
    era_of,
    first_of_era,
    plain,
    shown,
    stand_of,
)

from .semantics.world import make_spec

__all__: list[str] = []

VARIES: dict[str, Any] = {"deterministic": False}
UNDOABLE: dict[str, Any] = {"external": True, "rollback": "r"}
NONE: Stand = frozenset()


def stand(*entries: tuple[int, int, bool]) -> Stand:
    return frozenset(entries)


@pytest.mark.parametrize("known", [-1, 0, 5, era_of(2) | 5])
def test_attempts_of_an_era_are_of_no_other_and_count_on(known: int) -> None:
    first = first_of_era(era_of(3), known)
    assert known < era_of(3) <= first < era_of(4)
    assert shown(first) == shown(known) + 1
    assert shown(first + 1) == shown(known) + 2


def test_lineage_of_tasks_that_always_give_the_same_is_empty() -> None:
    lineage = Lineage(make_spec([{}, {"data": (0,)}]).tasks, ())
    assert lineage.dispatched(1, 4, [(0, 3, True)]) == NONE
    assert lineage.of(1, 4) == NONE


def test_lineage_names_what_varies_and_what_was_committed() -> None:
    """A committed value hides what is behind it; one that is not passes it on, whether it varies itself or not."""
    tasks = make_spec([VARIES, {"data": (0,)}, {"data": (1,)}, {**VARIES, "data": (2,)}, {"data": (3, 1)}]).tasks
    lineage = Lineage(tasks, ())
    assert lineage.dispatched(0, 7, []) == NONE
    assert lineage.dispatched(1, 0, [(0, 7, False)]) == stand((0, 7, False))
    assert lineage.dispatched(2, 0, [(1, 0, False)]) == stand((0, 7, False))
    assert lineage.dispatched(3, 5, [(2, 0, True)]) == stand((2, 0, True))
    assert lineage.dispatched(4, 1, [(3, 5, False), (1, 0, False)]) == stand((3, 5, False), (2, 0, True), (0, 7, False))


def test_lineage_through_another_attempt_is_not_known() -> None:
    lineage = Lineage(make_spec([VARIES, {"data": (0,)}, {"data": (1,)}]).tasks, ())
    lineage.dispatched(1, 2, [(0, 0, False)])
    assert lineage.of(1, 1) is None
    assert lineage.dispatched(2, 0, [(1, 1, False)]) is None
    assert lineage.dispatched(2, 1, [(1, 2, False)]) == stand((0, 0, False))


def test_deviant_tasks_vary() -> None:
    lineage = Lineage(make_spec([{}, {"data": (0,)}]).tasks, {0})
    assert lineage.dispatched(1, 0, [(0, 3, False)]) == stand((0, 3, False))


def test_lineages_travel() -> None:
    tasks = make_spec([VARIES, {}]).tasks
    known = stand((0, 1 << 33, False), (1, 0, True))
    assert plain(known) == [[0, 1 << 33, False], [1, 0, True]]
    assert stand_of(plain(known)) == known
    assert plain(known, tasks) == [["t0", 1 << 33, False], ["t1", 0, True]]
    assert stand_of(plain(known, tasks), {"t0": 0, "t1": 1}) == known
    assert plain(None) is None
    assert stand_of(None) is None


def agree(rows: list[dict[str, Any]], *survivors: Survivor, **facts: Any) -> set[tuple[int, int]]:
    """Return (task, attempt) of those that count, whichever order they are reported in."""
    given = {"committed": {}, "started": {}, "standing": [], "deviant": (), **facts}
    found = [
        {(task, one.attempt) for task, one in agreeing(make_spec(rows).tasks, **given, survivors=order).items()}
        for order in itertools.permutations(survivors)
    ]
    assert all(one == found[0] for one in found)
    return found[0]


def test_only_the_newest_attempt_of_what_varies_counts_and_what_stands_on_it() -> None:
    rows = [VARIES, {"data": (0,)}, {"data": (0,)}]
    old, new = Survivor(0, 1, 0, False, NONE), Survivor(0, 2, 1, True, NONE)
    on_old, on_new = Survivor(1, 0, 0, False, stand((0, 1, False))), Survivor(2, 0, 0, False, stand((0, 2, False)))
    assert agree(rows, old, on_old) == {(0, 1), (1, 0)}
    assert agree(rows, old, new, on_old) == {(0, 2)}
    assert agree(rows, on_old) == {(1, 0)}, "its source is lost, and nobody has seen another value of it"
    assert agree(rows, old, on_old, on_new) == {(2, 0)}
    assert agree(rows, old, on_old, standing=[stand((0, 2, False))]) == set(), "the journal knows of a newer one"


def test_what_is_committed_decides() -> None:
    rows = [VARIES, {"data": (0,)}]
    made, on_it = Survivor(0, 1, 0, False, NONE), Survivor(1, 0, 0, True, stand((0, 1, False)))
    assert agree(rows, made, on_it, committed={0: 1}) == {(0, 1), (1, 0)}
    assert agree(rows, made, on_it, committed={0: 2}) == set()
    read = Survivor(1, 0, 0, True, stand((0, 1, True)))
    assert agree(rows, read, committed={0: 1}) == {(1, 0)}
    assert agree(rows, read) == set(), "it was committed when it was read, and is void"
    assert agree(rows, Survivor(0, 1, 0, True, NONE), committed={0: 1}) == set(), "it need not go on"


def test_a_finished_attempt_is_worth_more_than_a_running_one() -> None:
    assert agree([{}], Survivor(0, 1, 0, True, NONE), Survivor(0, 0, 1, False, NONE)) == {(0, 0)}


def test_an_effect_counts_if_it_is_the_one_that_was_started_last() -> None:
    acts = Survivor(0, 3, 0, True, NONE)
    assert agree([UNDOABLE], acts, started={0: 3}) == {(0, 3)}
    assert agree([UNDOABLE], acts, started={0: 4}) == set()
    assert agree([UNDOABLE], acts) == set(), "it was undone"


def test_what_is_not_known_does_not_count() -> None:
    rows = [VARIES, {"data": (0,)}, {}]
    unknown, plain_one = Survivor(1, 0, 0, False, None), Survivor(2, 0, 0, False, NONE)
    assert agree(rows, unknown, plain_one) == {(2, 0)}
    on_it = Survivor(1, 0, 0, False, stand((0, 1, False)))
    assert agree(rows, on_it, plain_one, standing=[None]) == {(2, 0)}, "what stands may stand on another value"
    assert agree(rows, Survivor(0, 1, 0, False, NONE), plain_one, standing=[None]) == {(2, 0)}, "a value may, too"
    assert agree(rows, on_it, plain_one, deviant={2}) == {(1, 0)}
    assert agree([{}, {"data": (0,)}], Survivor(1, 0, 0, True, NONE), deviant={0}) == set()
