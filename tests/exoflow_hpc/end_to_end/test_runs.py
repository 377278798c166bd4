"""What a user sees of runs in which nobody dies."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import Cli

__all__: list[str] = []

pytestmark = pytest.mark.timeout(150)

FIELDS = {"workflow_id", "status", "output", "tasks", "ranks", "seconds"}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_run_status_list_output_delete(cli: Cli, ranks: int) -> None:
    body = "def workflow(n=6):\n    return total.bind([total.bind([i, 1]) for i in range(int(n))])\n"
    result = cli("run", cli.file(body), "--id", "w", "--ranks", str(ranks), "--input", "n=5", "--json")
    assert result.code == 0, result.text
    report = result.json
    assert set(report) >= FIELDS
    assert report["seconds"] > 0
    assert (report["workflow_id"], report["status"], report["output"]) == ("w", "SUCCESSFUL", 15)
    assert report["tasks"] == {"run": 6, "skipped": 0, "rerun": 0, "rolled_back": 0}
    assert report["ranks"] == {"started": ranks, "lost": 0, "rejoined": 0}
    if ranks > 1:
        return
    assert cli("status", "w", "--json").json["status"] == "SUCCESSFUL"
    assert "w" in cli("list").stdout
    assert cli("output", "w").stdout.strip() == "15"
    assert cli("delete", "w").code == 0
    assert cli("status", "w").code == 2


def test_options_and_inputs(cli: Cli) -> None:
    """Nested arguments, keywords, InputNode, names and control edges."""
    body = """
@ef.task
def describe(parts, *, scale):
    return {"first": parts["a"][0], "sum": int(parts["a"][1].sum()) * scale}

@ef.task(checkpoint="skip")
def ones(n):
    return np.ones(int(n), np.int64)

def workflow(n):
    marker = step.options(name="marker").bind(ef.InputNode()["directory"], 0)
    return describe.bind({"a": ["x", ones.bind(ef.InputNode()["n"])]}, scale=2).after(marker)
"""
    file = cli.file(body.replace("def workflow(n):", "def workflow(n, directory):"))
    inputs = ["--input", "n=1000000", "--input", f"directory={cli.directory}"]
    result = cli("run", file, "--id", "w", "--ranks", "2", *inputs, "--json")
    assert result.code == 0, result.text
    assert result.json["output"] == {"first": "x", "sum": 2_000_000}
    assert cli.times("step") == {"0": 1}
    assert cli("output", "w", "marker").stdout.strip() == "0"


@pytest.mark.parametrize("ranks", [1, 2])
def test_reduce(cli: Cli, ranks: int) -> None:
    """Objects of 1 MiB, so that they are added up by a tree over the ranks."""
    body = """
@ef.task
def ones(i):
    return np.full((256, 512), i, np.int64)

@ef.task
def shape_and_sum(array):
    return [list(array.shape), int(array.sum())]

def workflow():
    return shape_and_sum.bind(ef.reduce([ones.bind(i) for i in range(9)]))
"""
    result = cli("run", cli.file(body), "--ranks", str(ranks), "--json")
    assert result.code == 0, result.text
    assert result.json["output"] == [[256, 512], 36 * 256 * 512]


def test_printing_tasks_do_not_hide_the_result(cli: Cli) -> None:
    body = """
@ef.task
def chatty(i):
    print("chat" * 100, flush=True)
    os.write(1, b"no newline at the end")
    return i

def workflow():
    return total.bind([chatty.bind(i) for i in range(4)])
"""
    result = cli("run", cli.file(body), "--ranks", "2", "--json")
    assert result.code == 0, result.text
    assert result.json["output"] == 6


def test_function_of_a_file_and_default_storage(cli: Cli) -> None:
    file = cli.file("def other(x):\n    return total.bind([int(x), 1])\n")
    cli.storage = cli.directory / "elsewhere" / "deep"
    result = cli("run", f"{file}:other", "--input", "x=4", "--ranks", "1", "--json")
    assert result.code == 0, result.text
    assert result.json["output"] == 5
    assert (cli.storage / "FORMAT").exists()


def test_under_mpiexec(cli: Cli) -> None:
    """Every process is a rank; one of them reports."""
    body = "def workflow():\n    return total.bind([total.bind([i, 1]) for i in range(6)])\n"
    result = cli("run", cli.file(body), "--id", "w", "--json", launcher=("mpiexec", "-n", "2"))
    assert result.code == 0, result.text
    reports = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(reports) == 1
    assert reports[0]["output"] == 21
    assert reports[0]["ranks"]["started"] == 2


def test_ranks_that_end_apart_under_mpiexec(cli: Cli) -> None:
    """One is at its end while another still shows the result: mpiexec would kill that one if the first had left without MPI_Finalize."""
    body = """
class Slow:
    def __repr__(self):
        import time
        time.sleep(1.5)
        return "shown"

@ef.task
def slow():
    return Slow()

def workflow():
    return slow.bind()
"""
    result = cli("run", cli.file(body), "--id", "w", launcher=("mpiexec", "-n", "2"))
    assert result.code == 0, result.text
    assert "shown" in result.stdout


def test_finished_workflow_is_not_run_again(cli: Cli) -> None:
    file = cli.file("def workflow(directory):\n    return total.bind([step.bind(directory, i) for i in range(3)])\n")
    args = ["run", file, "--id", "w", "--ranks", "1", "--input", f"directory={cli.directory}", "--json"]
    for _ in range(2):
        result = cli(*args)
        assert result.code == 0, result.text
        assert result.json["output"] == 3
    assert result.json["tasks"]["run"] == 0
    assert cli("resume", "w", "--ranks", "1", "--json").json["output"] == 3
    assert cli.times("step") == {"0": 1, "1": 1, "2": 1}
