"""Tests of the agent: what becomes of the memory of attempts that end in each way."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import exoflow_hpc as ef
from exoflow_hpc import checkpoint
from exoflow_hpc.compile import compile_workflow
from exoflow_hpc.errors import StorageError
from exoflow_hpc.rank import agent as agent_module
from exoflow_hpc.rank import messages as ms
from exoflow_hpc.rank.agent import Agent
from exoflow_hpc.rank.loop import Loop
from exoflow_hpc.rank.naming import output_id, reference_id
from exoflow_hpc.rank.shares import Shares
from exoflow_hpc.storage import Storage
from exoflow_hpc.worker.protocol import Put, TaskCancelled, TaskCrashed, TaskDone, TaskFailed, TaskResult
from hoplite_mpi.errors import StoreFullError
from hoplite_mpi.meta import Meta

__all__: list[str] = []

BIG = Meta.of_bytes(1 << 20)
OUTPUT = output_id("run-1", "f", 0)


@ef.task
def f() -> int:
    return 1


class Harness:
    """An agent whose store, arena and workers note what is asked of them; the controller is rank 3."""

    def __init__(self, directory: Path) -> None:
        self.store, self.arena, self.pool = Mock(closed=False, inline_limit=65536), Mock(), Mock()
        #: what is sealed on the node, besides outputs
        self.sealed: set[Any] = set()
        self.arena.delete.side_effect = lambda oid: oid in self.sealed and not self.sealed.remove(oid)
        self.arena.objects.side_effect = lambda: [Mock(oid=oid) for oid in self.sealed]
        self.loop = Loop()
        self.said: list[ms.Message] = []
        self.shares = Shares()
        self.agent = Agent(
            self.store,
            self.arena,
            self.pool,
            2,
            self.shares,
            Mock(),
            self.loop,
            lambda rank, message: self.said.append(message),
        )
        storage = Storage(directory)
        self.directory = str(storage.create("w", compile_workflow(f.bind()).to_bytes()))
        self.begin(1)

    def begin(self, epoch: int) -> None:
        self.agent.handle(3, ms.Begin(epoch, "w", self.directory, f"run-{epoch}"))

    def ends(self, result: TaskResult) -> list[ms.Message]:
        """Let a worker say *result* about the task that was submitted last; return what the agent says then."""
        on_done = self.pool.submit.call_args.args[1]
        self.said.clear()
        on_done(result)
        done: list[bool] = []
        self.loop.post(lambda: done.append(True))
        assert self.loop.run_until(lambda: bool(done), 10)
        return self.said


@pytest.fixture
def harness(tmp_path: Path) -> Any:
    harness = Harness(tmp_path)
    yield harness
    harness.agent.close()


def run(harness: Harness) -> None:
    harness.agent.handle(3, ms.Run(1, 0, 0, 0, False, [], []))
    assert harness.pool.submit.call_args.args[0].output == OUTPUT


def test_output_in_shared_memory_is_adopted(harness: Harness) -> None:
    run(harness)
    assert harness.ends(TaskDone(BIG, 1 << 20, None)) == [ms.Finished(1, 0, 0, BIG.to_wire(), 1 << 20, None, 0.0)]
    harness.arena.adopt.assert_called_once_with(OUTPUT)
    harness.store.adopt.assert_called_once_with(OUTPUT)
    harness.arena.delete.assert_not_called()


@pytest.mark.parametrize("size", [10, 5000])
def test_small_output(harness: Harness, size: int) -> None:
    """Up to 4 KiB it travels to the controller, else it is put into the store."""
    run(harness)
    meta, data = Meta.of_bytes(size), bytes(size)
    (said,) = harness.ends(TaskDone(meta, size, data))
    assert isinstance(said, ms.Finished)
    assert said.data == (data if size == 10 else None)
    assert harness.store.put_bytes.called == (size == 5000)


@pytest.mark.parametrize(
    ("result", "kind"),
    [
        (TaskCrashed("worker pid 1 was killed by SIGKILL"), "crash"),
        (TaskCrashed("worker pid 1 was killed: it took too long", kind="timeout"), "timeout"),
        (TaskCrashed("worker pid 1 was killed: it took too much", kind="memory"), "memory"),
        (TaskCancelled(True), "canceled"),
        (TaskFailed("call", ("builtins.ValueError",), "no", "File flow.py"), "exception"),
    ],
)
def test_sealed_output_of_a_failed_attempt_is_deleted(harness: Harness, result: TaskResult, kind: str) -> None:
    run(harness)
    (said,) = harness.ends(result)
    assert isinstance(said, ms.Failed)
    assert said.kind == kind
    harness.arena.delete.assert_any_call(OUTPUT)


def test_no_room_to_keep_an_output(harness: Harness) -> None:
    run(harness)
    harness.store.adopt.side_effect = StoreFullError("/dev/shm is full")
    (said,) = harness.ends(TaskDone(BIG, 1 << 20, None))
    assert isinstance(said, ms.Failed)
    assert "/dev/shm is full" in said.error[1]
    harness.arena.delete.assert_any_call(OUTPUT)


def test_newer_epoch_stops_what_runs(harness: Harness) -> None:
    run(harness)
    handle = harness.pool.submit.return_value
    harness.begin(2)
    harness.pool.cancel.assert_called_once_with(handle)
    assert harness.ends(TaskDone(BIG, 1 << 20, None)) == []
    harness.arena.delete.assert_any_call(OUTPUT)
    harness.arena.adopt.assert_not_called()


def test_older_epoch_and_other_ranks_are_refused(harness: Harness) -> None:
    harness.begin(2)
    harness.said.clear()
    harness.begin(1)
    harness.agent.handle(3, ms.Run(1, 0, 0, 0, False, [], []))
    harness.agent.handle(4, ms.Run(2, 0, 0, 0, False, [], []))
    assert harness.said == []
    harness.pool.submit.assert_not_called()


def test_workflow_made_anew_begins_with_the_first_epoch_again(harness: Harness) -> None:
    harness.agent.handle(3, ms.End(1, "SUCCESSFUL"))
    assert harness.agent.ended == ms.End(1, "SUCCESSFUL")
    harness.begin(1)
    assert [(type(said), said.epoch) for said in harness.said] == [(ms.Ready, 1), (ms.Over, 1), (ms.Ready, 1)]


def report(harness: Harness, epoch: int, rank: int = 4, run: str = "run-1") -> list[Any]:
    harness.said.clear()
    harness.agent.handle(rank, ms.Survey(epoch, harness.directory, run))
    return harness.said


def begin_kept(harness: Harness, epoch: int, kept: list[list[Any]], rank: int = 4) -> None:
    harness.agent.handle(rank, ms.Begin(epoch, "w", harness.directory, "run-1", 0.0, kept))


def test_what_runs_and_was_made_is_reported_and_goes_on(harness: Harness) -> None:
    """The controller that takes over hears of the end of what it keeps, and the old one is refused from the survey on."""
    run(harness)
    assert report(harness, 2) == [ms.Report(2, 2, [], [["f", 0, []]])]
    harness.agent.handle(3, ms.Run(1, 0, 1, 0, False, [], []))
    assert report(harness, 2) == [ms.Report(2, 2, [], [["f", 0, []]])], "asked again, it answers again"
    begin_kept(harness, 2, [["f", 0]])
    assert [type(said) for said in harness.said] == [ms.Report, ms.Ready]
    harness.pool.cancel.assert_not_called()
    finished = ms.Finished(2, 0, 0, BIG.to_wire(), 1 << 20, None, 0.0)
    assert harness.ends(TaskDone(BIG, 1 << 20, None)) == [finished]
    made = ["f", 0, BIG.to_wire(), 1 << 20, None, []]
    assert report(harness, 3, 5) == [ms.Report(3, 2, [made], [])]
    begin_kept(harness, 3, [], 5)
    assert report(harness, 4, 5) == [ms.Report(4, 2, [], [])], "what does not count is forgotten"


def test_what_does_not_count_is_stopped(harness: Harness) -> None:
    run(harness)
    report(harness, 2)
    begin_kept(harness, 2, [])
    harness.pool.cancel.assert_called_once_with(harness.pool.submit.return_value)
    assert harness.ends(TaskDone(BIG, 1 << 20, None)) == []


def test_what_was_canceled_is_not_reported(harness: Harness) -> None:
    run(harness)
    harness.agent.handle(3, ms.Cancel(1, 0, 0))
    assert report(harness, 2) == [ms.Report(2, 2, [], [])]
    assert harness.ends(TaskCancelled(True)) == []


def test_what_waits_for_a_damaged_input_is_not_reported(harness: Harness) -> None:
    """It would wait for ever: whoever takes over has to find the damage anew."""
    place = ms.InputPlace(0, "checkpoint", 4, file="1-0.0-0.h5", entry="f", checksum="00")
    harness.agent.handle(3, ms.Run(1, 0, 0, 0, False, [], [place]))
    assert harness.loop.run_until(lambda: any(isinstance(said, ms.Corrupt) for said in harness.said), 10)
    assert report(harness, 2) == [ms.Report(2, 2, [], [])]


def test_what_was_given_objects_is_reported_as_of_unknown_lineage(harness: Harness) -> None:
    given = ms.InputPlace(0, "memory", 0, index=0)
    harness.agent.handle(3, ms.Run(1, 0, 0, 0, False, [], [], [given]))
    assert report(harness, 2) == [ms.Report(2, 2, [], [["f", 0, None]])]


def test_a_late_begin_of_the_old_controller_is_refused_after_a_survey(harness: Harness) -> None:
    run(harness)
    report(harness, 9)
    harness.begin(7)
    begin_kept(harness, 9, [["f", 0]])
    harness.pool.cancel.assert_not_called()
    assert harness.ends(TaskDone(BIG, 1 << 20, None)) == [ms.Finished(9, 0, 0, BIG.to_wire(), 1 << 20, None, 0.0)]


def test_a_survey_of_another_run_finds_nothing_and_changes_nothing(harness: Harness) -> None:
    run(harness)
    assert report(harness, 2, run="another") == [ms.Report(2, 2, [], [])]
    assert report(harness, 1) == [], "of the epoch that it is in, from another rank"
    assert harness.ends(TaskDone(BIG, 1 << 20, None)) == [ms.Finished(1, 0, 0, BIG.to_wire(), 1 << 20, None, 0.0)]


def test_what_ends_between_report_and_begin_is_told(harness: Harness) -> None:
    run(harness)
    report(harness, 2)
    assert harness.ends(TaskDone(BIG, 1 << 20, None)) == [], "tasks may have other indices there"
    begin_kept(harness, 2, [["f", 0]])
    assert [type(said) for said in harness.said] == [ms.Ready, ms.Finished]
    assert harness.said[1] == ms.Finished(2, 0, 0, BIG.to_wire(), 1 << 20, None, 0.0)


def test_what_ends_between_report_and_begin_and_does_not_count_is_not_told(harness: Harness) -> None:
    run(harness)
    report(harness, 2)
    harness.ends(TaskDone(BIG, 1 << 20, None))
    begin_kept(harness, 2, [])
    assert [type(said) for said in harness.said] == [ms.Ready]


def test_damaged_checkpoint_is_told(harness: Harness, tmp_path: Path) -> None:
    place = ms.InputPlace(0, "checkpoint", 4, file="1-0.0-0.h5", entry="f", checksum="00")
    harness.said.clear()
    harness.agent.handle(3, ms.Run(1, 0, 0, 0, False, [], [place]))
    assert harness.loop.run_until(lambda: bool(harness.said), 10)
    (said,) = harness.said
    assert isinstance(said, ms.Corrupt)
    assert (said.epoch, said.task, said.attempt) == (1, 0, 4)
    assert "1-0.0-0.h5" in said.text


def test_storage_that_cannot_be_read_is_not_a_failure_of_the_task(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "read", Mock(side_effect=StorageError("stale file handle", 116)))
    place = ms.InputPlace(0, "checkpoint", 4, file="1-0.0-0.h5", entry="f", checksum="00")
    harness.said.clear()
    harness.agent.handle(3, ms.Run(1, 0, 0, 0, False, [], [place]))
    assert harness.loop.run_until(lambda: bool(harness.said), 10)
    (said,) = harness.said
    assert isinstance(said, ms.Failed)
    assert (said.kind, said.error[1]) == ("storage", "stale file handle")


def test_what_waits_long_for_a_worker_is_told_and_returned_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "_LONG_WAIT", 0.0)
    harness = Harness(tmp_path)
    handles = [Mock(has_begun=attempt < 2) for attempt in range(4)]
    harness.pool.submit.side_effect = handles
    harness.pool.withdraw.side_effect = lambda handle: handle is handles[3]  # the third one begins at that moment
    harness.said.clear()
    for attempt in range(4):
        harness.agent.handle(3, ms.Run(1, 0, attempt, 0, False, [], []))
    assert harness.loop.run_until(lambda: bool(harness.said), 10)
    assert harness.said[0] == ms.Shared(1, 0, 1, [[0, 2], [0, 3]])
    harness.said.clear()
    for attempt in (2, 3):
        harness.agent.handle(3, ms.Recall(1, 0, attempt))
    failed = [said for said in harness.said if isinstance(said, ms.Failed)]
    assert [(said.kind, said.attempt) for said in failed] == [("returned", 3)]


def test_the_controller_is_told_what_other_runs_have(harness: Harness) -> None:
    other = harness.shares.join(Mock())
    harness.said.clear()
    other.add(3)
    assert harness.loop.run_until(lambda: bool(harness.said), 10)
    assert harness.said == [ms.Shared(1, 3, 2)]
    harness.begin(2)
    assert [type(said) for said in harness.said[1:]] == [ms.Ready, ms.Shared], "who begins anew does not know"
    harness.said.clear()
    other.leave()
    assert harness.loop.run_until(lambda: bool(harness.said), 10)
    assert harness.said == [ms.Shared(2, 0, 1)]


def test_others_are_told_what_a_run_has(harness: Harness) -> None:
    told = Mock()
    other = harness.shares.join(told)
    run(harness)
    assert told.call_count == 1
    assert other.besides == (1, 2)
    harness.agent.handle(3, ms.End(1, "SUCCESSFUL"))
    harness.agent.retire()
    assert other.besides == (0, 1)


# -- what was put by reference ----------------------------------------------------------------------------------------------------


def put_id(index: int) -> Any:
    return reference_id("run-1", OUTPUT, index)


def test_what_was_put_becomes_this_ranks(harness: Harness) -> None:
    run(harness)
    harness.sealed = {put_id(0), put_id(1)}
    small = Meta.of_bytes(5)
    harness.arena.map.side_effect = lambda oid: Mock(meta=BIG if oid == put_id(0) else small, buffer=b"small")
    done = TaskDone(small, 5, b"12345", 0.0, (("f", 0, 0),), (Put(0, BIG, (("f", 0, 1),)), Put(1, small)))
    (said,) = harness.ends(done)
    assert isinstance(said, ms.Finished)
    assert said.refers == [[0, 0, 0]]
    assert said.puts == [[0, BIG.to_wire(), [[0, 0, 1]]], [1, small.to_wire(), []]]
    harness.store.adopt.assert_called_once_with(put_id(0))
    harness.store.put_bytes.assert_called_once_with(put_id(1), small, b"small")
    assert harness.sealed == {put_id(0)}, "a small one lives in the directory"


@pytest.mark.parametrize("result", [TaskCrashed("worker pid 1 was killed by SIGKILL"), TaskCancelled(True)])
def test_what_a_worker_that_died_had_put_is_deleted(harness: Harness, result: TaskResult) -> None:
    run(harness)
    harness.sealed = {put_id(0), put_id(1), put_id(2)}
    harness.ends(result)
    assert harness.sealed == set()


def test_what_is_left_of_attempts_is_deleted_at_the_end(harness: Harness) -> None:
    """Such as those of a rank of this node that is gone: nobody knows how many there are."""
    other = reference_id("run-0", OUTPUT, 0)
    harness.sealed = {put_id(5), other, OUTPUT}
    harness.agent.handle(3, ms.End(1, "SUCCESSFUL"))
    assert harness.sealed == {other}


def test_lost_reference_is_told(harness: Harness) -> None:
    future: Any = Mock()
    future.cancelled.return_value = False
    future.exception.return_value = StoreFullError("it is gone")
    future.add_done_callback.side_effect = lambda call: call(future)
    harness.store.get_async.return_value = future
    meta = Meta.of_bytes(3)
    given = ms.InputPlace(0, "inline", 0, meta.to_wire(), b"abc", refers=[0])
    harness.said.clear()
    harness.agent.handle(3, ms.Run(1, 0, 0, 0, False, [], [given], [ms.InputPlace(0, "memory", 2, index=1)]))
    assert harness.store.get_async.call_args.args[0] == reference_id("run-1", output_id("run-1", "f", 2), 1)
    assert harness.loop.run_until(lambda: bool(harness.said), 10)
    (said,) = harness.said
    assert isinstance(said, ms.Failed)
    assert (said.kind, said.missing) == ("lost-input", [[0, 2, 1]])
