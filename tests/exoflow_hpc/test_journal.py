from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exoflow_hpc import _epochs, _frames, journal, records
from exoflow_hpc.errors import (
    CorruptJournalError,
    ExoFlowError,
    FencedError,
    JournalBrokenError,
    StorageError,
    UnknownRecordError,
)
from exoflow_hpc.journal import Journal
from hoplite_mpi.testing import fault
from tests.exoflow_hpc.journals import make, numbers, rec, strip, write_epoch


@pytest.fixture
def workflow(tmp_path: Path) -> Path:
    return make(tmp_path / "w")


def test_epochs_follow_each_other(workflow: Path) -> None:
    for epoch in range(1, 5):
        opened, history = Journal.open(workflow)
        assert opened.epoch == history.epoch == epoch
        assert [r["n"] for r in history.records] == list(range(epoch - 1))
        with opened:
            opened.append(rec(epoch - 1)).result(10)
    assert numbers(workflow) == [0, 1, 2, 3]
    assert journal.read(workflow).torn == []


def test_empty_journal_reads_as_nothing(workflow: Path) -> None:
    assert journal.read(workflow).records == []
    assert journal.read(workflow).epoch == 0


def test_many_appends_few_fsyncs(workflow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, _ = Journal.open(workflow)
    synced: list[int] = []
    hold = threading.Event()
    real = os.fdatasync

    def slow(fd: int) -> None:
        hold.wait(10)
        synced.append(fd)
        real(fd)

    monkeypatch.setattr(os, "fdatasync", slow)
    futures = [opened.append(rec(n)) for n in range(200)]
    assert not any(future.done() for future in futures)  # nothing is acknowledged before its fsync
    hold.set()
    opened.flush(10)
    assert all(future.done() for future in futures)
    assert 1 <= len(synced) <= 3
    opened.close()
    assert numbers(workflow) == list(range(200))


def test_record_is_as_it_was_when_appended(workflow: Path) -> None:
    opened, _ = Journal.open(workflow)
    record = rec(1)
    future = opened.append(record)
    record["n"] = 2
    future.result(10)
    opened.close()
    assert numbers(workflow) == [1]
    with pytest.raises(ExoFlowError, match="closed"):
        opened.append(record)


def test_append_of_what_cant_be_packed(workflow: Path) -> None:
    with Journal.open(workflow)[0] as opened:
        with pytest.raises(TypeError):
            opened.append({"type": "r", "bad": object()})
        opened.append(rec(1)).result(10)


def test_every_truncation_gives_a_prefix(workflow: Path, tmp_path: Path) -> None:
    write_epoch(workflow, *range(12))
    data = strip(workflow)
    path = workflow / "journal" / "00000001"
    seen = set()
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        got = numbers(workflow)
        assert got == list(range(len(got)))
        seen.add(len(got))
        path.write_bytes(data[:size] + bytes(1000))  # as a preallocated file looks after a power cut
        padded = numbers(workflow)
        assert padded == list(range(len(padded)))
        assert len(padded) >= len(got)
    assert seen == set(range(13))


def test_every_flip_before_the_last_record_is_detected(workflow: Path) -> None:
    write_epoch(workflow, *range(4))
    data = strip(workflow)
    last = len(data) - len(_frames.frame(1, 0, [journal.msgpack.packb(rec(3))]))
    path = workflow / "journal" / "00000001"
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
        if place < last:
            with pytest.raises(CorruptJournalError, match="00000001 is corrupt at offset"):
                journal.read(workflow)
            with pytest.raises(CorruptJournalError, match="00000001"):
                Journal.open(workflow)
            for later in sorted((workflow / "journal").iterdir())[1:]:
                later.unlink()
            os.truncate(workflow / "FENCE", 0)
        else:  # can't be told from a torn tail
            history = journal.read(workflow)
            assert [r["n"] for r in history.records] == [0, 1, 2]
            assert [(t.file, t.offset) for t in history.torn] == [(str(path), last)]


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=6), st.data())
def test_scan_any_damage_gives_a_prefix_or_is_noticed(payloads: list[bytes], data: st.DataObject) -> None:
    whole = b""
    for payload in payloads:
        whole += _frames.frame(7, len(whole), [journal.msgpack.packb({"p": payload})])
    start = data.draw(st.integers(0, len(whole)))
    junk = data.draw(st.binary(max_size=30))
    damaged = whole[:start] + junk + whole[start + len(junk) :]
    found = _frames.scan(7, damaged)
    got = [r["p"] for r in found.records]
    assert got == payloads[: len(got)]
    if len(got) < len(payloads) and found.valid_after is None:
        # nothing whole may come after what is called a torn tail
        assert found.torn or not damaged[found.accepted :].strip(b"\0")


def test_frames_of_another_epoch_or_place_are_not_valid() -> None:
    one = _frames.frame(1, 0, [b"\x01"])
    assert _frames.scan(1, one).accepted == len(one)
    assert _frames.scan(2, one).accepted == 0
    assert _frames.scan(1, one + one).accepted == len(one)


def test_flip_in_a_sealed_file_is_detected_even_in_its_last_record(workflow: Path) -> None:
    write_epoch(workflow, 0, 1)
    write_epoch(workflow, 2)
    path = workflow / "journal" / "00000001"
    data = strip(workflow)
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(CorruptJournalError, match="00000001"):
            journal.read(workflow)
    path.write_bytes(data[:-1])
    with pytest.raises(CorruptJournalError, match="00000001"):
        journal.read(workflow)
    path.unlink()
    with pytest.raises(CorruptJournalError, match="00000001 is missing"):
        journal.read(workflow)


def test_torn_tail_stays_dropped_when_it_becomes_whole(workflow: Path) -> None:
    write_epoch(workflow, 0, 1)
    path = workflow / "journal" / "00000001"
    data = strip(workflow)
    path.write_bytes(data[:-1])
    write_epoch(workflow, 2)
    path.write_bytes(data)
    assert numbers(workflow) == [0, 2]


def test_taken_over_epoch_acknowledges_nothing_more(workflow: Path) -> None:
    first, _ = Journal.open(workflow)
    first.append(rec(0)).result(10)
    second, history = Journal.open(workflow)
    assert [r["n"] for r in history.records] == [0]
    future = first.append(rec(1))
    with pytest.raises(FencedError, match=r"epoch 2.*from epoch 1"):
        future.result(10)
    with pytest.raises(FencedError):
        first.append(rec(2))
    with pytest.raises(FencedError):
        first.flush(10)
    with pytest.raises(FencedError):
        first.check()
    second.append(rec(3)).result(10)
    first.close()
    second.close()
    assert numbers(workflow) == [0, 3]


def test_check_sees_a_takeover_without_a_write(workflow: Path) -> None:
    first, _ = Journal.open(workflow)
    first.check()
    Journal.open(workflow)[0].close()
    with pytest.raises(FencedError):
        first.check()
    with pytest.raises(FencedError):
        first.append(rec(0))
    first.close()


def test_fence_file_alone_and_epoch_file_alone_are_each_enough(workflow: Path) -> None:
    first, _ = Journal.open(workflow)
    _epochs.announce(workflow / "FENCE", 7)
    with pytest.raises(FencedError):
        first.append(rec(0)).result(10)
    first.close()
    other = make(workflow.parent / "other")
    second, _ = Journal.open(other)
    (other / "journal" / "00000002").touch()
    with pytest.raises(FencedError):
        second.append(rec(0)).result(10)
    second.close()


def test_each_epoch_has_its_place_in_the_fence(workflow: Path) -> None:
    """One that was stopped before it said that it is there changes nothing that later ones have said."""
    fence = workflow / "FENCE"
    assert _epochs.newest_announced(fence, 0) == 0
    for epoch in (1, 3, 2):
        _epochs.announce(fence, epoch)
    assert [_epochs.newest_announced(fence, after) for after in (0, 1, 2, 3)] == [3, 3, 3, 3]
    assert fence.read_bytes().replace(b"\0", b"") == b"1\n2\n3\n"
    assert fence.stat().st_size == 4 * 4096


def test_without_a_fence_nobody_knows_what_there_is(workflow: Path) -> None:
    write_epoch(workflow, 0)
    (workflow / "FENCE").unlink()
    for use in (journal.read, journal.inspect, Journal.open):
        with pytest.raises(StorageError, match="FENCE, which says what epochs there are, is missing"):
            use(workflow)
    (workflow / "FENCE").touch()
    assert numbers(workflow) == [0]


def show_listing(patch: pytest.MonkeyPatch, *names: str) -> None:
    """Show that listing to whoever looks for epochs."""
    patch.setattr(_epochs.os, "listdir", lambda path: list(names))


@pytest.mark.parametrize("names", [(), ("00000001",), ("00000001", "00000003")])
def test_old_listings_hide_nothing(workflow: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]) -> None:
    for number in range(3):
        write_epoch(workflow, number)
    with monkeypatch.context() as patch:
        show_listing(patch, *names)
        assert numbers(workflow) == [0, 1, 2]
        assert journal.inspect(workflow)[1] == []
        with pytest.raises(FencedError, match="epoch 3"):
            Journal.open(workflow, after=2)
        opened, history = Journal.open(workflow)
        assert (opened.epoch, [r["n"] for r in history.records]) == (4, [0, 1, 2])
        opened.close()
    assert numbers(workflow) == [0, 1, 2]


def test_an_epoch_that_is_not_seen_is_not_read_past(workflow: Path) -> None:
    """Its file may say that less of the others exists: neither what is shown without it, nor more, is committed."""
    write_epoch(workflow, 0)
    write_epoch(workflow, 1)
    newest = workflow / "journal" / "00000002"
    newest.rename(workflow / "elsewhere")
    with pytest.raises(StorageError, match=r"00000002 was begun and is not there: .*try again in a minute"):
        journal.read(workflow)
    with pytest.raises(StorageError, match="00000002 was begun and is not there"):
        Journal.open(workflow)
    assert os.listdir(workflow / "journal") == ["00000001"], "nobody was fenced"
    (workflow / "elsewhere").rename(newest)
    assert numbers(workflow) == [0, 1]


def test_an_epoch_that_begins_while_others_are_read(workflow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has sealed less than was read first, and only FENCE shows that it is there."""
    first, _ = Journal.open(workflow)
    first.append(rec(0)).result(10)
    real = journal._read_file
    more = False

    def read(path: Path, durably: bool) -> bytes:
        nonlocal more
        data = real(path, durably)
        if path == first.path and not more:
            more = True
            write_epoch(workflow, 1)
            with pytest.raises(FencedError):  # written all the same, and not there
                first.append(rec(9)).result(10)
        return data

    monkeypatch.setattr(journal, "_read_file", read)
    show_listing(monkeypatch, "00000001")
    assert numbers(workflow) == [0, 1]
    first.close()


@pytest.mark.parametrize("again", [False, True])
def test_deleted_workflow_fences(workflow: Path, again: bool) -> None:
    first, _ = Journal.open(workflow)
    shutil.rmtree(workflow)
    if again:
        Journal.open(make(workflow))[0].close()
    with pytest.raises(FencedError, match="deleted"):
        first.append(rec(0)).result(10)
    first.close()


def test_racing_controllers_get_epochs_of_their_own(workflow: Path) -> None:
    opened: list[Journal] = []
    fenced: list[FencedError] = []
    barrier = threading.Barrier(5)

    def race() -> None:
        barrier.wait()
        try:
            opened.append(Journal.open(workflow)[0])
        except FencedError as error:
            fenced.append(error)

    threads = [threading.Thread(target=race) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    epochs = sorted(one.epoch for one in opened)
    assert len(opened) + len(fenced) == 5
    assert len(set(epochs)) == len(epochs)
    assert epochs[-1] == 5
    committed = []
    for one in sorted(opened, key=lambda j: j.epoch):
        try:
            one.append(rec(one.epoch)).result(10)
            committed.append(one.epoch)
        except FencedError:
            pass
        one.close()
    assert committed == [5]
    assert numbers(workflow) == [5]


def test_failed_fsync_breaks_the_epoch_for_good(workflow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, _ = Journal.open(workflow)
    opened.append(rec(0)).result(10)

    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(JournalBrokenError, match=r"00000001.*I/O error"):
            opened.append(rec(1)).result(10)
    with pytest.raises(JournalBrokenError):  # the disk is well again: still nothing
        opened.append(rec(2))
    opened.close()
    write_epoch(workflow, 3)
    assert numbers(workflow)[0] == 0
    assert numbers(workflow)[-1] == 3
    assert 2 not in numbers(workflow)


def test_fault_in_the_committer_leaves_nobody_waiting(workflow: Path) -> None:
    opened, _ = Journal.open(workflow)
    fault.enable("journal.before_fsync=raise")
    try:
        with pytest.raises(JournalBrokenError, match="FaultInjected"):
            opened.append(rec(1)).result(10)
    finally:
        fault.disable()
    with pytest.raises(JournalBrokenError):
        opened.flush(10)
    opened.close()


def test_close_commits_what_was_appended(workflow: Path) -> None:
    opened, _ = Journal.open(workflow)
    futures = [opened.append(rec(n)) for n in range(100)]
    opened.close()
    assert all(f.exception(0) is None for f in futures)
    assert numbers(workflow) == list(range(100))


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="journal"):
        Journal.open(tmp_path / "absent")
    with pytest.raises(StorageError, match="journal"):
        journal.read(tmp_path / "absent")


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(cuts=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 60)), min_size=1, max_size=4))
def test_what_one_epoch_read_every_later_one_reads(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[tuple[int, int]]
) -> None:
    """Power cuts that take the end of the newest file: each epoch sees the one before's view, and what that added."""
    workflow = make(tmp_path_factory.mktemp("j") / "w")
    seen: list[int] = []
    number = 0
    for count, cut in cuts:
        opened, history = Journal.open(workflow)
        got = [r["n"] for r in history.records]
        assert got[: len(seen)] == seen
        with opened:
            for following in range(number, number + count):
                opened.append(rec(following)).result(10)
        seen = got
        data = strip(workflow, opened.epoch)
        seal = len(_frames.frame(1, 0, [b""])) + 60
        os.truncate(opened.path, max(min(seal, len(data)), len(data) - cut))
        number += count


RECORDS = [
    records.WorkflowStarted("host", 3, 1.5),
    records.TaskStarted("t", 0, 1, 2),
    records.TaskCommitted("t", 0, 1, records.Inline(b"abc"), "00ff", 3, ["bytes", 3, None, []]),
    records.TaskCommitted("t", 0, 1, records.InCheckpoint("f.h5", "e"), "00ff", 3, ["ndarray", 8, "<f8", [1]]),
    records.TaskFailed("t", 3, 0, "bad", b"p"),
    records.WorkflowFinished("FAILED", "why", b""),
]


@pytest.mark.parametrize("record", RECORDS)
def test_records_through_the_journal(workflow: Path, record: records.Record) -> None:
    with Journal.open(workflow)[0] as opened:
        opened.append(records.encode(record)).result(10)
    assert [records.decode(r) for r in journal.read(workflow).records] == [record]


@pytest.mark.parametrize("wire", [{"type": "teleported"}, {}, {"type": "task_started", "task_id": "t", "wings": 2}])
def test_records_of_a_newer_version(wire: dict[str, Any]) -> None:
    with pytest.raises(UnknownRecordError, match=r"newer|other fields"):
        records.decode(wire)
