"""A rank that is cut off, and not dead, runs a task with an effect (case 7): on emulated hosts over one directory."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import sys
from typing import TYPE_CHECKING

import pytest

from hoplite_mpi.testing import EmulatedHosts
from hoplite_mpi.transport import guard

from .conftest import Process

if TYPE_CHECKING:
    from .conftest import Cli

__all__: list[str] = []

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to emulate hosts"),
    pytest.mark.skipif(not guard.load().loaded, reason=f"the guard is not there: {guard.load().why}"),
]

RANKS = 3

#: The task goes on acting under its key for as long as it is let.
WORKFLOW = """
import json, socket, sqlite3

def outside(directory):
    db = sqlite3.connect(os.path.join(directory, "outside.db"), timeout=60)
    db.execute("create table if not exists effects (key text, host text)")
    return db

def take_back(key, args, result):
    with outside(args[0]) as db:
        db.execute("delete from effects where key = ?", [key])
    log(args[0], "take_back", key)

@ef.task(external=True, rollback=take_back)
def act(directory, i):
    key, host = ef.context().idempotency_key, socket.gethostname()
    log(directory, "act", i, host, os.getpid(), key)
    while not os.path.exists(os.path.join(directory, "gate")):
        with outside(directory) as db:
            db.execute("insert into effects values (?, ?)", [key, host])
        time.sleep(0.02)
    return key

@ef.task
def both(*keys):
    return sorted(keys)

def workflow(directory):
    return both.bind(*(act.bind(directory, i) for i in range(3)))
"""

#: the command line, with its ranks on hosts
ON_HOSTS = """
import functools, json, sys
from exoflow_hpc import local
from exoflow_hpc.cli.main import main

class Hosts:
    def command_prefix(self, rank):
        return json.loads(sys.argv[1])[rank]

local.LocalRanks = functools.partial(local.LocalRanks, hosts=Hosts())
sys.exit(main(sys.argv[2:]))
"""


def rows(cli: Cli) -> dict[str, set[str]]:
    """Return key → hosts that have acted under it."""
    found: dict[str, set[str]] = {}
    with sqlite3.connect(cli.directory / "outside.db", timeout=60) as db:
        db.execute("create table if not exists effects (key text, host text)")
        for key, host in db.execute("select distinct key, host from effects"):
            found.setdefault(key, set()).add(host)
    return found


def acts(cli: Cli) -> list[list[str]]:
    return [words for words in cli.log if words[0] == "act"]


def act_on(cli: Cli, hosts: EmulatedHosts, workers: int) -> Process:
    """Run the workflow, each rank on a host of its own, until all of its tasks act."""
    script = cli.directory / "on_hosts.py"
    script.write_text(ON_HOSTS)
    prefixes = json.dumps([hosts.command_prefix(rank) for rank in range(RANKS)])
    args = ["run", cli.file(WORKFLOW), "--id", "w", "--ranks", str(RANKS), "--input", f"directory={cli.directory}"]
    command = [sys.executable, str(script), prefixes, *args, "--json", "--storage", str(cli.storage)]
    settings = {"EXOFLOW_WORKERS": str(workers), "EXOFLOW_LEASE": "3"}
    run = Process(command, {**cli.environment, **settings}, cli.directory)
    cli.wait_until(lambda: len(acts(cli)) == 3 or run.popen.poll() is not None, "all act")
    assert run.popen.poll() is None, run.wait().text
    return run


@pytest.mark.parametrize("stopped", [False, True])
def test_what_it_does_is_not_seen_after_it_was_undone(cli: Cli, stopped: bool) -> None:
    """stopped: its rank is, too, so that only the lease ends what its worker does."""
    with EmulatedHosts(RANKS) as hosts:
        run = act_on(cli, hosts, workers=2)
        # two of them at most are at the head, and one rank is left that has room
        _, i, host, worker, key = next(words for words in acts(cli) if words[2] != "h0")
        cli.wait_until(lambda: host in rows(cli).get(key, ()), "it has an effect")
        _, agent = cli.rank_of(int(worker))
        hosts.pull_cable(int(host[1:]))
        if stopped:
            os.kill(agent, signal.SIGSTOP)
        cli.wait_until(lambda: ["take_back", key] in cli.log, "what it did is undone")
        cli.wait_until(
            lambda: [words for words in acts(cli) if words[1] == i and words[4] != key], "it is done elsewhere"
        )
        assert key not in rows(cli), "nobody acts under the old key any more"
        hosts.plug_in(int(host[1:]))
        if stopped:
            os.kill(agent, signal.SIGCONT)
        cli.open_gate()
        result = run.wait()
        assert result.code == 0, result.text
        assert result.json["status"] == "SUCCESSFUL", result.text
        # more than one where the storage was so slow that leases of others ran out
        assert result.json["tasks"]["rolled_back"] >= 1
        known = rows(cli)
        assert set(known) <= set(result.json["output"])  # one that began only when the gate was open has done nothing
        assert key not in known
        assert all(len(hosts_of) == 1 for hosts_of in known.values())


@pytest.mark.parametrize("stopped", [False, True])
def test_the_head_is_cut_off_and_another_rank_goes_on(cli: Cli, stopped: bool) -> None:
    """Two controllers on two hosts over one directory; stopped: the first one can't even find out that it is out of the view."""
    with EmulatedHosts(RANKS) as hosts:
        run = act_on(cli, hosts, workers=1)  # so one acts on each rank
        worker, key = next(words[3:] for words in acts(cli) if words[2] == "h0")
        cli.wait_until(lambda: "h0" in rows(cli).get(key, ()), "it has an effect")
        _, head = cli.rank_of(int(worker))
        hosts.pull_cable(0)
        if stopped:
            os.kill(head, signal.SIGSTOP)
        cli.wait_until(lambda: "goes on" in run.stderr or run.popen.poll() is not None, "another rank goes on")
        cli.wait_until(lambda: ["take_back", key] in cli.log or run.popen.poll() is not None, "what it did is undone")
        assert run.popen.poll() is None, run.wait().text
        assert key not in rows(cli), "nobody acts under the old key any more"
        hosts.plug_in(0)
        if stopped:
            os.kill(head, signal.SIGCONT)
        cli.open_gate()
        result = run.wait()
        assert result.code == 0, result.text
        assert result.json["status"] == "SUCCESSFUL", result.text
        known = rows(cli)
        # one that found a worker only when the gate was open has done nothing
        assert set(known) <= set(result.json["output"])
        assert key not in known
        assert all(len(hosts_of) == 1 for hosts_of in known.values())
