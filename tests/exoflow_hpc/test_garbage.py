"""`gc` frees what nobody needs, and nothing else, whatever happens meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import exoflow_hpc as ef
from exoflow_hpc import heartbeat, history, journal, records
from exoflow_hpc.cli.main import main
from exoflow_hpc.errors import ExoFlowError
from exoflow_hpc.garbage import collect
from exoflow_hpc.global_array import TEMPORARY
from exoflow_hpc.settings import Settings
from exoflow_hpc.storage import Storage
from tests.exoflow_hpc.durability import ROOT, run_until_killed
from tests.exoflow_hpc.farstorage.preload import FarHost
from tests.exoflow_hpc.stored import Stored, array, flip

GC = "import sys; from exoflow_hpc import garbage, storage; garbage.collect(storage.Storage(sys.argv[1]), sys.argv[2])"


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    return Stored(tmp_path / "s")


@pytest.fixture
def finished(stored: Stored) -> Stored:
    """a and c in files of their own, b in the journal; c is the output."""
    with stored.open() as held:
        stored.commit(held, a=array(1))
        stored.inline(held, "b", 5)
        stored.commit(held, c=array(3))
        stored.finish(held)
    return stored


def value(stored: Stored, task: str | None = None) -> object:
    return ef.get_output("w", task, stored.storage.path)


def test_files_that_no_record_names(stored: Stored) -> None:
    with stored.open() as held:
        named = stored.commit(held, a=array(1))
        stored.file(1, a=array(2))
        torn = stored.checkpoints / ".tmp-00000001-0.0-000000009.h5"
        torn.write_bytes(b"x" * 1000)
        (stored.checkpoints / "notes.txt").touch()
        assert collect(stored.storage).files == 0, "the epoch may still name them"
    assert collect(stored.storage).files == 0, "and whoever takes over may find that it did"
    with stored.open() as held:
        stored.file(2, b=array(3))
        freed = collect(stored.storage)
        assert (freed.files, freed.nbytes > 17_000) == (2, True)
        assert stored.files() == {named, "00000002-0.0-000000003.h5", "notes.txt"}


def test_epoch_that_was_taken_and_not_sealed(stored: Stored) -> None:
    """A takeover that is at that very moment: what the old controller still commits may be accepted by it."""
    with stored.open() as held:
        where = stored.file(1, a=array(1))["a"]
        (stored.directory / "journal" / "00000002").touch()
        assert collect(stored.storage).files == 0
        with pytest.raises(ExoFlowError):
            stored.name(held, "a", where, ef_meta(array(1)))  # durable, not acknowledged
    with stored.open():
        assert collect(stored.storage).files == 0
    np.testing.assert_array_equal(value(stored, "a"), array(1))  # type: ignore[arg-type]


def ef_meta(what: object) -> object:
    from exoflow_hpc import serialize

    return serialize.pack(what).meta


def test_files_of_which_nothing_counts(stored: Stored) -> None:
    with stored.open() as held:
        void = stored.commit(held, a=array(1))
        mixed = stored.commit(held, a=array(2), b=array(3))
        stored.say(held, records.TaskVoided("a", 0, "it is damaged"))
    with stored.open() as held:
        superseded = stored.commit(held, 1, b=array(3))
        again = stored.commit(held, 1, a=array(2))
        stored.say(held, records.TaskVoided("a", 1, "again"))
        freed = collect(stored.storage)
        assert (freed.files, stored.files()) == (1, {mixed, superseded, again})
        assert void not in stored.files()
    with stored.open():
        collect(stored.storage)
        assert stored.files() == {mixed}
    assert ef.verify("w", storage=stored.storage.path) == []


def test_output_that_was_voided_since_the_seal_is_kept_until_the_next(stored: Stored) -> None:
    with stored.open() as held:
        name = stored.commit(held, a=array(1))
    with stored.open() as held:
        stored.say(held, records.TaskVoided("a", 0, "stale"))
        assert collect(stored.storage).files == 0
    with stored.open():
        assert collect(stored.storage).files == 1
    assert name not in stored.files()


def test_last_epoch_of_a_workflow_that_has_ended(finished: Stored) -> None:
    orphan = finished.file(1, a=array(9))["a"].file
    with heartbeat.Heartbeat(finished.directory / "heartbeat", 1):
        assert collect(finished.storage).files == 0, "somebody is at work"
    assert collect(finished.storage).files == 1
    assert orphan not in finished.files()
    status, past = history.status_of(finished.directory)
    assert (status, past.epoch) == ("SUCCESSFUL", 2)
    assert collect(finished.storage).files == 0
    assert journal.read(finished.directory).epoch == 2, "nothing to free: no epoch is taken"


def test_it_takes_less_room_afterwards(finished: Stored) -> None:
    """The epoch that it takes is a small file: what the journal reserves ahead is given back."""
    finished.file(1, a=array(9))
    before = sum(path.stat().st_blocks for path in finished.directory.rglob("*"))
    assert collect(finished.storage).nbytes > 16_000
    assert sum(path.stat().st_blocks for path in finished.directory.rglob("*")) < before
    assert ef.verify("w", storage=finished.storage.path) == []


def test_workflow_that_is_started_in_that_moment(finished: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its controller has taken an epoch after the collector looked: the collector leaves it alone."""
    finished.file(1, a=array(9))
    begun = []

    def watch(_: Path) -> bool:
        begun.append(finished.open())
        return False

    monkeypatch.setattr(heartbeat, "watch", watch)
    assert collect(finished.storage, "needed").files == 0
    with begun[0] as held:
        finished.commit(held, 1, a=array(1))
    assert len(finished.files()) == 4


def test_retention(finished: Stored, capsys: pytest.CaptureFixture[str]) -> None:
    assert collect(finished.storage).files == 0
    freed = collect(finished.storage, "needed")
    assert (freed.files, freed.expired) == (1, [("w", "a")])
    assert ef.get_status("w", finished.storage.path) == "SUCCESSFUL"
    np.testing.assert_array_equal(value(finished), array(3))  # type: ignore[arg-type]
    assert value(finished, "b") == 5, "what is in the journal stays"
    assert main(["output", "w", "a", "--storage", str(finished.storage.path)]) == 2
    assert "task 'a' of workflow 'w' was removed by retention" in capsys.readouterr().err
    assert ef.verify("w", storage=finished.storage.path) == []
    known = ef.get_metadata("w", "a", storage=finished.storage.path)
    assert (known.location, known.committed, known.tasks) == ("removed by retention", 3, 3)
    past = journal.read(finished.directory).records
    assert history.facts_of(finished.spec, past).seen.keys() == {0}, "made again, it is compared with what it was"
    assert collect(finished.storage, "needed").expired == []


@pytest.mark.parametrize("special", [{"external": True, "idempotent": True}, {"deterministic": False}])
def test_retention_keeps_what_cannot_be_made_again(tmp_path: Path, special: dict[str, bool]) -> None:
    stored = Stored(tmp_path / "s", "ab", special={0: special})
    with stored.open() as held:
        stored.commit(held, a=array(1))
        stored.commit(held, b=array(2))
        stored.finish(held)
    assert collect(stored.storage, "needed").files == 0


@pytest.mark.parametrize("status", ["FAILED", "CANCELED", None])
def test_retention_is_for_workflows_that_have_succeeded(stored: Stored, status: str | None) -> None:
    with stored.open() as held:
        stored.commit(held, a=array(1))
        stored.commit(held, c=array(3))
        if status is not None:
            stored.finish(held, status)
    assert collect(stored.storage, "needed").files == 0


def test_retention_keeps_files_with_something_needed(stored: Stored) -> None:
    with stored.open() as held:
        stored.commit(held, a=array(1))
        stored.commit(held, b=array(2), c=array(3))
        stored.finish(held)
    assert collect(stored.storage, "needed").expired == [("w", "a")]
    np.testing.assert_array_equal(value(stored, "b"), array(2))  # type: ignore[arg-type]


def test_retention_does_not_take_what_a_damaged_output_is_made_of(finished: Stored) -> None:
    flip(finished.checkpoints / "00000001-0.0-000000002.h5", array(3).tobytes()[:8])
    freed = collect(finished.storage, "needed")
    assert freed.files == 0
    assert "checksum" in freed.skipped[0][1]


def test_output_removed_while_it_is_read(finished: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    true = history.load_output

    def load(directory: Path, record: records.TaskCommitted) -> object:
        collect(finished.storage, "needed")
        return true(directory, record)

    monkeypatch.setattr(history, "load_output", load)
    with pytest.raises(ExoFlowError, match="removed by retention"):
        value(finished, "a")


@pytest.mark.parametrize("point", ["gc.expired=kill", "gc.before_unlink=kill", "gc.before_unlink=kill@2"])
def test_kill_at_any_moment_loses_nothing(finished: Stored, point: str) -> None:
    for seed in (7, 8):
        finished.file(1, a=array(seed))
    run_until_killed(GC, finished.storage.path, "needed", fault=point)
    assert ef.verify("w", storage=finished.storage.path) == []
    np.testing.assert_array_equal(value(finished), array(3))  # type: ignore[arg-type]
    with pytest.raises(ExoFlowError, match="removed by retention"):
        value(finished, "a")
    freed = collect(finished.storage, "needed")
    assert freed.files > 0
    assert finished.files() == {"00000001-0.0-000000002.h5"}


@pytest.mark.parametrize("point", ["journal.epoch_created=kill", "journal.before_fsync=kill", "journal.sealed=kill"])
def test_kill_while_it_takes_the_epoch(finished: Stored, point: str) -> None:
    finished.file(1, a=array(7))
    run_until_killed(GC, finished.storage.path, "needed", fault=point)
    np.testing.assert_array_equal(value(finished), array(3))  # type: ignore[arg-type]
    np.testing.assert_array_equal(value(finished, "a"), array(1))  # type: ignore[arg-type]
    assert collect(finished.storage, "needed").expired == [("w", "a")]
    assert finished.files() == {"00000001-0.0-000000002.h5"}


def test_beside_controllers_that_take_over_from_each_other(tmp_path: Path) -> None:
    """Nothing that is committed is ever gone, and what is left of older epochs is."""
    names = [f"t{number}" for number in range(24)]
    stored = Stored(tmp_path / "s", names)  # type: ignore[arg-type]
    stop = threading.Event()
    failures: list[BaseException] = []

    def collect_forever() -> None:
        try:
            while not stop.is_set():
                collect(Storage(stored.storage.path), "needed")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=collect_forever) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        held = stored.open()
        for number, name in enumerate(names):
            stored.file(held.epoch, **{name: array(100 + number)})
            stored.commit(held, **{name: array(number)})
            if number % 4 == 3:
                newer = stored.open()  # before the older one is closed
                held.close()
                held = newer
        held.close()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert ef.verify("w", storage=stored.storage.path) == []
    for number, name in enumerate(names):
        np.testing.assert_array_equal(value(stored, name), array(number))  # type: ignore[arg-type]
    with stored.open():
        collect(stored.storage)
    assert len(stored.files()) == len(names)


def test_damaged_workflow_is_left_as_it_is(finished: Stored, capsys: pytest.CaptureFixture[str]) -> None:
    other = Stored(finished.storage.path, workflow_id="other")
    with other.open():
        other.file(1, a=array(1))
    with other.open():
        pass
    flip(finished.directory / "journal" / "00000001", b"task_committed")
    before = finished.files()
    assert main(["gc", "--json", "--retention", "needed", "--storage", str(finished.storage.path)]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("w: left as it is: ")
    assert json.loads(printed[-1])["files"] == 1
    assert finished.files() == before


def test_command(finished: Stored, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    trash = finished.storage.path / "workflows" / ".trash-0123"
    trash.mkdir()
    (trash / "spec").write_bytes(b"x" * 5000)
    arguments = ["gc", "--storage", str(finished.storage.path)]
    assert main(arguments) == 0
    assert capsys.readouterr().out == "freed 5,000 bytes in 1 files\n"
    assert not trash.exists()
    monkeypatch.setenv("EXOFLOW_RETENTION", "needed")
    assert main([*arguments, "--json"]) == 0
    wire = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (wire["files"], wire["expired"]) == (1, [["w", "a"]])
    monkeypatch.setenv("EXOFLOW_RETENTION", "some")
    assert main(arguments) == 2
    assert "'all' or 'needed'" in capsys.readouterr().err
    monkeypatch.delenv("EXOFLOW_RETENTION")
    assert main(["gc", "--storage", os.path.join(finished.storage.path, "absent")]) == 2


def test_setting() -> None:
    assert Settings().retention == "all"
    with pytest.raises(ValueError, match="retention"):
        Settings(retention="none")


@pytest.mark.parametrize("hours", [-5, 5])
def test_a_wrong_clock_ages_nothing(finished: Stored, far_library: Path, tmp_path: Path, hours: int) -> None:
    """What counts is the clock that gave the files their times."""
    made = finished.checkpoints / f"{TEMPORARY}x"
    left = finished.checkpoints / f"{TEMPORARY}y"
    made.touch()
    left.touch()
    os.utime(left, (0, 0))
    host = FarHost(far_library, finished.storage.path.resolve(), tmp_path / "cache", clock=hours * 3600)
    command = [sys.executable, "-c", GC, str(finished.storage.path), "all"]
    environment = {**os.environ, **host.environment(), "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment, check=True, timeout=60)
    assert made.exists()
    assert not left.exists()
