"""Each kind of bad input gets a clear error and its exit code, no traceback of ours, and nothing is lost."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import Cli, Namespace, Result

__all__: list[str] = []

pytestmark = pytest.mark.timeout(150)

OK = "def workflow():\n    return total.bind([1, 2])\n"


def refused(result: Result, *patterns: str, code: int = 2) -> None:
    """Assert the exit code, that stderr says all of *patterns*, and that no line of ours is in a traceback."""
    assert result.code == code, result.text
    for pattern in patterns:
        assert re.search(pattern, result.stderr, re.IGNORECASE), f"{pattern!r} is not in: {result.stderr}"
    ours = [
        line
        for line in result.text.splitlines()
        if re.search(r'File ".*(exoflow_hpc|hoplite_mpi)/[^"]*\.py", line', line)
    ]
    assert not ours, result.text


def test_file_not_there(cli: Cli) -> None:
    refused(cli("run", "nowhere.py"), r"nowhere\.py")


def test_file_is_a_directory(cli: Cli) -> None:
    refused(cli("run", str(cli.directory)), re.escape(str(cli.directory)))


def test_no_function(cli: Cli) -> None:
    refused(cli("run", cli.file("x = 1\n")), r"flow\.py", "workflow")
    refused(cli("run", cli.file(OK) + ":other"), r"flow\.py", "other")


def test_function_is_none(cli: Cli) -> None:
    refused(cli("run", cli.file("workflow = 5\n")), r"flow\.py", "workflow")


def test_raises_at_import(cli: Cli) -> None:
    refused(cli("run", cli.file("raise OSError('the sky is green')\n")), "the sky is green", r'File ".*flow\.py", line')


def test_syntax_error(cli: Cli) -> None:
    refused(cli("run", cli.file("def workflow(:\n")), "syntax", r"flow\.py")


def test_workflow_raises(cli: Cli) -> None:
    refused(
        cli("run", cli.file("def workflow():\n    raise ValueError('no such star')\n")), "no such star", r"flow\.py"
    )


def test_option_not_known(cli: Cli) -> None:
    refused(
        cli("run", cli.file("@ef.task(chekpoint='sync')\ndef f(): pass\ndef workflow(): return f.bind()\n")),
        "chekpoint",
    )


@pytest.mark.parametrize("value", ["5", "None", "[total.bind([1])]", "total", "ef.InputNode()"])
def test_returns_no_dag(cli: Cli, value: str) -> None:
    refused(cli("run", cli.file(f"def workflow():\n    return {value}\n")), "node|DAG")


def test_cycle(cli: Cli) -> None:
    body = "def workflow():\n    a, b = total.options(name='left').bind([1]), total.options(name='right').bind([2])\n"
    result = cli("run", cli.file(body + "    a.after(b)\n    b.after(a)\n    return a\n"))
    refused(result, "cycle|circle", "left", "right")


def test_argument_that_cannot_be_pickled(cli: Cli) -> None:
    refused(cli("run", cli.file("def workflow():\n    return total.bind(threading.Lock())\n")), "total", "pickle")


def test_function_that_cannot_be_pickled(cli: Cli) -> None:
    body = (
        "lock = threading.Lock()\n@ef.task\ndef locked():\n    return lock\ndef workflow():\n    return locked.bind()\n"
    )
    refused(cli("run", cli.file(body)), "locked", "pickle")


def test_inputs(cli: Cli) -> None:
    file = cli.file("def workflow(size):\n    return total.bind([size])\n")
    refused(cli("run", file), "size")
    refused(cli("run", file, "--input", "size=1", "--input", "colour=2"), "colour")
    refused(cli("run", file, "--input", "size"), "size", "KEY=VALUE|=")


@pytest.mark.parametrize(
    "args", [["frobnicate"], ["run"], ["run", "x.py", "--ranks", "none"], ["run", "x.py", "--ranks", "0"]]
)
def test_usage(cli: Cli, args: list[str]) -> None:
    refused(cli(*args), "usage|ranks")


def test_unknown_id(cli: Cli) -> None:
    assert cli("run", cli.file(OK), "--id", "known", "--ranks", "1").code == 0
    for command in ("status", "resume", "output", "delete", "cancel"):
        refused(cli(command, "unknown"), "unknown")
    refused(cli("delete", "../known"), r"\.\./known")
    refused(cli("output", "known", "nothing"), "nothing")
    assert cli("output", "known").stdout.strip() == "3"


def test_environment(cli: Cli) -> None:
    refused(cli("run", cli.file(OK), EXOFLOW_WORKERS="many"), "EXOFLOW_WORKERS", "many")
    refused(cli("run", cli.file(OK), HOPLITE_CHUNK_SIZE="large"), "HOPLITE_CHUNK_SIZE", "large")


@pytest.mark.parametrize("name", ["../escape", "a/b", ".hidden", "", "x" * 300])
def test_illegal_id(cli: Cli, name: str) -> None:
    refused(cli("run", cli.file(OK), "--id", name), "id")
    assert not (cli.directory / "escape").exists()


def test_id_with_another_dag(cli: Cli) -> None:
    file = cli.file("def workflow(x=1):\n    return total.bind([int(x), 2])\n")
    first = cli("run", file, "--id", "w", "--ranks", "1", "--json")
    assert first.code == 0
    assert first.json["output"] == 3
    refused(
        cli("run", cli.file("def workflow(x=1):\n    return total.bind([3, 4])\n", "other.py"), "--id", "w"),
        "w",
        "DAG|input|exist",
    )
    refused(cli("run", file, "--id", "w", "--input", "x=5"), "w", "DAG|input|exist")
    # nothing was lost: the first one is there, and is not run again
    again = cli("run", file, "--id", "w", "--ranks", "1", "--json")
    assert again.code == 0
    assert again.json["output"] == 3
    assert again.json["tasks"]["run"] == 0


def test_task_raises(cli: Cli) -> None:
    body = "@ef.task\ndef unlucky(x):\n    return 1 / x\ndef workflow():\n    return unlucky.bind(0)\n"
    result = cli("run", cli.file(body), "--id", "w", "--ranks", "1", "--json")
    refused(result, "unlucky", "ZeroDivisionError", r'flow\.py", line', "return 1 / x", code=1)
    assert result.json["status"] == "FAILED"
    assert result.json["workflow_id"] == "w"
    assert cli("status", "w", "--json").json["status"] == "FAILED"


def test_output_that_cannot_be_pickled(cli: Cli) -> None:
    body = "@ef.task\ndef odd():\n    return threading.Lock()\ndef workflow():\n    return odd.bind()\n"
    refused(cli("run", cli.file(body), "--ranks", "1"), "odd", "pickle", code=1)


def test_reduce_of_different_shapes(cli: Cli) -> None:
    body = "@ef.task\ndef ones(n):\n    return np.ones(n)\n"
    body += "def workflow():\n    return ef.reduce([ones.bind(10), ones.bind(20)])\n"
    refused(cli("run", cli.file(body), "--ranks", "1"), "reduce", "shape", code=1)


def test_storage_is_below_a_file(cli: Cli) -> None:
    (cli.directory / "file").touch()
    cli.storage = cli.directory / "file" / "storage"
    refused(cli("run", cli.file(OK)), re.escape(str(cli.directory / "file")))


def test_storage_holds_other_files(cli: Cli) -> None:
    cli.storage.mkdir()
    (cli.storage / "thesis.tex").write_text("mine")
    refused(cli("run", cli.file(OK)), re.escape(str(cli.storage)))
    assert os.listdir(cli.storage) == ["thesis.tex"]


# --- full and read-only file systems: private mounts, for root only ---------------------------------------------------


@pytest.fixture
def disk(cli: Cli) -> Iterator[Namespace]:
    """Return a namespace in which the storage is a tmpfs of 12 MiB; `cli` works in it."""
    cli.storage.mkdir()
    with cli.mounted(cli.storage, "12m") as namespace:
        yield namespace


@pytest.fixture
def shared_memory(cli: Cli) -> Iterator[Namespace]:
    """Return a namespace in which /dev/shm is a tmpfs of 24 MiB; `cli` works in it."""
    with cli.mounted(Path("/dev/shm"), "24m") as namespace:
        yield namespace


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="private mounts need root")

BIG = """
@ef.task(checkpoint="{checkpoint}")
def big(directory, i, before):
    log(directory, "big", i)
    return np.full(1 << 22, i + sum(before))

@ef.task
def first(array):
    return int(array[0])

def workflow(directory):
    return first.bind(big.bind(directory, 7, [step.bind(directory, i) for i in range(3)]))
"""


@needs_root
def test_read_only_storage(cli: Cli, disk: Namespace) -> None:
    assert cli("run", cli.file(OK), "--id", "w", "--ranks", "1").code == 0
    disk.read_only()
    refused(cli("run", cli.file(OK), "--id", "new", "--ranks", "1"), "read-only", re.escape(str(cli.storage)))
    # what is there can still be read
    assert cli("status", "w", "--json").json["status"] == "SUCCESSFUL"
    assert cli("output", "w", "--json").code == 0


@needs_root
@pytest.mark.parametrize("checkpoint", ["sync", "async"])
def test_full_disk(cli: Cli, disk: Namespace, checkpoint: str) -> None:
    """An output of 32 MiB for 12 MiB of disk: resumable, and finished with the same commits when there is room."""
    file = cli.file(BIG.format(checkpoint=checkpoint))
    result = cli("run", file, "--id", "w", "--ranks", "1", "--input", f"directory={cli.directory}", "--json")
    refused(result, "no space|full", re.escape(str(cli.storage)), code=3)
    assert result.json["status"] == "RESUMABLE"
    disk.resize("128m")
    result = cli("resume", "w", "--ranks", "1", "--json")
    assert result.code == 0, result.text
    assert result.json["output"] == 10
    assert cli.times("step") == {"0": 1, "1": 1, "2": 1}


@needs_root
def test_disk_full_from_the_start(cli: Cli, disk: Namespace) -> None:
    disk.resize("4k")
    refused(cli("run", cli.file(OK), "--id", "w", "--ranks", "1"), "no space|full")
    disk.resize("12m")
    assert cli("run", cli.file(OK), "--id", "w", "--ranks", "1").code == 0


@needs_root
def test_full_shared_memory(cli: Cli, shared_memory: Namespace) -> None:
    """An object of 32 MiB for 24 MiB of /dev/shm: a clear end and no SIGBUS; nothing lost; nothing left behind."""
    file = cli.file(BIG.format(checkpoint="sync"))
    result = cli("run", file, "--id", "w", "--ranks", "1", "--input", f"directory={cli.directory}", "--json")
    assert result.code in (1, 3), result.text
    refused(result, "/dev/shm|StoreFull", code=result.code)
    assert [name for name in shared_memory.listing() if name.startswith("hoplite")] == []
    shared_memory.resize("256m")
    result = cli("resume", "w", "--ranks", "1", "--json")
    assert result.code == 0, result.text
    assert result.json["output"] == 10
    assert cli.times("step") == {"0": 1, "1": 1, "2": 1}
    assert [name for name in shared_memory.listing() if name.startswith("hoplite")] == []
