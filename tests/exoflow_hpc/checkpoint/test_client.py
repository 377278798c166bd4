"""The writer process: what it survives, and what its rank is told."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exoflow_hpc import checkpoint, serialize
from exoflow_hpc.checkpoint import FileSource, WriterClient, WriteRequest, Written
from exoflow_hpc.errors import ExoFlowError, StorageError
from tests.exoflow_hpc.durability import ROOT, full_disk_only, run_on_small_disk, run_python

TIMEOUT = 40.0


@pytest.fixture
def workflow(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


@pytest.fixture
def client() -> Iterator[WriterClient]:
    with WriterClient(3, 1) as started:
        yield started


class Answers:
    """Callback that keeps the answers in the order in which they come."""

    def __init__(self) -> None:
        self.got: list[tuple[str, Written | ExoFlowError]] = []

    def __call__(self, request: WriteRequest, outcome: Written | ExoFlowError) -> None:
        self.got.append((request.task_id, outcome))

    def written(self) -> dict[str, Written]:
        assert not [o for _, o in self.got if not isinstance(o, Written)], self.got
        return {task: outcome for task, outcome in self.got if isinstance(outcome, Written)}


def request(workflow: Path, value: Any, task: str = "t", epoch: int = 1) -> WriteRequest:
    plan = serialize.pack(value)
    return WriteRequest(str(workflow), epoch, task, task, plan.meta, plan.to_bytes())


def from_file(workflow: Path, array: np.ndarray[Any, Any], path: Path, task: str = "t") -> WriteRequest:
    path.write_bytes(b"\x01" * 4096 + array.tobytes())
    return WriteRequest(
        str(workflow), 1, task, task, serialize.pack(array).meta, FileSource(str(path), 4096, array.nbytes)
    )


def value_of(workflow: Path, written: Written) -> Any:
    return serialize.unpack(*checkpoint.read(workflow, written.file, written.entry, written.checksum))


def test_small_and_large_sources(workflow: Path, client: WriterClient, tmp_path: Path) -> None:
    answers = Answers()
    large = np.random.default_rng(0).random(200_000)
    client.submit(
        [request(workflow, {"a": 1}, "small"), from_file(workflow, large, tmp_path / "arena", "large")], answers
    )
    client.submit(
        [from_file(workflow, large[:10], tmp_path / "arena2", "copied"), request(workflow, np.zeros((0, 2)), "empty")],
        answers,
    )
    for name in ("arena", "arena2"):
        (tmp_path / name).unlink()  # submit holds the bytes, not the name
    client.flush(TIMEOUT)
    written = answers.written()
    assert set(written) == {"small", "large", "copied", "empty"}
    assert client.restarts == 0
    assert value_of(workflow, written["small"]) == {"a": 1}
    assert value_of(workflow, written["empty"]).shape == (0, 2)
    np.testing.assert_array_equal(value_of(workflow, written["large"]), large)
    np.testing.assert_array_equal(value_of(workflow, written["copied"]), large[:10])
    assert written["small"].file.startswith("00000001-3.1-")


def test_what_queues_up_goes_to_one_file(workflow: Path, client: WriterClient) -> None:
    answers = Answers()
    client.submit([request(workflow, n, f"t{n}") for n in range(500)], answers)
    client.flush(TIMEOUT)
    written = answers.written()
    assert len(written) == 500
    assert len(os.listdir(workflow / "checkpoints")) < 20
    assert value_of(workflow, written["t499"]) == 499


def test_many_small_outputs_are_few_files(workflow: Path, client: WriterClient) -> None:
    """However they come: whatever arrives while a file is written goes to the next one."""
    answers = Answers()
    for number in range(2000):
        client.submit([request(workflow, bytes(8000), f"t{number}")], answers)
    client.flush(TIMEOUT)
    written = answers.written()
    assert len(written) == 2000
    files = {one.file for one in written.values()}
    assert files == set(os.listdir(workflow / "checkpoints"))
    assert len(files) <= 200


def test_workflows_and_epochs_have_files_of_their_own(tmp_path: Path, client: WriterClient) -> None:
    answers = Answers()
    for name in ("a", "b"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    requests = [request(tmp_path / name, epoch, f"{name}{epoch}", epoch) for epoch in (1, 2) for name in ("a", "b")]
    client.submit(requests, answers)
    client.flush(TIMEOUT)
    for task, written in answers.written().items():
        assert written.file.startswith(f"0000000{task[1]}-")
        assert value_of(tmp_path / task[0], written) == int(task[1])


def test_no_mpi_in_the_writer(workflow: Path, client: WriterClient) -> None:
    client.submit([request(workflow, 1)], Answers())
    client.flush(TIMEOUT)
    maps = Path(f"/proc/{client.pid}/maps").read_text()
    assert "h5py" in maps
    assert "mpi" not in maps.replace(str(ROOT), "").lower().replace("/hoplite_mpi", "")


@pytest.mark.parametrize("point", ["before_write", "after_write", "before_rename", "after_rename"])
@pytest.mark.parametrize("at", [1, 2])
def test_kill_at_each_point(
    workflow: Path, tmp_path: Path, point: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOPLITE_RANK", raising=False)
    monkeypatch.setenv("HOPLITE_FAULT", f"checkpoint.{point}=kill@{at}")
    answers = Answers()
    with WriterClient(0, 0) as client:
        monkeypatch.delenv("HOPLITE_FAULT")  # not for its successor
        if at == 2:
            client.submit([request(workflow, "first", "first")], answers)
            client.flush(TIMEOUT)
            assert client.restarts == 0
        array = np.arange(100_000)
        client.submit(
            [request(workflow, "value", "small"), from_file(workflow, array, tmp_path / "arena", "large")], answers
        )
        (tmp_path / "arena").unlink()
        client.flush(TIMEOUT)
        assert client.restarts == 1
    written = answers.written()
    assert len(answers.got) == len(written) == (3 if at == 2 else 2)
    assert value_of(workflow, written["small"]) == "value"
    np.testing.assert_array_equal(value_of(workflow, written["large"]), array)
    named = {w.file for w in written.values()}
    garbage = {p.name for p in checkpoint.orphans(workflow, named)}
    assert garbage | named == set(os.listdir(workflow / "checkpoints"))
    assert bool(garbage) == (point != "before_write")


def test_that_dies_again_and_again_is_reported(workflow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOPLITE_RANK", raising=False)
    monkeypatch.setenv("HOPLITE_FAULT", "checkpoint.before_write=kill")
    answers = Answers()
    with WriterClient(0, 0) as client:
        client.submit([request(workflow, 1)], answers)
        client.flush(TIMEOUT)
        ((_, outcome),) = answers.got
        assert isinstance(outcome, StorageError)
        assert "died 5 times" in str(outcome)
        monkeypatch.delenv("HOPLITE_FAULT")
        client.submit([request(workflow, 2, "second")], answers)  # it goes on once it can
        client.flush(TIMEOUT)
    assert isinstance(answers.got[1][1], Written)


def test_killed_while_idle(workflow: Path, client: WriterClient) -> None:
    answers = Answers()
    client.submit([request(workflow, 1, "a")], answers)
    client.flush(TIMEOUT)
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)
    client.submit([request(workflow, 2, "b")], answers)
    client.flush(TIMEOUT)
    assert set(answers.written()) == {"a", "b"}
    assert client.restarts == 1


def test_one_bad_request_fails_alone(workflow: Path, client: WriterClient, tmp_path: Path) -> None:
    answers = Answers()
    short = from_file(workflow, np.zeros(100_000), tmp_path / "arena", "short")
    os.truncate(tmp_path / "arena", 5000)
    client.submit([request(workflow, 1, "a"), short, request(workflow, 2, "b")], answers)
    client.submit([request(tmp_path / "deleted", 3, "gone")], answers)
    client.flush(TIMEOUT)
    got = dict(answers.got)
    assert isinstance(got["a"], Written)
    assert isinstance(got["b"], Written)
    assert isinstance(got["short"], StorageError)
    assert "5000 bytes" in str(got["short"])
    assert isinstance(got["gone"], StorageError)
    assert got["gone"].errno == errno.ENOENT
    assert "deleted" in str(got["gone"])
    assert client.restarts == 0
    assert not [n for n in os.listdir(workflow / "checkpoints") if n.startswith(".tmp")]


def test_source_that_cant_be_opened(workflow: Path, client: WriterClient, tmp_path: Path) -> None:
    answers = Answers()
    gone = from_file(workflow, np.zeros(10), tmp_path / "arena")
    (tmp_path / "arena").unlink()
    with pytest.raises(StorageError, match="arena"):
        client.submit([request(workflow, 1), gone], answers)
    client.flush(TIMEOUT)
    assert answers.got == []


def test_callback_that_raises_harms_nobody(
    workflow: Path, client: WriterClient, caplog: pytest.LogCaptureFixture
) -> None:
    def bad(*_: object) -> None:
        raise KeyError("mine")

    answers = Answers()
    client.submit([request(workflow, 1, "a")], bad)
    client.submit([request(workflow, 2, "b")], answers)
    client.flush(TIMEOUT)
    assert set(answers.written()) == {"b"}
    assert "task a raised" in caplog.text


def test_close_finishes_and_refuses(workflow: Path) -> None:
    client = WriterClient(0, 0)
    client.start()
    answers = Answers()
    client.submit([request(workflow, n, f"t{n}") for n in range(50)], answers)
    pid = client.pid
    client.close()
    assert len(answers.written()) == 50
    assert not Path(f"/proc/{pid}").exists()
    with pytest.raises(ExoFlowError, match="closed"):
        client.submit([request(workflow, 1)], answers)


def test_close_that_cant_wait_fails_what_is_left(workflow: Path) -> None:
    client = WriterClient(0, 0)
    client.start()
    assert client.pid is not None
    os.kill(client.pid, signal.SIGSTOP)
    answers = Answers()
    array = np.zeros(1 << 20)
    client.submit([request(workflow, array)], answers)  # more than the socket holds, to one who doesn't read
    client.close(timeout=0.2)
    ((_, outcome),) = answers.got
    assert isinstance(outcome, ExoFlowError)
    assert "closed before" in str(outcome)


def test_submit_never_waits_for_a_stopped_writer(workflow: Path, client: WriterClient) -> None:
    answers = Answers()
    pid = client.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    done = threading.Event()

    def submit() -> None:
        for n in range(20):
            client.submit([request(workflow, np.full(100_000, n), f"t{n}")], answers)
        done.set()

    thread = threading.Thread(target=submit)
    thread.start()
    assert done.wait(TIMEOUT)
    os.kill(pid, signal.SIGCONT)
    client.flush(TIMEOUT)
    thread.join()
    assert len(answers.written()) == 20


def test_writer_dies_with_its_rank(workflow: Path) -> None:
    code = """
import os, sys
from exoflow_hpc.checkpoint import WriterClient
client = WriterClient(0, 0); client.start(); print(client.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    # the pipe's other end is held by the writer too: the end of the output is the end of both
    rank = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
    out, _ = rank.communicate(timeout=TIMEOUT)
    assert rank.returncode == -signal.SIGKILL
    assert out.strip().isdigit()


def test_signals_for_the_whole_job_dont_stop_it(workflow: Path, client: WriterClient) -> None:
    answers = Answers()
    client.submit([request(workflow, 1, "a")], answers)
    client.flush(TIMEOUT)
    assert client.pid is not None
    os.kill(client.pid, signal.SIGTERM)
    os.kill(client.pid, signal.SIGINT)
    client.submit([request(workflow, 2, "b")], answers)
    client.flush(TIMEOUT)
    assert set(answers.written()) == {"a", "b"}
    assert client.restarts == 0


def test_no_descriptor_is_left(workflow: Path, tmp_path: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    with WriterClient(0, 0) as client:
        for n in range(5):
            client.submit([from_file(workflow, np.zeros(100_000), tmp_path / f"a{n}", f"t{n}")], Answers())
    assert sorted(os.listdir("/proc/self/fd")) == before


@full_disk_only
def test_full_disk_is_an_answer(tmp_path: Path) -> None:
    code = """
import os, sys
import numpy as np
from pathlib import Path
from exoflow_hpc import serialize
from exoflow_hpc.checkpoint import WriterClient, WriteRequest
root = Path(sys.argv[1]); (root / "checkpoints").mkdir()
def request(task, size):
    plan = serialize.pack(np.zeros(size))
    return WriteRequest(str(root), 1, task, task, plan.meta, plan.to_bytes())
with WriterClient(0, 0) as client:
    got = {}
    answer = lambda r, o: got.update({r.task_id: o})
    client.submit([request("a", 100), request("big", 1 << 20), request("b", 100)], answer)
    client.flush(40)
    print(got["a"].nbytes, got["b"].nbytes, got["big"].errno, got["big"])
    print([n for n in os.listdir(root / "checkpoints") if n.startswith(".tmp")])
"""
    done = run_on_small_disk(code, tmp_path, "1m")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("800 800 28 can't write checkpoint")
    assert "the disk is full" in first
    assert second == "[]"


def test_reader_process_needs_no_writer(workflow: Path, client: WriterClient) -> None:
    answers = Answers()
    client.submit([request(workflow, [1, 2, 3])], answers)
    client.flush(TIMEOUT)
    written = answers.written()["t"]
    code = (
        "import sys; from exoflow_hpc import checkpoint as c, serialize as s; print(s.unpack(*c.read(*sys.argv[1:])))"
    )
    assert run_python(code, workflow, written.file, written.entry, written.checksum).stdout == "[1, 2, 3]\n"
