"""Tasks that fail in each way they can: what the user is told, what is caught, what is left. The rank outlives them all."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from exoflow_hpc.worker.tree import descendants

if TYPE_CHECKING:
    from .conftest import Cli, Process

__all__: list[str] = []

pytestmark = pytest.mark.timeout(240)

#: tasks that don't let themselves be ended, and one that starts what doesn't
HOSTILE = """
import itertools, signal, subprocess, sys

def block():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())

@ef.task
def sleep(directory):
    log(directory, "runs", "sleep")
    time.sleep(1000)

@ef.task
def hold_gil(directory):
    log(directory, "runs", "hold_gil")
    sum(itertools.repeat(0))

@ef.task
def ignore_signals(directory):
    block()
    log(directory, "runs", "ignore_signals")
    while True:
        pass

@ef.task
def multiply(directory):
    subprocess.Popen(["sleep", "1000"])
    if os.fork() == 0:
        os.setsid()
        block()
        if os.fork() == 0:
            log(directory, "runs", "multiply")
            while True:
                time.sleep(1000)
        os._exit(0)
    time.sleep(1000)
"""


def arguments(cli: Cli, body: str, ranks: int = 1) -> list[str]:
    inputs = ["--input", f"directory={cli.directory}"]
    return ["run", cli.file(body), "--id", "w", "--ranks", str(ranks), *inputs, "--json"]


def _is_sleep(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text() == "sleep\n"
    return False


def start_hostile(cli: Cli, options: str, ranks: int) -> Process:
    names = "sleep, hold_gil, ignore_signals, multiply"
    body = f"\ndef workflow(directory):\n    return total.bind([f.options({options}).bind(directory) for f in ({names})])\n"
    return cli.start(*arguments(cli, HOSTILE + body, ranks), EXOFLOW_WORKERS="4")


@pytest.mark.parametrize("ranks", [1, 2])
def test_cancel_reaches_everything_that_runs(cli: Cli, ranks: int) -> None:
    run = start_hostile(cli, "", ranks)
    cli.wait_until(lambda: len(cli.times("runs")) == 4, "all tasks run")
    result = cli("cancel", "w")
    assert result.code == 0, result.text
    ended = run.wait()
    assert ended.json["status"] == "CANCELED"
    assert ended.code == 1
    # the processes of the ranks have waited for those of their tasks
    assert cli.processes() == []
    assert set(cli.times("runs").values()) == {1}
    assert cli("status", "w", "--json").json["status"] == "CANCELED"


def test_timeout_ends_everything_that_runs(cli: Cli) -> None:
    result = start_hostile(cli, "timeout=2, max_retries=1, retry_delay=0, catch_exceptions=True", 1).wait()
    assert result.code == 1  # `total` can't add the errors
    assert result.json["ranks"]["lost"] == 0
    counts = cli.times("runs")
    assert set(counts) == {"sleep", "hold_gil", "ignore_signals", "multiply"}
    assert max(counts.values()) == 2, "each is retried once"


def test_kill_the_rank_of_everything_that_runs(cli: Cli) -> None:
    """No process of a task outlives its rank; the tasks run again on the one that takes its place."""
    run = start_hostile(cli, "", 1)
    cli.wait_until(lambda: len(cli.times("runs")) == 4, "all tasks run")
    (rank,) = {cli.rank_of(pid)[1] for pid in cli.processes() if _is_sleep(pid)}
    below = descendants(rank)
    assert sum(map(_is_sleep, below)) == 1 and len(below) > 6
    os.kill(rank, signal.SIGKILL)
    cli.wait_until(lambda: not {*below} & {*cli.processes()}, "all that was below the rank is gone")
    cli.wait_until(lambda: set(cli.times("runs").values()) == {2}, "all tasks run again")
    assert cli("cancel", "w").code == 0
    assert run.wait().json["status"] == "CANCELED"


def test_timeout_fails_the_workflow(cli: Cli) -> None:
    body = """
@ef.task(timeout=0.5, max_retries=1)
def slow(directory):
    log(directory, "slow", 0)
    time.sleep(1000)

def workflow(directory):
    return slow.bind(directory)
"""
    result = cli(*arguments(cli, body), EXOFLOW_RETRY_BACKOFF="0.01")
    assert result.code == 1, result.text
    assert result.json["status"] == "FAILED"
    assert "task 'slow': worker pid" in result.stderr
    assert "attempt 1 ran longer than its timeout of 0.5 s" in result.stderr
    assert "Traceback" not in result.text
    assert cli.times("slow") == {"0": 2}


def test_timeout_is_an_error_of_its_own(cli: Cli) -> None:
    program = cli.directory / "program.py"
    program.write_text("""
import time
import exoflow_hpc as ef

@ef.task(timeout=0.5, max_retries=0)
def slow():
    time.sleep(1000)

try:
    ef.run(slow.bind(), "w", ranks=1)
except ef.TaskTimeoutError as error:
    print(error.task, isinstance(error, ef.TaskError))
""")
    result = cli.program(str(program))
    assert result.stdout == "slow True\n", result.text


def test_memory_fails_the_workflow(cli: Cli) -> None:
    body = """
@ef.task(memory="100 MiB")
def large(directory):
    return len(bytearray(1 << 30))

def workflow(directory):
    return large.bind(directory)
"""
    result = cli(*arguments(cli, body))
    assert result.code == 1, result.text
    assert "task 'large' raised MemoryError: limit memory=100 MiB, allocated" in result.stderr


#: module beside the workflow file: the rank never imports it, only workers do
ERRORS = """
class Strange(Exception):
    def __init__(self, one, two):
        super().__init__("strange")
        self.two = two
    def __reduce__(self):
        return Strange, (1, self.two)
"""

CAUGHT = """
import signal, sys

caught = ef.task(catch_exceptions=True, max_retries=0, checkpoint="sync")

class Unpicklable(Exception):
    def __reduce__(self): raise RuntimeError("no")
    def __str__(self): raise RuntimeError("no")

@caught
def good(): return 7
@caught
def wrong(): return 1 / 0
@caught
def leave(): sys.exit("bye")
@caught
def interrupt(): raise KeyboardInterrupt
@caught
def die(): os._exit(3)
@caught
def rude(): raise Unpicklable
@caught
def foreign():
    import errors_of_the_user
    raise errors_of_the_user.Strange(1, 2)
@caught
def unreturnable(): return lambda: threading.Lock(), threading.Lock()
@ef.task(catch_exceptions=True, max_retries=0, timeout=1)
def slow():
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    while True: pass
@caught
def close():
    os.closerange(0, 10_000)
    return "on it goes"
@ef.task(catch_exceptions=True, max_retries=0, memory="100 MiB")
def large(): return len(bytearray(1 << 30))

@ef.task(checkpoint="sync")
def name(directory, which, pair):
    log(directory, "named", which)
    value, error = pair
    if error is None:
        return value
    return [type(error).__name__, isinstance(error, ef.ExoFlowError), getattr(error, "two", None)]

@ef.task
def together(directory, names, gate):
    return names

def workflow(directory):
    every = [good, wrong, leave, interrupt, die, rude, foreign, unreturnable, slow, close, large]
    names = {f.name: name.bind(directory, f.name, f.bind()) for f in every}
    return together.bind(directory, names, gated.bind(directory, 0, []).after(*names.values()))
"""

EXPECTED: dict[str, Any] = {
    "good": 7,
    "wrong": ["ZeroDivisionError", False, None],
    "leave": ["SystemExit", False, None],
    "interrupt": ["KeyboardInterrupt", False, None],
    "die": ["TaskCrashedError", True, None],
    "rude": ["TaskError", True, None],
    "foreign": ["Strange", False, 2],
    "unreturnable": ["TypeError", False, None],
    "slow": ["TaskTimeoutError", True, None],
    "close": ["TaskCrashedError", True, None],
    "large": ["MemoryError", False, None],
}


def test_caught_failures_are_outputs_that_survive_the_run(cli: Cli) -> None:
    """Each kind of failure comes to its consumer as it is; after kill -9 of everything, from the journal."""
    (cli.directory / "errors_of_the_user.py").write_text(ERRORS)
    cli.start(*arguments(cli, CAUGHT, ranks=2))
    cli.wait_until(lambda: cli.times("gated"), "all failures are caught")
    cli.kill_all()
    assert cli.times("named") == dict.fromkeys(EXPECTED, 1)
    cli.open_gate()
    result = cli("resume", "w", "--ranks", "1", "--json")
    assert result.code == 0, result.text
    assert result.json["output"] == EXPECTED
    assert cli.times("named") == dict.fromkeys(EXPECTED, 1)
    assert result.json["ranks"]["lost"] == 0


def test_caught_failure_that_ends_the_workflow(cli: Cli) -> None:
    """The workflow has succeeded, and its output says with what."""
    body = """
@ef.task(catch_exceptions=True)
def wrong(directory):
    raise ValueError("so it is")

def workflow(directory):
    return wrong.bind(directory)
"""
    result = cli(*arguments(cli, body))
    assert result.code == 0, result.text
    assert result.json["status"] == "SUCCESSFUL"
    assert "so it is" in json.dumps(result.json["output"])
    program = cli.directory / "ask.py"
    program.write_text(
        "import exoflow_hpc as ef\nvalue, error = ef.get_output('w')\n"
        "print(value, repr(error), 'raise ValueError' in error.__cause__.traceback_text)\n"
    )
    assert cli.program(str(program)).stdout == "None ValueError('so it is') True\n"


def test_cancel_while_a_retry_waits(cli: Cli) -> None:
    body = """
@ef.task(checkpoint="sync")
def crash(directory):
    log(directory, "crash", 0)
    os._exit(1)

def workflow(directory):
    return crash.bind(directory)
"""
    run = cli.start(*arguments(cli, body), EXOFLOW_RETRY_BACKOFF="1e9", EXOFLOW_RETRY_BACKOFF_MAX="1e9")
    cli.wait_until(lambda: "exited with status 1" in run.stderr, "the task has crashed")
    assert cli("cancel", "w").code == 0
    assert run.wait().json["status"] == "CANCELED"
    assert cli.times("crash") == {"0": 1}


def test_children_of_a_task_end_with_it(cli: Cli) -> None:
    """A task that has succeeded leaves nothing that runs on beside the next one."""
    body = """
@ef.task
def leave(directory):
    import subprocess
    children = [subprocess.Popen(["sleep", "1000"], start_new_session=new) for new in (True, False)]
    return [child.pid for child in children]

@ef.task
def look(pids):
    return [os.path.exists(f"/proc/{pid}") for pid in pids]

def workflow(directory):
    return look.bind(leave.bind(directory))
"""
    result = cli(*arguments(cli, body))
    assert result.code == 0, result.text
    assert result.json["output"] == [False, False]
