"""Two controllers for one workflow, on two hosts over one directory: never two commits, never two effects (cases 5 and 11, R10).

One is stopped and continued, or both begin at once (for one that is cut off see `test_cut_off`). Their wall clocks differ by hours. Where
they are *far*, each goes on seeing the directory as it was when it first looked, and waits for each answer (see farstorage.c).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from exoflow_hpc import journal, records
from hoplite_mpi.testing import fault
from tests.exoflow_hpc.farstorage.preload import FarHost

from .conftest import Process
from .test_exactly_once import OUTSIDE, effects

if TYPE_CHECKING:
    from .conftest import Cli, Result

__all__: list[str] = []

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]

#: both effects are of one value that varies, and each task goes on acting under its key for as long as it is let
WORKFLOW = (
    OUTSIDE
    + """
def act(directory, value):
    apply(directory, one(value))
    log(directory, "acts", ef.context().task_id, os.getpid())
    deadline = time.monotonic() + 80
    while not os.path.exists(os.path.join(directory, "gate")) and time.monotonic() < deadline:
        apply(directory, one(value))
        time.sleep(0.02)
    return one(value)

u = ef.task(external=True, idempotent=True, name="u")(act)
v = ef.task(external=True, rollback=take_back, name="v")(act)

def workflow(directory):
    a = draw.bind(directory)
    return join.bind(u.bind(directory, a), v.bind(directory, a), passed_on.bind(directory, a))
"""
)

SUBMIT = """
import sys
from exoflow_hpc import api
from exoflow_hpc.storage import Storage
from exoflow_hpc.workflow_file import load, parse_inputs
inputs = parse_inputs(["directory={directory}"])
api.submit(Storage.locate(), load({file!r}, inputs), "w", inputs, unused_inputs=True)
"""

#: so many tasks act at once; how long a rank may act without the controller
SETTINGS = {"EXOFLOW_WORKERS": "2", "EXOFLOW_LEASE": "2"}
RESUME = ("resume", "w", "--ranks", "1", "--json")
HOUR = 3600
#: what a controller says that is not let
REFUSALS = ("is active elsewhere", "has taken over", "has taken epoch", "was begun and is not there")

#: makes hosts over the storage of a `Cli`
Far = Callable[..., FarHost]


@pytest.fixture
def hosts(far_library: Path, cli: Cli) -> Far:
    cli.storage.mkdir()

    def host(name: str, **how: Any) -> FarHost:
        return FarHost(far_library, cli.storage.resolve(), cli.directory / f"cache-{name}", **how)

    return host


def run_args(cli: Cli, ranks: int = 1) -> list[str]:
    inputs = ["--input", f"directory={cli.directory}"]
    return ["run", cli.file(WORKFLOW), "--id", "w", "--ranks", str(ranks), *inputs, "--json"]


def submit(cli: Cli) -> None:
    """Put the workflow into the storage, and begin nothing."""
    script = cli.directory / "submit.py"
    script.write_text(SUBMIT.format(directory=cli.directory, file=cli.file(WORKFLOW)))
    assert cli.program(str(script)).code == 0


def wait_until_both_act(cli: Cli, run: Process, since: int = 0) -> None:
    """Wait until both tasks have acted in that run: *since* so many lines of the log."""

    def acted() -> set[str]:
        return {words[1] for words in cli.log[since:] if words[0] == "acts"}

    cli.wait_until(lambda: acted() == {"u", "v"} or run.popen.poll() is not None, "both act")
    assert run.popen.poll() is None, run.wait().text


def finish(cli: Cli, run: Process, since: int) -> Result:
    """Let a run that has taken over go on to its end, when it has come to where only it may act."""
    wait_until_both_act(cli, run, since)
    cli.open_gate()
    result = run.wait()
    check(cli, result)
    return result


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def wait_for_stop(cli: Cli, directory: Path) -> int:
    """Return the process that has stopped itself at a fault point."""
    (fired,) = cli.wait_until(lambda: fault.fired(directory), "it comes to the point")
    cli.wait_until(lambda: is_stopped(fired.pid), "it stops there")
    return fired.pid


def look(host: FarHost, cli: Cli) -> list[str]:
    """Let a host see what there is of the workflow now, and return what it sees of the journal."""
    code = """
import os, sys
os.chdir(sys.argv[1])
print(*sorted(os.listdir("journal")))
for name in ("heartbeat", *(f"journal/{epoch:08d}" for epoch in range(1, 5))):
    os.path.exists(name)
"""
    command = [sys.executable, "-c", code, str(cli.storage.resolve() / "workflows" / "w")]
    environment = {**cli.environment, **host.environment()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.split()


def check(cli: Cli, result: Result) -> None:
    """One winner, one effect of each task, one commit of each, all of one value."""
    assert result.code == 0, result.text
    assert result.json["status"] == "SUCCESSFUL"
    values = set(result.json["output"])
    assert len(values) == 1
    known = effects(cli)
    assert sorted(key.split("/")[1] for key in known) == ["u", "v"]
    assert set(known.values()) == values
    standing: set[str] = set()
    for record in map(records.decode, journal.read(cli.storage / "workflows" / "w").records):
        if isinstance(record, records.TaskCommitted):
            assert record.task_id not in standing, f"{record.task_id} was committed twice"
            standing.add(record.task_id)
        elif isinstance(record, (records.TaskVoided, records.TaskExpired, records.TaskRolledBack)):
            standing.discard(record.task_id)
    verified = cli("verify", "w")
    assert verified.code == 0, verified.text
    assert cli("status", "w", "--json").json["status"] == "SUCCESSFUL"


def check_fenced(cli: Cli, result: Result, acted: Counter[str]) -> None:
    """Whoever was replaced says so, and does nothing more."""
    assert result.code == 3, result.text
    assert "has taken over this workflow" in result.stderr
    assert "Traceback" not in result.text
    assert cli.times("acts") == acted


def test_the_first_is_stopped(cli: Cli, hosts: Far) -> None:
    """Its workers go on, until its lease is over."""
    first, second = hosts("first", clock=5 * HOUR), hosts("second", clock=-5 * HOUR)
    run = cli.start(*run_args(cli), **first.environment(), **SETTINGS)
    wait_until_both_act(cli, run)
    head = next(pid for pid in cli.processes() if is_head(pid))
    os.kill(head, signal.SIGSTOP)
    taken = finish(cli, cli.start(*RESUME, **second.environment(), **SETTINGS), len(cli.log))
    acted = cli.times("acts")
    os.kill(head, signal.SIGCONT)
    check_fenced(cli, run.wait(), acted)
    check(cli, taken)


def test_the_first_is_stopped_and_the_second_sees_yesterday(cli: Cli, hosts: Far, tmp_path: Path) -> None:
    """What the first has begun is in the journal, and whoever is to do it hasn't been told. The second can't see that there
    was a first: it refuses, and takes over when it can."""
    first = hosts("first", stale=10_000, delay=5, clock=5 * HOUR)
    second = hosts("second", stale=10_000, delay=5, clock=-5 * HOUR)
    submit(cli)
    assert look(second, cli) == []
    (tmp_path / "fired").mkdir()
    faults = {"HOPLITE_FAULT": "0:controller.started=stop", "HOPLITE_FAULT_FIRED": str(tmp_path / "fired")}
    run = cli.start(*run_args(cli), **first.environment(), **SETTINGS, **faults)
    head = wait_for_stop(cli, tmp_path / "fired")
    refused = cli(*RESUME, **second.environment(), **SETTINGS)
    assert refused.code == 2, refused.text
    assert "00000001 was begun and is not there" in refused.stderr
    assert os.listdir(cli.storage / "workflows" / "w" / "journal") == ["00000001"], "nobody was fenced"
    second.forget("n")  # it asks for names again, and still believes its listing
    taken = finish(cli, cli.start(*RESUME, **second.environment(), **SETTINGS), len(cli.log))
    assert look(second, cli) == ["00000002"], "it has seen nothing but what it has made"
    acted = cli.times("acts")
    os.kill(head, signal.SIGCONT)
    check_fenced(cli, run.wait(), acted)
    assert look(first, cli) == ["00000001"]
    check(cli, taken)


def test_one_is_stopped_before_it_says_that_it_began(cli: Cli, hosts: Far, tmp_path: Path) -> None:
    """It has its epoch, and FENCE knows nothing of it until a later one has ended the workflow."""
    first, second = hosts("first", stale=10_000, clock=5 * HOUR), hosts("second", stale=10_000, clock=-5 * HOUR)
    submit(cli)
    assert look(first, cli) == look(second, cli) == []
    (tmp_path / "fired").mkdir()
    faults = {"HOPLITE_FAULT": "0:journal.epoch_created=stop", "HOPLITE_FAULT_FIRED": str(tmp_path / "fired")}
    run = cli.start(*RESUME, **first.environment(), **SETTINGS, **faults)
    head = wait_for_stop(cli, tmp_path / "fired")
    taken = finish(cli, cli.start(*RESUME, **second.environment(), **SETTINGS), 0)
    acted = cli.times("acts")
    os.kill(head, signal.SIGCONT)
    check_fenced(cli, run.wait(), acted)
    check(cli, taken)


@pytest.mark.parametrize("far", [False, True])
def test_both_begin_at_once(cli: Cli, hosts: Far, far: bool) -> None:
    how = {"stale": 10_000, "delay": 20} if far else {}
    pair = [hosts("first", clock=5 * HOUR, **how), hosts("second", clock=-5 * HOUR, **how)]
    submit(cli)
    if far:
        assert [look(host, cli) for host in pair] == [[], []]
    runs = [cli.start(*RESUME, **host.environment(), **SETTINGS) for host in pair]
    cli.wait_until(lambda: any(run.popen.poll() is not None for run in runs), "one of them is refused")
    loser, winner = sorted(runs, key=lambda run: run.popen.poll() is None)
    lost = loser.wait()
    assert lost.code in (2, 3), lost.text
    assert any(text in lost.stderr for text in REFUSALS), lost.text
    assert "Traceback" not in lost.text
    assert winner.popen.poll() is None, winner.wait().text
    cli.open_gate()
    check(cli, winner.wait())


def is_head(pid: int) -> bool:
    """Whether a process is that of rank 0, and not one that it or the launcher started for it."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return words[1:3] == [b"-m", b"exoflow_hpc.rank"] and b"HOPLITE_RANK=0" in environment
