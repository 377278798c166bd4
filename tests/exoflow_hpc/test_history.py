"""Tests of what the records of a journal amount to."""

from __future__ import annotations

from typing import Any

import pytest

import exoflow_hpc as ef
from exoflow_hpc import records
from exoflow_hpc.compile import compile_workflow
from exoflow_hpc.errors import ExoFlowError
from exoflow_hpc.history import committed_tasks, error_of, facts_of, kept_files, last_end, ran_in
from exoflow_hpc.rank.messages import pack_error
from exoflow_hpc.semantics import descendants


@ef.task
def add(a: int, b: int) -> int:
    return a + b


def spec() -> Any:
    left, right = add.options(name="left").bind(1, 2), add.options(name="right").bind(3, 4)
    return compile_workflow(add.options(name="top").bind(add.options(name="middle").bind(left, 0), right))


def committed(task: str, attempt: int = 0, checksum: str = "aa", consumed: Any = ()) -> dict[str, Any]:
    place, meta = records.InCheckpoint("1-0.0-0.h5", task), ["bytes", 8, None, None]
    return records.encode(records.TaskCommitted(task, attempt, 0, place, checksum, 8, meta, list(consumed)))


def voided(task: str, attempt: int = 0, *, lost: bool = False) -> dict[str, Any]:
    return records.encode(records.TaskVoided(task, attempt, "1-0.0-0.h5 is damaged", lost))


STARTED = records.encode(records.WorkflowStarted("host", 1, 0.0))


def test_first_record_of_a_task_counts() -> None:
    known = spec()
    found = committed_tasks(known, [STARTED, committed("left", 1), committed("left", 2)])
    assert {known.tasks[index].name: record.attempt for index, record in found.items()} == {"left": 1}
    assert facts_of(known, [committed("left")]).seen == {}


def test_void_record_counts_as_absent_until_the_next() -> None:
    known = spec()
    left = known.index("left")
    history = [committed("left", checksum="aa"), committed("right"), voided("left")]
    assert committed_tasks(known, history).keys() == {known.index("right")}
    assert facts_of(known, history).seen == {left: "aa"}
    history.append(committed("left", 3, checksum="bb"))
    assert committed_tasks(known, history)[left].attempt == 3
    assert facts_of(known, history).seen == {}


def test_void_of_what_was_never_committed() -> None:
    assert facts_of(spec(), [voided("left")]).seen == {}


def test_what_is_void_since_its_source_is_lost_may_come_out_another_one() -> None:
    """Also if the source is committed anew, and the run ends, before it comes: then nothing else says that it may (campaign, seed 39)."""
    known = spec()
    middle = known.index("middle")
    history = [committed("top", consumed=[["middle", "cc"]])]
    assert facts_of(known, history).seen == {middle: "cc"}
    assert facts_of(known, [*history, voided("top", lost=True)]).seen == {}
    # bytes that are damaged were the right ones once
    assert facts_of(known, [*history, voided("top")]).seen == {middle: "cc", known.index("top"): "aa"}


def test_last_end() -> None:
    failed = records.encode(records.WorkflowFinished("FAILED", "no", pack_error(ExoFlowError("no"))))
    assert last_end([]) is None
    assert last_end([STARTED, failed, STARTED]) is None
    end = last_end([STARTED, failed])
    assert end is not None
    assert end.status == "FAILED"
    assert str(error_of(end)) == "no"


@pytest.mark.parametrize("error", [b"", b"no pickle"])
def test_error_that_cannot_be_rebuilt_has_its_text(error: bytes) -> None:
    assert str(error_of(records.WorkflowFinished("FAILED", "task 'f' raised Odd", error))) == "task 'f' raised Odd"


def test_descendants() -> None:
    known = spec()
    names = {
        name: [known.tasks[i].name for i in descendants(known.tasks, [known.index(name)])]
        for name in ("left", "right", "top")
    }
    assert names == {"left": ["middle", "top"], "right": ["top"], "top": []}


def test_effects_lives_and_what_their_rollbacks_need() -> None:
    known = spec()
    left, top = known.index("left"), known.index("top")
    place = records.InCheckpoint("1-0.0-3.h5", "x").to_wire()
    history = [
        records.encode(records.TaskStarted("left", 0, 0, 1, {}, [[place, ["bytes", 8, None, None], "aa"]])),
        records.encode(records.TaskStarted("top", 1, 0)),
        records.encode(records.TaskStarted("left", 2, 0)),
        committed("left", 2),
        records.encode(records.TaskVoided("left", 2, "lost", lost=True)),
    ]
    facts = facts_of(known, history)
    assert list(facts.effects) == [left, top], "in the order of their first starts"
    assert (facts.effects[left].attempt, facts.results[left].attempt, facts.committed) == (2, 2, {})
    assert facts.attempts == {left: 2, top: 1}
    assert kept_files(history[:1]) == {"1-0.0-3.h5"}
    assert kept_files(history) == {"1-0.0-0.h5"}
    history.append(records.encode(records.RollbackStarted("left", 3)))
    facts = facts_of(known, history)
    assert (facts.rollbacks.keys(), facts.attempts[left]) == ({left}, 3)
    history.append(records.encode(records.TaskRolledBack("left", 1)))
    facts = facts_of(known, history)
    assert (list(facts.effects), facts.results, facts.incarnations) == ([top], {}, {left: 1})
    assert (facts.owed, facts.rollbacks, kept_files(history)) == ({left}, {}, set())
    again = records.encode(records.TaskStarted("left", 4, 1))
    assert facts_of(known, [*history, again]).owed == {left}, "that it was started does not mean that it happened"
    assert facts_of(known, [*history, committed("left", 4)]).owed == set()


def test_a_rollback_is_not_given_what_is_damaged() -> None:
    history = [records.encode(records.TaskStarted("left", 0, 0)), committed("left"), voided("left")]
    assert facts_of(spec(), history).results == {}


def test_what_a_start_has_seen_is_remembered_until_it_is_undone() -> None:
    known = spec()
    left = known.index("left")
    history = [records.encode(records.TaskStarted("top", 0, 0, consumed=[["left", "aa"]]))]
    assert facts_of(known, history).seen == {left: "aa"}
    history.append(records.encode(records.TaskRolledBack("top", 1)))
    assert facts_of(known, history).seen == {}


def test_what_varies_and_is_committed_anew_lets_what_is_computed_from_it_be_another() -> None:
    source = add.options(name="source", deterministic=False).bind(1, 2)
    known = compile_workflow(add.options(name="top").bind(add.options(name="middle").bind(source, 0), 4))
    history = [committed("middle", checksum="aa"), voided("middle")]
    assert facts_of(known, history).seen == {known.index("middle"): "aa"}
    assert facts_of(known, [*history, committed("source")]).seen == {}


def test_what_a_commit_has_seen_is_remembered_until_it_is_committed_itself() -> None:
    known = spec()
    left, top = known.index("left"), known.index("top")
    place = records.Inline(b"x")
    history = [
        records.encode(records.TaskCommitted("top", 0, 0, place, "cc", 1, ["bytes", 1, None, None], [["left", "aa"]]))
    ]
    assert facts_of(known, history).seen == {left: "aa"}
    assert facts_of(known, history).committed.keys() == {top}
    history.append(committed("left"))
    assert facts_of(known, history).seen == {}
    history.append(records.encode(records.TaskDeviated("left", "it was another one")))
    assert facts_of(known, history).deviant == {left}


def test_what_ran_in_a_run_of_several_controllers() -> None:
    def began(time: float, run: str) -> dict[str, Any]:
        return records.encode(records.WorkflowStarted("host", 1, time, run))

    undone = records.encode(records.TaskRolledBack("right", 1))
    history = [
        began(1.0, "before"),
        committed("top"),
        began(5.0, "this"),
        committed("left"),
        began(7.0, "this"),
        records.encode(records.TaskStarted("right", 1, 0)),
        undone,
    ]
    ran = ran_in(history, "this")
    assert (ran.tasks, ran.rolled_back, ran.began) == ({"left", "right"}, 1, 5.0)
    assert ran_in(history, "another").tasks == set()
