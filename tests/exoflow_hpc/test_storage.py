from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from exoflow_hpc.errors import (
    CorruptCheckpointError,
    InvalidWorkflowIdError,
    StorageError,
    WorkflowExistsError,
    WorkflowNotFoundError,
)
from exoflow_hpc.storage import Storage
from tests.exoflow_hpc.durability import ROOT, full_disk_only, run_on_small_disk, run_python, run_until_killed

CREATE = "import sys; from exoflow_hpc.storage import Storage; Storage(sys.argv[1]).create('w', b'spec' * 1000)"
DELETE = "import sys; from exoflow_hpc.storage import Storage; Storage(sys.argv[1]).delete('w')"


def test_create_list_spec_delete(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "a" / "b")
    directory = storage.create("run-1", b"abc")
    storage.create("Z.2", b"")
    assert Storage(tmp_path / "a" / "b").list() == ["Z.2", "run-1"]
    assert (storage.spec("run-1"), storage.spec("Z.2")) == (b"abc", b"")
    assert sorted(os.listdir(directory)) == ["FENCE", "checkpoints", "journal", "spec"]
    storage.delete("run-1")
    assert storage.list() == ["Z.2"]
    assert os.listdir(storage.path / "workflows") == ["Z.2"]
    for use in (storage.spec, storage.delete, storage.directory):
        with pytest.raises(WorkflowNotFoundError, match="run-1"):
            use("run-1")


@pytest.mark.parametrize("bad", ["", ".", "..", "a/b", "../x", ".hidden", "-x", "a b", "ü", "x" * 129, "a\n", "a\0"])
def test_id_not_allowed(tmp_path: Path, bad: str) -> None:
    storage = Storage(tmp_path / "s")
    for use in (storage.directory, lambda i: storage.create(i, b"")):
        with pytest.raises(InvalidWorkflowIdError, match="letters, digits"):
            use(bad)


def test_same_id_has_one_winner(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "s")
    outcomes: list[object] = []
    barrier = threading.Barrier(6)

    def race(number: int) -> None:
        barrier.wait()
        try:
            Storage(tmp_path / "s").create("same", b"%d" % number)
            outcomes.append(number)
        except WorkflowExistsError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=race, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [o for o in outcomes if isinstance(o, int)]
    assert len(outcomes) == 6
    assert len(winners) == 1
    assert storage.spec("same") == b"%d" % winners[0]
    assert os.listdir(storage.path / "workflows") == ["same"]


@pytest.mark.parametrize("point", ["storage.before_rename", "storage.after_rename", "storage.before_format_rename"])
def test_kill_while_creating(tmp_path: Path, point: str) -> None:
    run_until_killed(CREATE, tmp_path / "s", fault=f"{point}=kill")
    storage = Storage(tmp_path / "s")
    if point == "storage.after_rename":
        assert storage.spec("w") == b"spec" * 1000
    else:
        assert storage.list() == []
        storage.create("w", b"other")
        assert storage.spec("w") == b"other"


def test_abandoned_creation_is_swept_but_a_fresh_one_is_not(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "s")
    old, fresh = (storage.path / "workflows" / name for name in (".new-old", ".new-fresh"))
    for path in (old, fresh):
        path.mkdir()
        (path / "spec").write_bytes(b"x")
    os.utime(old, (1, 1))
    assert Storage(tmp_path / "s").list() == []
    assert not old.exists()
    assert fresh.exists()


def test_abandoned_format_is_swept_but_a_fresh_one_is_not(tmp_path: Path) -> None:
    """Whoever made the storage was killed, or is still at it: another process has made it since."""
    run_until_killed(CREATE, tmp_path / "s", fault="storage.before_format_rename=kill")
    (left,) = (tmp_path / "s").glob(".tmp-*")
    Storage(tmp_path / "s")
    assert left.exists()
    os.utime(left, (1, 1))
    Storage(tmp_path / "s")
    assert sorted(os.listdir(tmp_path / "s")) == ["FORMAT", "workflows"]


@pytest.mark.parametrize(("point", "listed"), [("storage.before_trash", ["w"]), ("storage.after_trash", [])])
def test_kill_while_deleting(tmp_path: Path, point: str, listed: list[str]) -> None:
    Storage(tmp_path / "s").create("w", b"abc")
    run_until_killed(DELETE, tmp_path / "s", fault=f"{point}=kill")
    storage = Storage(tmp_path / "s")
    assert storage.list() == listed
    assert os.listdir(storage.path / "workflows") == listed
    if listed:
        assert storage.spec("w") == b"abc"


def test_directory_that_cant_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="is a file"):
        Storage(tmp_path / "file")
    with pytest.raises(StorageError, match="can't use the storage directory"):
        Storage(tmp_path / "file" / "below")
    with pytest.raises(StorageError, match="holds other files"):
        Storage(tmp_path)
    with pytest.raises(StorageError, match="there is no storage"):
        Storage(tmp_path / "absent", create=False)
    assert not (tmp_path / "absent").exists()


def test_directory_that_cant_be_written() -> None:
    with pytest.raises(StorageError, match="can't use the storage directory /proc/x"):
        Storage("/proc/x")


@pytest.mark.parametrize(
    ("text", "match"), [("exoflow_hpc storage 999\n", "format 999"), ("other 1\n", "not one of"), ("", "not one of")]
)
def test_wrong_format(tmp_path: Path, text: str, match: str) -> None:
    Storage(tmp_path / "s")
    (tmp_path / "s" / "FORMAT").write_text(text)
    with pytest.raises(StorageError, match=match):
        Storage(tmp_path / "s")


def test_spec_flipped_cut_or_missing(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "s")
    path = storage.create("w", b"0123456789") / "spec"
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(CorruptCheckpointError, match="spec"):
            storage.spec("w")
        path.write_bytes(data[:place])
        with pytest.raises(CorruptCheckpointError, match="spec"):
            storage.spec("w")
    path.unlink()
    with pytest.raises(CorruptCheckpointError, match="spec"):
        storage.spec("w")


@full_disk_only
def test_full_disk(tmp_path: Path) -> None:
    code = """
import os, sys
from exoflow_hpc.errors import StorageError
from exoflow_hpc.storage import Storage
storage = Storage(sys.argv[1])
try:
    storage.create("big", b"x" * (1 << 20))
except StorageError as error:
    print(error.errno, error, storage.list(), os.listdir(storage.path / "workflows"))
storage.create("small", b"y")
print(storage.spec("small"))
"""
    done = run_on_small_disk(code, tmp_path, "512k")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("28 can't create")
    assert "the disk is full" in first
    assert first.endswith("[] []")
    assert second == "b'y'"


def test_two_processes_make_the_storage_at_once(tmp_path: Path) -> None:
    code = "import sys; from exoflow_hpc.storage import Storage; Storage(sys.argv[1]); print('ok')"
    both = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path / "s"], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for _ in range(2)
    ]
    assert [p.communicate(timeout=60)[0] for p in both] == ["ok\n", "ok\n"]
    assert run_python(CREATE, tmp_path / "s").returncode == 0
