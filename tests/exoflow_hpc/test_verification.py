"""`verify` names what is damaged, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import exoflow_hpc as ef
from exoflow_hpc import _frames, records, serialize
from exoflow_hpc.checkpoint import Written
from exoflow_hpc.cli.main import main
from exoflow_hpc.verification import Finding, examine
from tests.exoflow_hpc.stored import Stored, flip


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    """Three tasks, committed in two epochs: a in a file, b in the journal, c in a file."""
    made = Stored(tmp_path / "s")
    with made.open() as journal:
        made.commit(journal, a=np.full(700, 0x5A5A5A5A))
        made.inline(journal, "b", "inline output")
    with made.open() as journal:
        made.commit(journal, c=[np.full(700, 0x66666666), "text"])
        made.finish(journal)
    return made


def findings(stored: Stored) -> list[Finding]:
    return ef.verify("w", storage=stored.storage.path)


def test_all_is_well(stored: Stored) -> None:
    before = {path: path.read_bytes() for path in stored.directory.rglob("*") if path.is_file()}
    report = examine(stored.storage, "w")
    assert report.findings == []
    assert report.torn == []
    assert (report.journal_files, report.outputs) == (2, 3)
    assert report.nbytes > 2 * 5600
    assert {path: path.read_bytes() for path in stored.directory.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("task", "byte", "file"), [("a", b"\x5a" * 4, 1), ("c", b"\x66" * 4, 2)])
def test_flipped_byte_in_a_checkpoint(stored: Stored, task: str, byte: bytes, file: int) -> None:
    path = stored.checkpoints / f"{file:08d}-0.0-{file:09d}.h5"
    flip(path, byte)
    (found,) = findings(stored)
    assert (found.task, found.entry, found.file) == (task, task, str(path))
    assert path.name in found.problem
    assert "checksum" in found.problem


def test_every_damage_is_named(stored: Stored) -> None:
    flip(stored.directory / "spec", b"identity")
    (stored.checkpoints / "00000001-0.0-000000001.h5").unlink()
    (stored.checkpoints / "00000002-0.0-000000002.h5").write_bytes(b"")
    found = findings(stored)
    assert [one.task for one in found] == [None, "a", "c"]
    assert "spec" in found[0].problem
    assert "missing" in found[1].problem


def test_journal_files_are_named_each(stored: Stored) -> None:
    with stored.open():
        pass
    for epoch in (1, 2):
        flip(stored.directory / "journal" / f"{epoch:08d}", b"task_committed")
    found = [one for one in findings(stored) if one.task is None]
    assert [Path(one.file).name for one in found] == ["00000002", "00000001"]
    assert "corrupt at offset" in found[0].problem


def test_journal_files_that_are_missing(stored: Stored) -> None:
    with stored.open():
        pass
    for epoch in (1, 3):  # one in the middle; the newest, of which FENCE knows
        (stored.directory / "journal" / f"{epoch:08d}").unlink()
    found = [one for one in findings(stored) if one.task is None]
    assert [Path(one.file).name for one in found] == ["00000003", "00000001"]


def test_seal_that_does_not_hold(stored: Stored) -> None:
    """Valid frames throughout, but not those that were sealed."""
    path = stored.directory / "journal" / "00000001"
    data = path.read_bytes()
    scanned = _frames.scan(1, data)
    one, *_ = scanned.records
    other = _frames.frame(1, 0, [serialize.msgpack.packb({**one, "files": [[9, 9, "", 9]]})])
    path.write_bytes(other + data[len(other) :])
    assert "00000001" in findings(stored)[0].file


def test_inline_output_with_another_checksum(tmp_path: Path) -> None:
    stored = Stored(tmp_path / "s")
    with stored.open() as journal:
        plan = serialize.pack("value")
        place = records.Inline(plan.to_bytes())
        stored.say(journal, records.TaskCommitted("a", 0, 0, place, "0" * 32, plan.nbytes, plan.meta.to_wire()))
    (found,) = findings(stored)
    assert (found.task, found.entry) == ("a", None)
    assert "in the journal" in found.problem


def test_what_does_not_count_is_not_looked_at(stored: Stored) -> None:
    """Void outputs, and outputs that retention has removed."""
    for path in stored.checkpoints.iterdir():
        path.unlink()
    with stored.open() as journal:
        stored.say(journal, records.TaskVoided("a", 0, "gone"))
        stored.say(journal, records.TaskExpired("c", 0))
    assert findings(stored) == []


def test_output_freed_while_it_is_looked_at(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal was read before the output was voided and its file freed: that is no damage."""
    from exoflow_hpc import history

    true = history.check_bytes

    def check(directory: Path, record: records.TaskCommitted) -> None:
        if record.task_id == "a":
            with stored.open() as journal:
                stored.say(journal, records.TaskVoided("a", 0, "not wanted"))
            (stored.checkpoints / "00000001-0.0-000000001.h5").unlink()
        true(directory, record)

    monkeypatch.setattr(history, "check_bytes", check)
    assert findings(stored) == []


def test_while_a_controller_writes(stored: Stored) -> None:
    with stored.open() as journal:
        journal.append({"type": "task_voided", "task_id": "c", "attempt": 0, "message": ""}).result(10)
        stored.commit(journal, 1, c=np.arange(900))
        assert findings(stored) == []
        stored.inline(journal, "b", "a second time")


def test_end_of_a_journal_that_is_no_record_is_only_noted(stored: Stored) -> None:
    path = stored.directory / "journal" / "00000002"
    accepted = _frames.scan(2, path.read_bytes()).accepted
    with path.open("r+b") as file:
        file.seek(accepted)
        file.write(b"half a record")
    report = examine(stored.storage, "w")
    assert report.findings == []
    assert [(tail.file, tail.offset) for tail in report.torn] == [(str(path), accepted)]


def test_command(stored: Stored, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--storage", str(stored.storage.path)]
    assert main(["verify", "w", *arguments]) == 0
    assert "2 journal files and 3 outputs" in capsys.readouterr().out
    assert main(["verify", "other", *arguments]) == 2
    assert "no workflow 'other'" in capsys.readouterr().err
    flip(stored.checkpoints / "00000001-0.0-000000001.h5", b"\x5a" * 4)
    assert main(["verify", "w", "--json", *arguments]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("task a: ")
    assert "entry 'a'" in printed[0]
    wire = json.loads(printed[-1])
    assert (wire["ok"], wire["outputs"], wire["findings"][0]["task"]) == (False, 3, "a")


def test_output_that_is_not_committed_at_all(tmp_path: Path) -> None:
    stored = Stored(tmp_path / "s")
    assert findings(stored) == []
    with stored.open() as journal:
        written: Written = stored.file(journal.epoch, a=1)["a"]
    (stored.checkpoints / written.file).write_bytes(b"never named")
    assert findings(stored) == []
