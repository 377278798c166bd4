"""kill -9 of a worker, a rank, everything at once: the run ends with the right result, no committed task runs twice.

Tasks leave a line in a file each time they run; "sync" makes sure that each `step` is committed before `gated` starts.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import Cli, Process

__all__: list[str] = []

pytestmark = pytest.mark.timeout(240)

STEPS = 4
EACH_ONCE = {str(i): 1 for i in range(STEPS)}


def start_gated(cli: Cli, ranks: int, gates: int) -> Process:
    return cli.start("run", *cli.gated(STEPS, gates), "--id", "w", "--ranks", str(ranks), "--json")


def expected(gates: int) -> int:
    return sum(sum(range(STEPS)) * 100 + i for i in range(gates))


def waiting_at_the_gate(cli: Cli) -> list[int]:
    return [int(words[2]) for words in cli.log if words[0] == "gated"]


def test_kill_worker(cli: Cli) -> None:
    run = start_gated(cli, ranks=2, gates=1)
    worker = cli.wait_until(lambda: waiting_at_the_gate(cli), "the gated task starts")[0]
    os.kill(worker, signal.SIGKILL)
    cli.wait_until(lambda: cli.times("gated")["0"] == 2, "the gated task is started again")
    cli.open_gate()
    result = run.wait()
    assert result.code == 0, result.text
    assert result.json["output"] == expected(1)
    assert result.json["ranks"]["lost"] == 0
    assert cli.times("step") == EACH_ONCE
    assert cli.times("gated") == {"0": 2}
    assert cli.times("passed") == {"0": 1}


def test_task_that_always_crashes(cli: Cli) -> None:
    """After max_retries it is the workflow that fails, not the rank."""
    body = """
@ef.task(max_retries=2)
def crash(directory):
    log(directory, "crash", 0)
    os.kill(os.getpid(), 9)

def workflow(directory):
    return crash.bind(directory)
"""
    result = cli("run", cli.file(body), "--id", "w", "--ranks", "1", "--input", f"directory={cli.directory}", "--json")
    assert result.code == 1, result.text
    assert "crash" in result.stderr
    assert "Traceback" not in result.text
    assert result.json["status"] == "FAILED"
    assert result.json["ranks"]["lost"] == 0
    assert cli.times("crash") == {"0": 3}


def test_kill_rank(cli: Cli) -> None:
    """A rank other than the head: its tasks are done by others, and what is committed stays."""
    run = start_gated(cli, ranks=3, gates=6)

    def victims() -> list[int]:
        return [agent for rank, agent in map(cli.rank_of, waiting_at_the_gate(cli)) if rank > 0]

    agent = cli.wait_until(victims, "a gated task starts on a rank that is not the head")[0]
    os.kill(agent, signal.SIGKILL)
    cli.open_gate()
    result = run.wait()
    assert result.code == 0, result.text
    assert result.json["output"] == expected(6)
    assert result.json["ranks"]["lost"] == 1
    assert cli.times("step") == EACH_ONCE


def test_kill_everything_and_resume(cli: Cli) -> None:
    start_gated(cli, ranks=2, gates=2)
    cli.wait_until(lambda: waiting_at_the_gate(cli), "a gated task starts")
    assert cli.kill_all() > 2
    assert cli.times("step") == EACH_ONCE
    cli.open_gate()
    result = cli("resume", "w", "--ranks", "2", "--json")
    assert result.code == 0, result.text
    assert result.json["output"] == expected(2)
    assert result.json["tasks"]["skipped"] >= STEPS
    assert cli.times("step") == EACH_ONCE
    assert cli.times("passed") == {"0": 1, "1": 1}


def test_kill_everything_again_and_again(cli: Cli) -> None:
    """Each resume is killed too, the last one goes through; on another number of ranks than before."""
    run = start_gated(cli, ranks=2, gates=1)
    starts = 0
    for ranks in (1, 2):
        cli.wait_until(lambda seen=starts: len(waiting_at_the_gate(cli)) > seen, "the gated task starts")
        cli.kill_all()
        starts = len(waiting_at_the_gate(cli))
        run = cli.start("resume", "w", "--ranks", str(ranks), "--json")
    cli.open_gate()
    result = run.wait()
    assert result.code == 0, result.text
    assert result.json["output"] == expected(1)
    assert starts == 2
    assert cli.times("step") == EACH_ONCE
    assert cli.times("passed") == {"0": 1}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_is_resumable(cli: Cli, number: signal.Signals) -> None:
    run = start_gated(cli, ranks=2, gates=1)
    cli.wait_until(lambda: waiting_at_the_gate(cli), "the gated task starts")
    run.popen.send_signal(number)
    result = run.wait()
    assert result.code == 3, result.text
    assert "resume w" in result.text
    assert "Traceback" not in result.text
    assert cli("status", "w", "--json").json["status"] == "RESUMABLE"
    cli.open_gate()
    result = cli("resume", "w", "--ranks", "1", "--json")
    assert result.code == 0, result.text
    assert result.json["output"] == expected(1)
    assert cli.times("step") == EACH_ONCE
    assert cli.times("passed") == {"0": 1}


def test_active_elsewhere(cli: Cli) -> None:
    """A second controller is refused while the first one's heartbeat moves, and the first one doesn't notice."""
    run = start_gated(cli, ranks=1, gates=1)
    cli.wait_until(lambda: waiting_at_the_gate(cli), "the gated task starts")
    for second in (cli("resume", "w"), cli("run", *cli.gated(STEPS, 1), "--id", "w"), cli("delete", "w")):
        assert second.code == 2, second.text
        assert "'w'" in second.stderr
        assert "Traceback" not in second.text
    assert cli("status", "w", "--json").json["status"] == "RUNNING"
    cli.open_gate()
    result = run.wait()
    assert result.code == 0, result.text
    assert result.json["output"] == expected(1)
    assert cli.times("step") == EACH_ONCE
    assert cli.times("gated") == {"0": 1}


def test_cancel(cli: Cli) -> None:
    """For good: it can be deleted, but not resumed."""
    run = start_gated(cli, ranks=2, gates=1)
    cli.wait_until(lambda: waiting_at_the_gate(cli), "the gated task starts")
    assert cli("cancel", "w").code == 0
    result = run.wait()
    assert result.code == 1, result.text
    assert result.json["status"] == cli("status", "w", "--json").json["status"] == "CANCELED"
    for again in (cli("resume", "w"), cli("cancel", "w")):
        assert again.code == 2, again.text
        assert "CANCELED" in again.stderr.upper()
    assert cli.times("passed") == {}
    assert cli("delete", "w").code == 0
