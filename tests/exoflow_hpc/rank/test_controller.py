"""Tests of the controller between messages of agents and records of a real journal: what comes while a record is on its way."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from exoflow_hpc import heartbeat, journal, records
from exoflow_hpc.expansion import expand
from exoflow_hpc.rank import messages as ms
from exoflow_hpc.rank.controller import Controller
from exoflow_hpc.rank.failure import Failure
from exoflow_hpc.rank.loop import Loop
from exoflow_hpc.rank.outputs import Output
from exoflow_hpc.rank.progress import ProgressLine
from exoflow_hpc.rank.takeover import Found
from exoflow_hpc.rank.tally import Tally
from exoflow_hpc.serialize import checksum, pack, unpack
from exoflow_hpc.succession import Survivor, era_of
from hoplite_mpi.meta import Meta
from hoplite_mpi.protocol.view import Member, View
from tests.exoflow_hpc.journals import make as make_workflow
from tests.exoflow_hpc.semantics.world import make_spec

__all__: list[str] = []

VARIES: dict[str, Any] = {"deterministic": False, "checkpoint": "sync"}
UNDOABLE: dict[str, Any] = {"external": True, "rollback": "r", "checkpoint": "sync", "max_retries": 3}
LARGE = 1 << 20


class Store:
    """Has copies of everything, or of nothing."""

    rank = 0

    def __init__(self) -> None:
        self.lost = False
        self.deleted: list[Any] = []

    def delete(self, oid: Any) -> None:
        self.deleted.append(oid)

    def located(self, ids: Any) -> frozenset[Any]:
        return frozenset() if self.lost else frozenset(ids)

    def is_dead(self, rank: int, incarnation: int) -> bool:
        return True


def view(number: int, *ranks: int) -> View:
    return View(number, {rank: Member(rank, 0, "node", ("h", 1)) for rank in ranks})


class Harness:
    """A controller whose agents say what a test says; each has one worker."""

    def __init__(
        self,
        directory: Path,
        rows: list[dict[str, Any]],
        *ranks: int,
        continued: dict[str, list[Any]] | None = None,
        found: Found | None = None,
        past: Any = (),
    ) -> None:
        if not (directory / "checkpoints").exists():
            make_workflow(directory)
            (directory / "checkpoints").mkdir()
        self.directory = directory
        if past:
            with journal.Journal.open(directory)[0] as before:
                for record in past:
                    before.append(records.encode(record)).result()
        self.journal, history = journal.Journal.open(directory)
        self.sent: list[tuple[int, Any]] = []
        self.loop, self.store, self.ranks = Loop(), Store(), ranks
        self.controller = Controller(
            "w",
            directory,
            expand(make_spec(rows), {task: make_spec(sub) for task, sub in (continued or {}).items()}),
            self.journal,
            history.records,
            self.store,  # type: ignore[arg-type]
            self.loop,
            lambda rank, message: self.sent.append((rank, message)),
            ProgressLine("w", terminal=False, stream=io.StringIO()),
            Tally(),
            10.0,
            found or Found("run"),
        )
        self.controller.start(view(1, *ranks))
        for rank in ranks:
            self.say(rank, ms.Ready(self.epoch, 1, time.monotonic(), heartbeat.identity()))
        self.settle()

    @property
    def epoch(self) -> int:
        return self.journal.epoch

    def say(self, rank: int, message: Any) -> None:
        self.controller.handle(rank, 0, message)

    def settle(self) -> None:
        """Wait until all records are durable, and what follows from that has happened."""
        for _ in range(3):
            self.journal.flush(10.0)
            done: list[bool] = []
            self.loop.post(lambda: done.append(True))
            assert self.loop.run_until(lambda: bool(done), 10.0)

    def until(self, condition: Callable[[], Any]) -> Any:
        found: list[Any] = []
        assert self.loop.run_until(
            lambda: bool(found) or bool(found.append(value) if (value := condition()) else 0), 20
        )
        return found[0]

    def take(self, kind: type[Any]) -> list[tuple[int, Any]]:
        """Return what was sent of that kind since the last time."""
        found = [entry for entry in self.sent if isinstance(entry[1], kind)]
        self.sent.clear()
        return found

    def finished(self, rank: int, run: ms.Run, value: Any, large: bool = False, continued: str = "") -> None:
        packed = pack(value)
        data = None if large else packed.to_bytes()
        nbytes = LARGE if large else packed.nbytes
        meta = packed.meta.to_wire()
        said = ms.Finished(self.epoch, run.task, run.attempt, meta, nbytes, data, 0.1, continued=continued)
        self.say(rank, said)

    def written(self, rank: int, task: int, attempt: int, value: Any) -> None:
        meta = pack(value).meta.to_wire()
        self.say(rank, ms.Written(self.epoch, task, attempt, "1-0.0-0.h5", "x", f"sum of {value}", LARGE, meta))

    def commits(self) -> list[dict[str, Any]]:
        return [record for record in journal.read(self.directory).records if record["type"] == "task_committed"]

    def lose(self, rank: int) -> None:
        self.controller.on_view(view(2, *(other for other in self.ranks if other != rank)), ())


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Callable[..., Harness]]:
    made: list[Harness] = []

    def make(rows: list[dict[str, Any]], *ranks: int, **options: Any) -> Harness:
        made.append(Harness(tmp_path, rows, *ranks, **options))
        return made[-1]

    yield make
    for one in made:
        one.journal.close()


def test_the_attempt_after_one_whose_commit_was_given_up_counts(harness: Callable[..., Harness]) -> None:
    one = harness([VARIES, {"data": (0,)}], 0)
    ((rank, run),) = one.take(ms.Run)
    one.finished(rank, run, 1, large=True)
    one.settle()
    assert [message.attempt for _, message in one.take(ms.Write)] == [0]
    one.say(rank, ms.WriteFailed(one.epoch, 0, 0, "its bytes are gone", 0, lost=True))
    one.settle()
    ((rank, run),) = one.take(ms.Run)
    assert run.attempt == 1
    one.finished(rank, run, 2, large=True)
    one.settle()
    one.take(ms.Write)
    one.written(rank, 0, 1, 2)
    one.settle()
    assert [message.task for _, message in one.take(ms.Run)] == [1]


def test_a_rank_is_lost_between_the_end_of_a_rollback_and_its_record(harness: Callable[..., Harness]) -> None:
    one = harness([UNDOABLE], 0, 1)
    ((rank, run),) = one.take(ms.Run)
    failure = Failure("crash", "it died").to_wire()
    one.say(rank, ms.Failed(one.epoch, 0, run.attempt, "crash", failure, False, []))
    ((rank, run),) = one.until(lambda: one.take(ms.Run))
    assert run.rollback
    one.finished(rank, run, None)
    one.lose(rank)
    ((other, run),) = one.until(lambda: one.take(ms.Run))
    assert (other != rank, run.rollback, run.incarnation) == (True, False, 1)
    kinds = [record["type"] for record in journal.read(one.directory).records]
    assert kinds.count("task_rolled_back") == 1


def test_another_consumer_of_what_is_damaged_comes_before_the_record_of_that(harness: Callable[..., Harness]) -> None:
    one = harness([{"checkpoint": "sync"}, {"data": (0,)}, {"data": (0,)}, {"data": (1, 2)}], 0)
    ((rank, run),) = one.take(ms.Run)
    one.finished(rank, run, 1, large=True)
    one.written(rank, 0, 0, 1)
    one.settle()
    one.store.lost = True
    one.controller._find_lost_outputs()
    ((rank, run),) = one.take(ms.Run)
    one.say(rank, ms.Corrupt(one.epoch, 0, 0, "1-0.0-0.h5 is damaged"))
    failure = Failure("lost-input", "it is damaged").to_wire()
    one.say(rank, ms.Failed(one.epoch, run.task, run.attempt, "lost-input", failure, False, []))
    one.settle()
    assert one.controller.must_begin_again
    assert [record["type"] for record in journal.read(one.directory).records][-1] == "task_voided"


def test_an_attempt_that_is_taken_back_before_the_record_of_its_start_is_sent_nowhere(
    harness: Callable[..., Harness],
) -> None:
    one = harness([{**VARIES, "checkpoint": "skip"}, {"data": (0,), **UNDOABLE}, {"data": (0, 1)}], 0)
    ((rank, run),) = one.take(ms.Run)
    one.finished(rank, run, 1)
    one.controller.cancel()  # the record of the start of 1 is on its way
    one.settle()
    assert one.take(ms.Run) == []
    one.until(lambda: one.controller.outcome)


# -- references (R7) ------------------------------------------------------------------------------------------------------------------

#: 0 puts an object, 1 and 2 hand it on, 3 reads both
SKIPPED: dict[str, Any] = {"checkpoint": "skip"}
HANDED_ON = [SKIPPED, {"data": (0,), "checkpoint": "sync"}, {"data": (0,), **SKIPPED}, {"data": (1, 2)}]


def refers(one: Harness, rank: int, run: ms.Run, puts: bool = False) -> None:
    """An attempt ends with a small output that refers to the object of task 0."""
    packed = pack("small")
    made = [[0, ["bytes", LARGE, None, []], []]] if puts else []
    message = ms.Finished(
        one.epoch,
        run.task,
        run.attempt,
        packed.meta.to_wire(),
        packed.nbytes,
        packed.to_bytes(),
        0.1,
        [[0, 0, 0]],
        made,
    )
    one.say(rank, message)


def object_written(one: Harness, rank: int) -> None:
    one.say(rank, ms.Written(one.epoch, 0, 0, "1-0.0-0.h5", "put", "sum", LARGE, ["bytes", LARGE, None, []], 0))


def handed_on(harness: Callable[..., Harness], *ranks: int) -> Harness:
    """Return a controller after 1, whose commit waits for the object, and 2."""
    one = harness(HANDED_ON, *ranks)
    ((rank, run),) = one.take(ms.Run)
    refers(one, rank, run, puts=True)
    sent = one.until(lambda: [entry for entry in one.sent if isinstance(entry[1], ms.Run)])
    one.sent.clear()
    for rank, run in sent:
        (place,) = run.references
        assert (place.kind, place.task, place.attempt, place.index) == ("memory", 0, 0, 0)
        refers(one, rank, run)
    return one


def test_a_commit_waits_for_the_bytes_of_what_is_handed_on(harness: Callable[..., Harness]) -> None:
    one = handed_on(harness, 0, 1)
    one.settle()
    writes = [(rank, message.task, message.index) for rank, message in one.sent if isinstance(message, ms.Write)]
    assert writes == [(0, 0, 0)], "where it was put"
    assert one.commits() == []
    object_written(one, 0)
    one.settle()
    assert [record["task_id"] for record in one.commits()] == ["t1"]
    assert [wire[:5] for wire in one.commits()[0]["references"]] == [["t0", 0, 0, "1-0.0-0.h5", "put"]]


def test_what_is_written_for_one_output_is_not_written_for_another(harness: Callable[..., Harness]) -> None:
    one = handed_on(harness, 0, 1)
    object_written(one, 0)
    one.settle()
    ((rank, run),) = one.take(ms.Run)
    assert run.task == 3
    refers(one, rank, run)
    one.settle()
    assert one.take(ms.Write) == []
    assert one.commits()[0]["references"] == one.commits()[1]["references"]


def test_an_object_that_is_lost_before_it_is_written(harness: Callable[..., Harness]) -> None:
    """All that holds it is made again, the commit that waited for it included."""
    one = handed_on(harness, 0, 1)
    one.settle()
    one.take(ms.Run)
    one.say(0, ms.WriteFailed(one.epoch, 0, 0, "its bytes are gone", 0, True, 0))
    ((_, run),) = one.until(lambda: one.take(ms.Run))
    assert (run.task, run.attempt) == (0, 1)
    object_written(one, 0)  # late
    one.settle()
    assert one.commits() == []


def test_a_reader_that_finds_an_object_lost(harness: Callable[..., Harness]) -> None:
    """Once it is durable, it is read from its checkpoint the next time, and nothing else runs again."""
    one = handed_on(harness, 0, 1)
    object_written(one, 0)
    one.settle()
    ((rank, run),) = one.take(ms.Run)
    failure = Failure("lost-input", "no copy is left").to_wire()
    one.say(rank, ms.Failed(one.epoch, 3, run.attempt, "lost-input", failure, False, [[0, 0, 0]]))
    ((rank, run),) = one.until(lambda: one.take(ms.Run))
    assert (run.task, run.references[0].kind, run.references[0].file) == (3, "checkpoint", "1-0.0-0.h5")


def test_a_damaged_object_voids_all_that_refer_to_it(harness: Callable[..., Harness]) -> None:
    one = handed_on(harness, 0, 1)
    object_written(one, 0)
    one.settle()
    one.say(0, ms.Corrupt(one.epoch, 0, 0, "1-0.0-0.h5 is damaged", 0))
    one.say(1, ms.Corrupt(one.epoch, 0, 0, "1-0.0-0.h5 is damaged", 0))
    one.settle()
    assert one.controller.must_begin_again
    voided = [r["task_id"] for r in journal.read(one.directory).records if r["type"] == "task_voided"]
    assert voided == ["t1"]


def test_what_nobody_refers_to_any_more_is_deleted(harness: Callable[..., Harness]) -> None:
    one = handed_on(harness, 0, 1)
    object_written(one, 0)
    one.settle()
    ((rank, run),) = one.take(ms.Run)
    oid = one.controller._id(0, 0, 0)
    assert oid not in one.store.deleted
    one.finished(rank, run, "the end")
    one.settle()
    assert oid in one.store.deleted


def test_a_task_that_continues(harness: Callable[..., Harness]) -> None:
    """Nobody is given its output; once that is committed, whatever the options say, the next epoch begins, with all as it is."""
    one = harness([{}, {"data": (0,)}, {"after": (0,), "data": ()}, {"data": (1, 2)}], 0)
    ((rank, run),) = one.take(ms.Run)
    one.finished(rank, run, b"a spec", continued="fingerprint")
    assert one.take(ms.Run) == []
    one.settle()
    assert [record["continued"] for record in one.commits()] == ["fingerprint"]
    assert one.controller.must_begin_again
    assert one.controller.goes_on
    assert one.take(ms.Run) == []
    assert one.store.deleted == []


def test_what_continues_is_the_same_by_its_fingerprint(harness: Callable[..., Harness]) -> None:
    """Another pickle of it is no deviation, another DAG is (R12)."""
    for continued, deviates in (("one", False), ("other", True)):
        one = harness([{"checkpoint": "sync"}], 0)
        ((rank, run),) = one.take(ms.Run)
        one.finished(rank, run, b"a spec", large=True, continued="one")
        one.settle()
        one.say(rank, ms.WriteFailed(one.epoch, 0, run.attempt, "its bytes are gone", 0, lost=True))
        one.settle()
        ((rank, run),) = one.take(ms.Run)
        one.finished(rank, run, b"another", large=True, continued=continued)
        one.settle()
        assert one.controller.must_begin_again == deviates
        one.journal.close()


def test_what_had_continued_and_returns_a_value(harness: Callable[..., Harness]) -> None:
    """The workflow has fewer tasks then: what was to come after it does not."""
    one = harness([VARIES, {"data": (0,)}], 0, continued={"t0": [{}]})
    ((rank, run),) = one.take(ms.Run)
    assert run.task == 0
    one.finished(rank, run, 1)
    one.settle()
    assert one.take(ms.Run) == []
    assert ["continued" in record for record in one.commits()] == [False]
    assert one.controller.goes_on


def test_tasks_of_a_continuation_are_given_nothing_of_it(harness: Callable[..., Harness]) -> None:
    one = harness([{}], 0)
    ((rank, run),) = one.take(ms.Run)
    one.finished(rank, run, b"a spec", continued="fingerprint")
    one.settle()
    one.journal.close()
    other = harness([{}], 0, continued={"t0": [{}]})
    ((_, run),) = other.take(ms.Run)
    (place,) = run.inputs
    assert (run.task, place.kind) == (1, "inline")
    assert unpack(Meta.from_wire(place.meta or []), place.data) is None


def test_a_run_that_ends_is_not_begun_again_for_a_continuation(harness: Callable[..., Harness]) -> None:
    one = harness([{}, {"data": (0,)}], 0)
    ((rank, run),) = one.take(ms.Run)
    one.finished(rank, run, b"a spec", large=True, continued="fingerprint")
    one.settle()
    one.controller.cancel()
    one.written(rank, 0, run.attempt, 1)
    one.settle()  # the commit, and then the end
    one.settle()
    assert one.controller.outcome is not None
    assert one.controller.outcome.status == "CANCELED"
    assert not one.controller.must_begin_again
    assert len(one.commits()) == 1


# -- what another controller has left


def left(*ranks: int, running: Any = (), outputs: Any = ()) -> Found:
    """Return what is found: running: (task, attempt, rank); outputs: (task, attempt, rank, value)."""
    found = Found("run", dict.fromkeys(ranks, (0, 1)))
    for task, attempt, rank in running:
        found.survivors[task] = Survivor(task, attempt, rank, True, frozenset())
    for task, attempt, rank, value in outputs:
        packed = pack(value)
        data = packed.to_bytes()
        found.survivors[task] = Survivor(task, attempt, rank, False, frozenset())
        found.outputs[task] = Output(attempt, packed.meta, data, rank, checksum(packed.meta, data))
    return found


def test_what_is_found_is_used_and_goes_on(harness: Callable[..., Harness]) -> None:
    found = left(0, 1, outputs=[(0, 3, 1, "made")], running=[(1, 5, 1)])
    one = harness([VARIES, {}, {"data": (0, 1)}], 0, 1, found=found)
    begins = [(rank, message.kept) for rank, message in one.sent if isinstance(message, ms.Begin)]
    assert begins == [(0, [["t1", 5], ["t0", 3]]), (1, [["t1", 5], ["t0", 3]])]
    packed = pack("it goes on")
    one.say(1, ms.Finished(one.epoch, 1, 5, packed.meta.to_wire(), packed.nbytes, packed.to_bytes(), 0.1))
    one.settle()
    ((_, run),) = one.take(ms.Run)
    assert (run.task, run.attempt) == (2, era_of(1))
    assert [(place.task, place.attempt) for place in run.inputs] == [(0, 3), (1, 5)]
    assert run.stand == [["t0", 3, True]], "it was committed first"


def test_what_is_found_and_is_not_what_was_seen_deviates(harness: Callable[..., Harness]) -> None:
    """A consumer was committed with another output of a task that is taken to be deterministic."""
    seen = records.TaskCommitted("t1", 0, 0, records.Inline(b""), "aa", 0, ["bytes", 0, None, None], [["t0", "bb"]])
    found = left(0, outputs=[(0, 3, 0, "another")])
    one = harness([{}, {"data": (0,)}, {"data": (0, 1)}], 0, found=found, past=[seen])
    one.until(lambda: one.controller.must_begin_again)
    assert [record["type"] for record in journal.read(one.directory).records][-1] == "task_deviated"
