"""Tests of what is known of references: who holds what, what is lost with what, where it is."""

from __future__ import annotations

from typing import Any

import pytest

from exoflow_hpc import records
from exoflow_hpc.rank.messages import InputPlace
from exoflow_hpc.rank.naming import is_of_run, output_id, reference_id
from exoflow_hpc.rank.references import Key, Put, References

__all__: list[str] = []

OUTER, INNER = (0, 4, 0), (0, 4, 1)
#: creator, who hands it on, who hands on what is nested in it
MADE, HANDED, PART = (0, 4), (1, 0), (2, 0)


@pytest.fixture
def three() -> References:
    known = References({}, int)
    known.made(MADE, [OUTER], {OUTER: Put(10, 7, (INNER,)), INNER: Put(3, 7)})
    known.made(HANDED, [OUTER], {})
    known.made(PART, [INNER], {})
    return known


def write(known: References, key: Key) -> bool:
    return known.written(key, str(key[0]), records.InCheckpoint("f", f"e{key[2]}"), "sum", 3, [])


def test_an_object_is_there_as_long_as_somebody_holds_it(three: References) -> None:
    assert three.gone(MADE) == []
    assert three.nbytes(HANDED) == 13
    assert three.gone(HANDED) == [OUTER]
    assert three.in_memory == [INNER]
    assert three.gone(PART) == [INNER]
    assert three.gone(PART) == []


def test_what_is_lost_with_an_object(three: References) -> None:
    assert three.lost([OUTER]) == [MADE, HANDED]
    assert three.missing(HANDED) == [OUTER]
    assert three.missing(PART) == []
    assert three.lost([INNER]) == [MADE, HANDED, PART]


def test_nothing_is_lost_that_a_file_has(three: References) -> None:
    assert three.to_write(three.all_of(HANDED)) == {OUTER: 7, INNER: 7}
    assert write(three, OUTER)
    assert three.lost([OUTER, INNER]) == [MADE, HANDED, PART]
    assert three.missing(HANDED) == [INNER]
    assert three.to_write([INNER]) == {INNER: -1}
    assert not write(three, INNER), "whoever needed it is gone"


def test_places(three: References) -> None:
    write(three, INNER)
    one, two = InputPlace(1, "inline"), InputPlace(2, "inline")
    places = three.places([(one, three.direct(HANDED)), (two, three.direct(PART))])
    assert [(place.kind, place.index, place.refers) for place in places] == [("memory", 0, [1]), ("memory", 1, [])]
    assert (one.refers, two.refers) == ([0], [1])
    three.lost([INNER])
    (inner,) = three.places([(InputPlace(2, "inline"), [INNER])])
    assert (inner.kind, inner.file, inner.entry) == ("checkpoint", "f", "e1")


def test_what_a_record_says_is_what_the_next_epoch_knows(three: References) -> None:
    assert write(three, OUTER) and write(three, INNER)
    table = three.table(three.all_of(HANDED))
    assert [(one.index, one.refers) for one in table] == [(0, [1]), (1, [])]
    record = records.TaskCommitted("1", 0, 0, records.Inline(b""), "", 0, [], [], table)
    later = References({1: record}, int)
    assert later.to_write([OUTER, INNER]) == {}
    later.made((2, 1), [OUTER], {})
    assert later.all_of((2, 1)) == (OUTER, INNER)
    assert later.table(later.all_of((2, 1))) == table
    assert later.gone((2, 1)) == []


def test_a_late_output_that_refers_to_what_was_given_up(three: References) -> None:
    for which in (MADE, HANDED, PART):
        three.gone(which)
    three.made((3, 0), [OUTER], {})
    assert three.missing((3, 0)) == [OUTER]
    (place,) = three.places([(InputPlace(3, "inline"), three.direct((3, 0)))])
    assert place.kind == "memory"
    assert three.gone((3, 0)) == []


def test_names() -> None:
    one, two = output_id("r", "t", 0), output_id("r", "t", 1)
    ids: list[Any] = [reference_id("r", output, index) for output in (one, two) for index in range(3)]
    assert len({*ids, one, two}) == 8
    assert all(is_of_run(oid, "r") and not is_of_run(oid, "s") for oid in ids)
    assert is_of_run(one, "r") and not is_of_run(one, "s")
