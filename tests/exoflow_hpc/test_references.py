"""Tests of references where no rank is needed: what they are part of, and how they are read from a storage."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import exoflow_hpc as ef
from exoflow_hpc import garbage, history, records, serialize, verification
from exoflow_hpc.compile import compile_workflow
from exoflow_hpc.journal import read
from exoflow_hpc.records import Reference, seen_as
from exoflow_hpc.references import Ref, StoredObjects, collecting, resolving

from .stored import Stored, flip

__all__: list[str] = []


class Objects:
    """Where objects are, without any."""

    is_open = True

    def value(self, ref: Ref) -> Any:
        return ref.key


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    return Stored(tmp_path)


def commit(stored: Stored, journal: Any, epoch: int, task: str, value: Any, **puts: Any) -> None:
    """Commit a task whose output is [ref, ...] to *puts*, of which each refers to the next one."""
    written = stored.file(epoch, **puts)
    names = list(puts)
    references = [
        Reference(
            task,
            0,
            index,
            records.InCheckpoint(written[name].file, written[name].entry),
            written[name].checksum,
            written[name].nbytes,
            serialize.pack(puts[name]).meta.to_wire(),
            [],
        )
        for index, name in enumerate(names)
    ]
    objects = Objects()
    with collecting(objects):
        plan = serialize.pack([value, *(Ref((task, 0, index), objects) for index in range(len(names)))])
    place = records.Inline(plan.to_bytes())
    checksum = serialize.checksum(plan.meta, place.data)
    meta = plan.meta.to_wire()
    stored.say(journal, records.TaskCommitted(task, 0, 0, place, checksum, plan.nbytes, meta, [], references))


def test_only_tasks_put() -> None:
    with pytest.raises(ef.ExoFlowError, match="only inside a running task"):
        ef.put(1)


def test_only_references_are_got() -> None:
    with pytest.raises(TypeError, match="takes a reference .* not ndarray"):
        ef.get(np.arange(3))  # type: ignore[arg-type]


def test_the_bytes_do_not_depend_on_the_attempt() -> None:
    """Else a task that runs again would be taken for one that varies (R12)."""
    objects, found = Objects(), []
    for attempt in (0, 7):
        one, two = (Ref(("t", attempt, index), objects) for index in (0, 1))
        with collecting(objects) as collected:
            plan = serialize.pack({"x": [two, one], "y": two})
        assert collected.keys == (two.key, one.key)
        found.append(plan.to_bytes())
        with resolving([Ref(key, objects) for key in collected.keys]):
            assert serialize.unpack(plan.meta, plan.to_bytes()) == {"x": [two, one], "y": two}
    assert found[0] == found[1]


def test_nowhere_else() -> None:
    objects, other = Objects(), Objects()
    ref = Ref(("t", 0, 0), objects)
    for dump in (pickle.dumps, serialize.pack):
        with pytest.raises(TypeError, match="object 0 of task 't'> can't be pickled here"):
            dump(ref)
    with collecting(other), pytest.raises(TypeError, match="belongs to another task or workflow"):
        serialize.pack([ref])
    other.is_open = False
    with collecting(other), pytest.raises(TypeError, match="belongs to another task or workflow"):
        serialize.pack(Ref(("t", 0, 0), other))
    with collecting(objects):
        plan = serialize.pack([ref])
    with pytest.raises(ef.ExoFlowError, match="did not come with it"):
        serialize.unpack(plan.meta, plan.to_bytes())
    with pytest.raises(ef.BadWorkflowError, match="argument 1 .* of task 'f' can't be pickled"):
        compile_workflow(ef.task(lambda x: x).options(name="f").bind(ref))


def test_copies_are_the_same() -> None:
    ref = Ref(("t", 0, 0), Objects())
    assert copy.copy(ref) is ref
    assert copy.deepcopy([ref])[0] is ref
    assert ref != Ref(("t", 0, 0), Objects())
    assert ref.task == "t"
    assert repr(ref) == "<Ref to object 0 of task 't'>"


def test_record_round_trip() -> None:
    one = Reference("a", 3, 1, records.InCheckpoint("f", "e"), "00", 5, ["bytes", 5, None, []], [1])
    record = records.TaskCommitted("b", 0, 0, records.Inline(b""), "11", 0, [], [], [one])
    assert records.decode(records.encode(record)) == record
    assert record.files == {"f"}
    assert "references" not in records.encode(records.TaskCommitted("b", 0, 0, records.Inline(b""), "11", 0, []))
    assert seen_as("11", []) == "11"
    assert seen_as("11", [one]) == record.seen_as != "11"


def test_an_attempt_that_a_record_refers_to_is_used() -> None:
    """Another epoch would give the next object the same name else (R10c)."""
    one = Reference("a", 3, 0, records.InCheckpoint("f", "e"), "00", 5, [], [])
    record = records.TaskCommitted("b", 0, 0, records.Inline(b""), "11", 0, [], [], [one])
    assert history.facts_by_name([records.encode(record)]).attempts == {"a": 3, "b": 0}


def test_read_from_a_storage(stored: Stored) -> None:
    with stored.open() as journal:
        commit(stored, journal, 1, "c", "text", x=np.arange(5000), y="small")
        stored.say(journal, records.WorkflowFinished("SUCCESSFUL"))
    text, array, small = ef.get_output("w", storage=stored.storage.path)
    assert text == "text"
    assert np.array_equal(ef.get(array), np.arange(5000))
    assert not ef.get(array).flags.writeable
    assert ef.get(small) == "small"
    with pytest.raises(TypeError, match="can't be pickled here"):
        pickle.dumps(array)
    metadata = ef.get_metadata("w", "c", storage=stored.storage.path)
    assert metadata.nbytes is not None
    assert metadata.nbytes > 40_000
    ef.delete("w", storage=stored.storage.path)
    with pytest.raises(ef.CorruptCheckpointError, match="bytes of <Ref to object 0 of task 'c'> are gone.*deleted"):
        ef.get(array)


def test_damage_is_found_and_named_once(stored: Stored) -> None:
    with stored.open() as journal:
        commit(stored, journal, 1, "a", 1, x=np.full(5000, 77))
        (record,) = history.standing_outputs(read(stored.directory).records).values()
        stored.say(journal, dataclasses.replace(record, task_id="b"))
    (file,) = record.files
    flip(stored.checkpoints / file, np.full(10, 77).tobytes())
    report = verification.examine(stored.storage, "w")
    assert (report.outputs, report.references) == (2, 1)
    (finding,) = report.findings
    assert (finding.task, finding.file) == ("a", str(stored.checkpoints / file))
    with pytest.raises(ef.CorruptCheckpointError, match=file):
        ef.get(StoredObjects(stored.directory, record.references).refs()[0])
    with pytest.raises(ef.CorruptCheckpointError, match=file):
        history.check_output(stored.directory, record)


def test_gc_leaves_what_is_named_by_reference_only(stored: Stored) -> None:
    """The task that has put it is void; another one's output refers to it, in a later epoch."""
    with stored.open() as journal:
        commit(stored, journal, 1, "a", 1, x=np.arange(5000))
    record = history.standing_outputs(read(stored.directory).records)["a"]
    with stored.open() as journal:
        stored.say(journal, dataclasses.replace(record, task_id="c"))
        stored.say(journal, records.TaskVoided("a", 0, "not wanted"))
        stored.say(journal, records.WorkflowFinished("SUCCESSFUL"))
    for _ in range(2):
        garbage.collect(stored.storage, "needed")
        assert verification.examine(stored.storage, "w").findings == []
    assert {path.name for path in stored.checkpoints.iterdir()} == record.files


def test_files_that_a_rollback_may_be_given_are_kept() -> None:
    one = Reference("a", 0, 0, records.InCheckpoint("far", "e"), "00", 5, [], [])
    wire = [records.InCheckpoint("near", "e").to_wire(), [], "00", [one.to_wire()]]
    assert records.kept_input(wire)[3] == [one]
    assert records.kept_input(wire[:3])[3] == []
    start = records.TaskStarted("b", 0, 0, inputs=[wire])
    assert history.kept_files([records.encode(start)]) == {"near", "far"}
