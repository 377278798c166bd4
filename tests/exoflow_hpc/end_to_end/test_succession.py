"""The rank that controls the run dies: another one goes on, and what runs elsewhere is not started again (E16)."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hoplite_mpi.testing import run_ranks

if TYPE_CHECKING:
    from .conftest import Cli, Process

__all__: list[str] = []

pytestmark = pytest.mark.timeout(240)

RANKS = 3
#: each rank is a node of its own, so that its memory is lost with it; one task at a time on each
EACH_A_NODE = {"HOPLITE_NODE": "node{rank}", "EXOFLOW_WORKERS": "1"}

#: put before each workflow
WAITING = """
def wait_for(directory, name):
    deadline = time.monotonic() + 80
    while not os.path.exists(os.path.join(directory, name)):
        assert time.monotonic() < deadline, f"the test never opened the {name}"
        time.sleep(0.01)
"""

#: what is drawn is large or small, stands in memory only, and is never the same twice; `hold` says what it has seen
DRAWN = """
@ef.task(deterministic=False, checkpoint="skip")
def draw(directory, i):
    log(directory, "draw", i, os.getpid())
    while open(os.path.join(directory, "log")).read().count("draw") < 3:  # so each rank draws one
        time.sleep(0.01)
    return np.full(20_000 if i % 2 else 2, int.from_bytes(os.urandom(4), "little"))

@ef.task(checkpoint="skip", deterministic=False)
def hold(directory, i, drawn):
    log(directory, "hold", i, os.getpid(), int(drawn[-1]))
    wait_for(directory, "gate")
    return int(drawn[-1])

@ef.task
def pairs(drawn, held):
    return [[int(a[-1]), b] for a, b in zip(drawn, held)]

def workflow(directory):
    drawn = [draw.bind(directory, i) for i in range(3)]
    return pairs.bind(drawn, [hold.bind(directory, i, one) for i, one in enumerate(drawn)])
"""

#: an effect in a file for each life; a second one, or one that is undone, is seen
ACTING = """
def take_back(key, args, result):
    log(args[0], "take_back", key)

@ef.task(external=True, rollback=take_back, checkpoint="sync")
def act(directory, i):
    here = ef.context()
    log(directory, "act", i, os.getpid(), here.idempotency_key)
    wait_for(directory, "gate")
    log(directory, "acted", i, here.idempotency_key)
    return here.idempotency_key

@ef.task
def both(*keys):
    return sorted(keys)

def workflow(directory):
    return both.bind(*(act.bind(directory, i) for i in range(3)))
"""


def start(cli: Cli, body: str, ranks: int = RANKS, **environment: str) -> Process:
    args = [
        "run",
        cli.file(WAITING + body),
        "--id",
        "w",
        "--ranks",
        str(ranks),
        "--input",
        f"directory={cli.directory}",
        "--json",
    ]
    return cli.start(*args, **{**EACH_A_NODE, **environment})


def on_ranks(cli: Cli, run: Process, kind: str, count: int = RANKS) -> dict[int, tuple[int, str]]:
    """Wait until as many tasks of a kind run; return rank → (its process, what it runs)."""
    found: dict[int, tuple[int, str]] = {}

    def all_run() -> bool:
        found.clear()
        for words in cli.log:
            if words[0] == kind:
                with contextlib.suppress(OSError, AssertionError):  # its process is gone, or its rank is
                    rank, agent = cli.rank_of(int(words[2]))
                    found[rank] = (agent, words[1])
        return len(found) == count

    try:
        cli.wait_until(lambda: run.popen.poll() is not None or all_run(), f"{kind} runs on {count} ranks")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{cli.log}\n{run.stderr}") from None
    assert run.popen.poll() is None, run.wait().text
    return found


def kill_head(cli: Cli, run: Process, kind: str) -> dict[int, tuple[int, str]]:
    """Kill rank 0 while a task runs on each rank, and wait until another one goes on."""
    places = on_ranks(cli, run, kind)
    os.kill(places[0][0], signal.SIGKILL)
    cli.wait_until(lambda: "goes on" in run.stderr or run.popen.poll() is not None, "another rank goes on")
    return places


def test_what_runs_elsewhere_goes_on(cli: Cli) -> None:
    """Their inputs are in memory only, and vary: nobody may see others than they have."""
    run = start(cli, DRAWN)
    places = kill_head(cli, run, "hold")
    lost = places[0][1]
    cli.wait_until(lambda: cli.times("hold")[lost] == 2, "what ran on rank 0 runs elsewhere")
    cli.open_gate()
    result = run.wait()
    assert result.values[1] == 1, result.text
    assert all(drawn == held for drawn, held in result.values[0])
    for kind in ("draw", "hold"):
        assert cli.times(kind) == {str(i): 2 if str(i) == lost else 1 for i in range(3)}
    seen = {words[1]: int(words[3]) for words in cli.log if words[0] == "hold"}
    assert [drawn for drawn, _ in result.values[0]] == [seen[str(i)] for i in range(3)]
    assert result.json["tasks"]["run"] == 7


def test_what_was_finished_counts(cli: Cli) -> None:
    """Outputs, small and large, wait in the memory of other ranks for a task that runs on one of the ranks."""
    late = """
@ef.task(checkpoint="sync")
def late(directory, drawn, held):
    log(directory, "late", 0, os.getpid())
    wait_for(directory, "second")
    return [[int(a[-1]), b] for a, b in zip(drawn, held)]
"""
    run = start(cli, late + DRAWN.replace("pairs.bind(drawn", "late.bind(directory, drawn"))
    head = on_ranks(cli, run, "hold")[0][0]
    at = {words[1]: rank for words in cli.log if words[0] == "hold" and (rank := cli.rank_of(int(words[2]))[0])}
    cli.open_gate()
    ((where, _),) = on_ranks(cli, run, "late", 1).items()
    at = {task: rank for task, rank in at.items() if rank and _was_drawn_beside(cli, task, rank)}
    os.kill(head, signal.SIGKILL)
    cli.wait_until(lambda: "goes on" in run.stderr or run.popen.poll() is not None, "another rank goes on")
    if where == 0:
        cli.wait_until(lambda: cli.times("late")["0"] == 2, "what ran on rank 0 runs elsewhere")
    (cli.directory / "second").touch()
    result = run.wait()
    assert result.values[1] == 1, result.text
    assert all(drawn == held for drawn, held in result.values[0])
    if where:  # it has read all that is lost
        assert cli.times("draw") == cli.times("hold") == {"0": 1, "1": 1, "2": 1}
        assert cli.times("late") == {"0": 1}
    assert {task: cli.times("hold")[task] for task in at} == dict.fromkeys(at, 1)


def _was_drawn_beside(cli: Cli, task: str, rank: int) -> bool:
    return all(cli.rank_of(int(words[2]))[0] == rank for words in cli.log if words[:2] == ["draw", task])


def test_effects_elsewhere_happen_once(cli: Cli) -> None:
    run = start(cli, ACTING, EXOFLOW_LEASE="60")
    places = kill_head(cli, run, "act")
    lost = places[0][1]
    cli.wait_until(lambda: cli.times("act")[lost] == 2, "what was done on rank 0 is done elsewhere")
    cli.open_gate()
    result = run.wait()
    assert result.values[1] == 1, result.text
    assert cli.times("act") == {str(i): 2 if str(i) == lost else 1 for i in range(3)}
    acted = [words[2] for words in cli.log if words[0] == "acted"]
    assert sorted(acted) == result.values[0]
    undone = [words[1] for words in cli.log if words[0] == "take_back"]
    assert len(undone) == 1 and undone[0] not in acted
    assert result.json["tasks"]["rolled_back"] == 1


def test_references_survive(cli: Cli) -> None:
    """Tasks that put objects go on, and what they have returned by reference is read after that; what was there already is made again."""
    body = """
@ef.task(deterministic=False, checkpoint="skip")
def early(directory, i):
    log(directory, "early", i, os.getpid())
    return ef.put(np.full(20_000, int.from_bytes(os.urandom(4), "little")))

@ef.task(deterministic=False, checkpoint="skip")
def hold(directory, i):
    log(directory, "hold", i, os.getpid())
    wait_for(directory, "gate")
    return [ef.put(np.full(20_000, i))]

@ef.task(checkpoint="sync")
def same(ref):
    return ref

@ef.task
def last(held, early, again):
    assert [int(ef.get(one)[0]) for one in early] == [int(ef.get(one)[0]) for one in again]
    return [int(ef.get(one)[0]) for (one,) in held]

def workflow(directory):
    first = [early.bind(directory, i) for i in range(3)]
    again = [same.bind(one) for one in first]
    held = [hold.bind(directory, i).after(again[0], again[1], again[2]) for i in range(3)]
    return last.bind(held, first, again)
"""
    run = start(cli, body)
    places = kill_head(cli, run, "hold")
    lost = places[0][1]
    cli.wait_until(lambda: cli.times("hold")[lost] == 2, "what ran on rank 0 runs elsewhere")
    cli.open_gate()
    result = run.wait()
    assert result.values[:2] == ([0, 1, 2], 1), result.text
    assert cli.times("hold") == {str(i): 2 if str(i) == lost else 1 for i in range(3)}


@pytest.mark.parametrize("point", ["controller.take_over", "controller.taken_over", "agent.report", "agent.kept"])
def test_another_one_dies_at_that(cli: Cli, point: str) -> None:
    """One that takes over, or answers, is killed: the third one goes on, and loses nothing but what the dead have had."""
    fired = cli.directory / "fired"
    fired.mkdir()
    run = start(cli, DRAWN, HOPLITE_FAULT=f"{point}=kill", HOPLITE_FAULT_FIRED=str(fired))
    places = on_ranks(cli, run, "hold")
    os.kill(places[0][0], signal.SIGKILL)
    cli.wait_until(lambda: any(fired.iterdir()) or run.popen.poll() is not None, "another one dies")
    cli.wait_until(lambda: controller(run) or run.popen.poll() is not None, "a third one goes on")
    cli.open_gate()
    result = run.wait()
    assert result.code == 0, result.text
    assert all(drawn == held for drawn, held in result.json["output"])
    assert result.json["ranks"]["lost"] == 2
    spared = [task for task, times in cli.times("hold").items() if times == 1]
    assert len(spared) >= 1, result.text


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("body", "code"), [("return 5", 0), ("raise ValueError('no')", 1)])
def test_the_head_dies_when_the_end_is_durable_and_nobody_was_told(cli: Cli, body: str, code: int, ranks: int) -> None:
    """The one that follows says how it ended, or the launcher if none does; nothing runs again: a failed one would be tried anew."""
    (cli.directory / "fired").mkdir()
    flow = f"""
@ef.task
def last(directory):
    log(directory, "last", 0, os.getpid())
    {body}

def workflow(directory):
    return last.options(max_retries=0).bind(directory)
"""
    run = start(
        cli, flow, ranks, HOPLITE_FAULT="controller.finished=kill", HOPLITE_FAULT_FIRED=str(cli.directory / "fired")
    )
    result = run.wait()
    assert result.code == code, result.text
    assert result.json["status"] == ("FAILED" if code else "SUCCESSFUL")
    assert result.json["output"] == (None if code else 5)
    assert ("ValueError" in result.text) == bool(code)
    assert cli.times("last") == {"0": 1}, result.text


@pytest.mark.parametrize("point", ["controller.dispatch@2", "controller.finished"])
def test_the_head_dies_before_the_others_know_of_the_run(tmp_path: Path, point: str) -> None:
    """The one that follows finds it in the storage: what failed in this run is not tried anew, what is not done is done."""

    def program() -> Any:
        import exoflow_hpc as ef
        from exoflow_hpc.rank.agent import Agent
        from exoflow_hpc.storage import Storage

        @ef.task(max_retries=0)
        def last() -> None:
            with open(tmp_path / "log", "a") as log:
                log.write("last\n")
            raise ValueError("no")

        @ef.task(checkpoint="sync")
        def first() -> int:
            return 1

        session = ef.api.rank_session()
        begin = Agent._begin
        if session.rank:
            Agent._begin = lambda self, rank, message: rank and begin(self, rank, message)
        session.store.allreduce(np.ones(1))  # all have met: MPI crashes a process that meets one that is just gone
        place = Storage(tmp_path)
        if session.rank == 0:
            ef.api.submit(place, last.bind().after(first.bind()), "w", {})
        ended = session.run(lambda: (place, "w"), repeatable=True, quiet=True)
        return ended.status, str(ended.error)

    results = run_ranks(2, program, kill=[(0, point)], env={"EXOFLOW_WORKERS": "1"})
    assert results[1].exitcode == 0, results[1].output
    status, error = results[1].value
    assert (status, "ValueError" in error) == ("FAILED", True)
    assert (tmp_path / "log").read_text() == "last\n"


def controller(run: Process) -> int:
    """Return the rank that controls the run now, as it has said when it took over; 0 if none did."""
    found = re.findall(r"rank (\d+) goes on", run.stderr)
    return int(found[-1]) if found else 0


def test_again_and_again(cli: Cli) -> None:
    """Each rank that controls the run dies in turn, until a replacement of one of them controls it."""
    run = start(cli, DRAWN)
    for times in range(1, 4):
        places = on_ranks(cli, run, "hold")
        os.kill(places[controller(run)][0], signal.SIGKILL)
        cli.wait_until(
            lambda times=times: run.stderr.count("goes on\n") >= times or run.popen.poll() is not None,
            "the next one goes on",
        )
    on_ranks(cli, run, "hold")
    cli.open_gate()
    result = run.wait()
    assert result.values[1:] == (3, 3), result.text
    assert all(drawn == held for drawn, held in result.values[0])


@pytest.mark.parametrize("point", ["controller.dispatch@2", "storage.after_rename"])
def test_a_program_goes_on_without_its_first_rank(tmp_path: Path, point: str) -> None:
    """The rank that controls the runs dies in the first one, or before it has begun; the next one controls the second run, too."""

    def program() -> Any:
        import exoflow_hpc as ef

        @ef.task(checkpoint="sync")
        def add(*numbers: int) -> int:
            return sum(numbers)

        session = ef.api.rank_session()
        session.store.allreduce(np.ones(1))  # all have met: MPI crashes a process that meets one that is just gone
        results = []
        for name in ("first", "second"):
            node = add.bind(add.bind(1), add.bind(2), len(results))
            results.append(ef.run(node, name, storage=tmp_path))
        return results, session.led

    results = run_ranks(3, program, kill=[(0, point)])
    assert results[0].exitcode == -signal.SIGKILL
    for rank in (1, 2):
        assert results[rank].exitcode == 0, results[rank].output
    assert [results[rank].value[0] for rank in (1, 2)] == [[3, 4]] * 2
    assert sorted(results[rank].value[1] for rank in (1, 2)) == [False, True]
