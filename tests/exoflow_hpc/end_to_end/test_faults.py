"""A process dies at a named point: the result is the same, and nothing that was committed runs again."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import Cli

__all__: list[str] = []

pytestmark = pytest.mark.timeout(150)

#: eight blocks in two layers and their sum; a block of the first layer that runs on the head waits until the gate is open
LAYERS = """
def on_head():
    # a worker does not see the variables of its rank: ask the process of the rank, an ancestor of this one
    pid = os.getpid()
    while b"\\0exoflow_hpc.rank\\0" not in open(f"/proc/{pid}/cmdline", "rb").read():
        pid = int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])
    return b"\\0HOPLITE_RANK=0\\0" in open(f"/proc/{pid}/environ", "rb").read()

@ef.task(checkpoint="sync")
def waiting(directory, i):
    here = ef.context()
    log(directory, "block", here.task_id, here.epoch, here.attempt, os.getpid())
    deadline = time.monotonic() + 80
    while on_head() and not os.path.exists(os.path.join(directory, "gate")):
        assert time.monotonic() < deadline, "the test never opened the gate"
        time.sleep(0.01)
    return np.full(20_000 if i % 2 else 2_000, i)

def workflow(directory):
    first = [waiting.bind(directory, i) for i in range(4)]
    return total.bind([block.bind(directory, i, first) for i in range(4)])
"""
OUTPUT = 4 * 6 + 6


def command(cli: Cli, ranks: int) -> list[str]:
    inputs = ["--input", f"directory={cli.directory}"]
    return ["run", cli.file(LAYERS), "--id", "w", "--ranks", str(ranks), *inputs, "--json"]


@pytest.mark.parametrize("point", ["agent.dispatched", "agent.task_done", "agent.written"])
def test_rank_dies(cli: Cli, point: str) -> None:
    """A replacement joins, and runs all that the head can't, whose worker waits at the gate."""
    run = cli.start(*command(cli, 2), HOPLITE_FAULT=f"1:{point}=kill", EXOFLOW_WORKERS="1")
    cli.wait_until(lambda: "rank 1 is back" in run.stderr or run.popen.poll() is not None, "the rank is replaced")
    cli.wait_until(lambda: len({words[1] for words in cli.log}) == 4, "the replacement runs three of the first four")
    cli.open_gate()
    assert run.wait().values == (OUTPUT, 1, 1)
    cli.check_committed_ran_once("w")


@pytest.mark.parametrize(
    "point",
    ["agent.dispatched", "agent.task_done", "agent.written", "controller.dispatch", "controller.committed"],
)
def test_head_dies(cli: Cli, point: str) -> None:
    """All start again and go on from what is committed: fewer tasks are left than the fault needs to fire again."""
    cli.open_gate()
    result = cli(*command(cli, 1), HOPLITE_FAULT=f"0:{point}=kill@6")
    assert result.values == (OUTPUT, 1, 0)
    assert result.json["ranks"]["started"] == 2
    assert result.json["tasks"]["skipped"] >= 3
    cli.check_committed_ran_once("w")


def test_head_dies_beside_others(cli: Cli) -> None:
    run = cli.start(*command(cli, 2), "--quiet")

    def head() -> list[int]:
        ranks = [cli.rank_of(int(words[-1])) for words in cli.log]
        return [agent for rank, agent in ranks if rank == 0 and len(ranks) > 1]

    os.kill(cli.wait_until(head, "tasks start on the head, and elsewhere")[0], signal.SIGKILL)
    cli.open_gate()
    assert run.wait().values == (OUTPUT, 1, 0)
    cli.check_committed_ran_once("w")


def test_head_dies_again_and_again(cli: Cli) -> None:
    """A fault that comes back at once: it is given up, and says how to go on."""
    cli.open_gate()
    result = cli(*command(cli, 1), HOPLITE_FAULT="0:controller.dispatch=kill")
    assert result.code == 3, result.text
    assert result.json["status"] == "RESUMABLE"
    assert "resume w" in result.stderr
    assert cli("resume", "w", "--ranks", "1", "--json").values == (OUTPUT, 0, 0)
    cli.check_committed_ran_once("w")


@pytest.mark.parametrize("rank", [0, 1])
def test_error_of_ours(cli: Cli, rank: int) -> None:
    """An error in a rank's main thread ends that rank, and nobody waits for it."""
    run = cli.start(*command(cli, 2), HOPLITE_FAULT=f"{rank}:agent.dispatched=raise")
    if rank == 0:
        result = run.wait()
        assert result.code == 3, result.text
        assert "rank 0 failed unexpectedly" in result.stderr
        assert "resume w" in result.stderr
        run = cli.start("resume", "w", "--ranks", "1", "--json")
    else:
        cli.wait_until(lambda: "rank 1 is back" in run.stderr or run.popen.poll() is not None, "the rank is replaced")
    cli.open_gate()
    assert run.wait().values == (OUTPUT, rank, rank)
    cli.check_committed_ran_once("w")


def test_writer_dies_now_and_then(cli: Cli) -> None:
    cli.open_gate()
    result = cli(*command(cli, 2), HOPLITE_FAULT="checkpoint.before_rename=kill@2")
    assert result.values == (OUTPUT, 0, 0)
    assert "starting it again" in result.stderr
    cli.check_committed_ran_once("w")


def test_writer_keeps_dying(cli: Cli) -> None:
    cli.open_gate()
    result = cli(*command(cli, 1), HOPLITE_FAULT="checkpoint.before_write=kill")
    assert result.code == 3, result.text
    assert result.json["status"] == "RESUMABLE"
    assert "the checkpoint writer died 5 times in a row" in result.json["error"]
    assert "resume w" in result.stderr
    assert cli("resume", "w", "--ranks", "1", "--json").values == (OUTPUT, 0, 0)
    cli.check_committed_ran_once("w")
