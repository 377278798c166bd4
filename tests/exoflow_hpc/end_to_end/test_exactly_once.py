"""The cases of exactly-once, from outside: workflows with effects in a database are killed, and resumed."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .conftest import Cli, Result

__all__: list[str] = []

pytestmark = pytest.mark.timeout(240)

#: The outside is a database with a row for each idempotency key; a second effect under a key is dropped, and noted if it is not the same.
OUTSIDE = """
import json, secrets, sqlite3

def outside(directory):
    db = sqlite3.connect(os.path.join(directory, "outside.db"), timeout=60)
    db.execute("create table if not exists effects (key text primary key, value text)")
    db.execute("create table if not exists conflicts (key text, value text)")
    return db

def apply(directory, value):
    key, value = ef.context().idempotency_key, json.dumps(value)
    with outside(directory) as db:
        known = db.execute("select value from effects where key = ?", [key]).fetchone()
        if known is None:
            db.execute("insert into effects values (?, ?)", [key, value])
        elif known[0] != value:
            db.execute("insert into conflicts values (?, ?)", [key, value])

def take_back(key, args, result):
    log(args[0], "take_back", key.split("/")[1], key, one(args[1]), json.dumps(result))
    with outside(args[0]) as db:
        db.execute("delete from effects where key = ?", [key])

@ef.task(deterministic=False, checkpoint="skip")
def draw(directory, large=False):
    log(directory, "draw", 0, os.getpid())
    value = secrets.randbelow(10**9)
    return np.full(100_000, value) if large else value

@ef.task(checkpoint="sync")
def passed_on(directory, value):
    log(directory, "passed_on", 0)
    return value

def one(value):
    return int(value[0]) if isinstance(value, np.ndarray) else int(value)

def send(directory, value):
    apply(directory, one(value))
    log(directory, "sent", ef.context().task_id, os.getpid())
    return one(value)

for_good = ef.task(external=True, idempotent=True)(send)
undoable = ef.task(external=True, rollback=take_back)(send)

def wait_for_gate(directory, name):
    log(directory, "waits", name, os.getpid())
    deadline = time.monotonic() + 80
    while not os.path.exists(os.path.join(directory, "gate")):
        if time.monotonic() > deadline:
            raise TimeoutError("the test never opened the gate")
        time.sleep(0.01)

@ef.task(checkpoint="sync")
def gate(directory, *values):
    wait_for_gate(directory, "gate")
    return [one(value) for value in values]

@ef.task
def join(*values):
    return [x for value in values for x in (value if isinstance(value, list) else [one(value)])]
"""


def crash_at_the_gate(cli: Cli, body: str, ranks: int = 1) -> None:
    args = ["--id", "w", "--ranks", str(ranks), "--input", f"directory={cli.directory}"]
    run = cli.start("run", cli.file(OUTSIDE + body), *args)
    cli.wait_until(lambda: cli.times("waits") or run.popen.poll() is not None, "it comes to the gate")
    assert run.popen.poll() is None, run.wait().text
    cli.kill_all()
    cli.open_gate()


def resume(cli: Cli, **environment: str) -> Result:
    return cli("resume", "w", "--ranks", "1", "--json", **environment)


def effects(cli: Cli) -> dict[str, Any]:
    """Return key → value of all effects; nobody may have asked for another one under a known key."""
    with sqlite3.connect(cli.directory / "outside.db") as db:
        assert db.execute("select * from conflicts").fetchall() == []
        return {key: json.loads(value) for key, value in db.execute("select * from effects")}


def test_diamond(cli: Cli) -> None:
    """Case 1: B is committed, C has not run when all dies: both have seen the same value of A."""
    crash_at_the_gate(
        cli,
        """
def workflow(directory):
    a = draw.bind(directory)
    b = passed_on.bind(directory, a)
    return join.bind(b, gate.bind(directory, a).after(b.committed()))
""",
    )
    result = resume(cli)
    assert result.code == 0, result.text
    left, right = result.json["output"]
    assert left == right
    assert cli.times("draw") == {"0": 2}
    assert cli.times("passed_on") == {"0": 2}


def test_effect_for_good(cli: Cli) -> None:
    """Case 2: what varies is committed before an effect that can't be undone, whatever its checkpoint option says."""
    crash_at_the_gate(
        cli,
        """
@ef.task(external=True, idempotent=True)
def send_and_wait(directory, value):
    send(directory, value)
    wait_for_gate(directory, "send")
    return value

def workflow(directory):
    return join.bind(send_and_wait.bind(directory, draw.bind(directory)))
""",
    )
    assert len(effects(cli)) == 1
    result = resume(cli)
    assert result.code == 0, result.text
    assert effects(cli) == {"w/send_and_wait/0": result.json["output"][0]}
    assert cli.times("draw") == {"0": 1}
    assert cli.times("sent") == {"send_and_wait": 2}


@pytest.mark.parametrize("large", [False, True])
def test_rollback(cli: Cli, large: bool) -> None:
    """Case 3: the effect is undone before what it stands on runs again, and comes again under another key.

    A large value is committed before the effect, so that the rollback can be given it; so nothing has to be undone then.
    """
    crash_at_the_gate(
        cli,
        f"""
def workflow(directory):
    a = draw.bind(directory, {large})
    v = undoable.options(checkpoint="skip", name="v").bind(directory, value=a)
    return join.bind(v, gate.bind(directory, a, v))
""",
    )
    before = effects(cli)
    result = resume(cli)
    assert result.code == 0, result.text
    v, *seen = result.json["output"]
    assert seen == [v, v]
    # in both cases v, which was not committed, and may not be repeated, begins another life
    assert effects(cli) == {"w/v/1": v}
    assert result.json["tasks"]["rolled_back"] == 1
    assert cli.times("draw") == {"0": 1 if large else 2}
    (undone,) = [words[1:] for words in cli.log if words[0] == "take_back"]
    assert undone[:2] == ["v", "w/v/0"]
    if not large:
        assert undone[2:] == [str(before["w/v/0"]), "null"]


COMMITTED_AND_LOST = """
def workflow(directory):
    a = draw.bind(directory)
    v = undoable.options(checkpoint="sync", name="v").bind(directory, a)
    w = undoable.options(checkpoint="sync", name="w").bind(directory, v)
    return join.bind(w, gate.bind(directory, a).after(w))
"""


def test_rollback_of_what_was_committed(cli: Cli) -> None:
    """V is committed, but C still needs the value that is lost: V is void. Its rollback is given what it had returned."""
    crash_at_the_gate(cli, COMMITTED_AND_LOST)
    before = effects(cli)
    assert len(before) == 2
    result = resume(cli)
    assert result.code == 0, result.text
    left, right = result.json["output"]
    assert left == right
    assert effects(cli) == {"w/v/1": left, "w/w/1": left}
    value = str(before["w/v/0"])
    undone = [words[1:] for words in cli.log if words[0] == "take_back"]
    assert undone == [["w", "w/w/0", value, value], ["v", "w/v/0", value, value]], "in reverse order of their start"
    assert result.json["tasks"]["rolled_back"] == 2


def test_the_narrow_cut(cli: Cli) -> None:
    """Case 9: V acted on B, which is committed; but C has yet to see A."""
    crash_at_the_gate(
        cli,
        """
def workflow(directory):
    a = draw.bind(directory)
    b = passed_on.bind(directory, a)
    v = for_good.options(name="v").bind(directory, b)
    return join.bind(v, gate.bind(directory, a).after(v.committed()))
""",
    )
    result = resume(cli)
    assert result.code == 0, result.text
    left, right = result.json["output"]
    assert left == right
    assert effects(cli) == {"w/v/0": left}
    assert cli.times("draw") == {"0": 1}


LIES = """
@ef.task(checkpoint="skip")
def lies(directory):
    log(directory, "lies", 0)
    return secrets.randbelow(10**9)

def workflow(directory):
    a = lies.bind(directory)
    v = {effect}.options(name="v", checkpoint="sync").bind(directory, a)
    return join.bind(v, gate.bind(directory, a).after(v.committed()))
"""


def test_a_task_that_is_not_deterministic_after_all(cli: Cli) -> None:
    """R12: what was made of its first value is undone, and the user is told."""
    crash_at_the_gate(cli, LIES.format(effect="undoable"))
    result = resume(cli)
    assert result.code == 0, result.text
    left, right = result.json["output"]
    assert left == right
    assert effects(cli) == {"w/v/1": left}
    assert "task lies is taken to be deterministic" in result.stderr
    assert "deterministic=False" in result.stderr


def test_a_task_that_is_not_deterministic_after_all_under_an_effect_for_good(cli: Cli) -> None:
    """R12: it can't be undone, so the workflow stops."""
    crash_at_the_gate(cli, LIES.format(effect="for_good"))
    before = effects(cli)
    result = resume(cli)
    assert result.code == 1, result.text
    assert result.json["status"] == "FAILED"
    assert "task 'lies' would have to run again" in result.stderr
    assert "'v' is for good" in result.stderr
    assert "Traceback" not in result.text
    assert effects(cli) == before


@pytest.mark.parametrize(
    "point",
    [
        "controller.dispatch@2",
        "controller.started",
        "agent.dispatched@2",
        "agent.task_done@2",
        "controller.committed@1",
        "controller.committed@2",
        "controller.roll_back",
        "controller.started@2",
    ],
)
def test_killed_at_a_point_of_the_first_or_the_second_run(cli: Cli, point: str) -> None:
    """The head dies there, in the first run or, if it didn't come there, in the second; a third one ends as if nothing had been."""
    body = """
def workflow(directory):
    a = draw.bind(directory)
    v = undoable.options(checkpoint="skip", name="v").bind(directory, a)
    u = for_good.options(checkpoint="skip", name="u").bind(directory, passed_on.bind(directory, v))
    return join.bind(u, gate.bind(directory, v))
"""
    rule = f"0:{point.replace('@', '=kill@') if '@' in point else point + '=kill'}"
    fault = {"HOPLITE_FAULT": rule, "EXOFLOW_LEASE": "2"}
    args = ["--id", "w", "--ranks", "1", "--input", f"directory={cli.directory}"]
    run = cli.start("run", cli.file(OUTSIDE + body), *args, **fault)
    cli.wait_until(lambda: cli.times("waits") or run.popen.poll() is not None, "it dies or comes to the gate")
    cli.kill_all()
    run.wait()
    cli.open_gate()
    resume(cli, **fault)
    result = resume(cli, EXOFLOW_LEASE="2")
    assert result.code == 0, result.text
    u, v = result.json["output"]
    assert u == v
    known = effects(cli)
    assert sorted(key.rsplit("/", 1)[0] for key in known) == ["w/u", "w/v"]
    assert set(known.values()) == {u}


@pytest.mark.parametrize(
    ("body", "point"),
    [
        (COMMITTED_AND_LOST, "controller.voided=kill"),
        (COMMITTED_AND_LOST, "controller.voided=kill@2"),
        (COMMITTED_AND_LOST, "controller.rollback_started=kill"),
        (COMMITTED_AND_LOST, "controller.rollback_started=kill@2"),
        (COMMITTED_AND_LOST, "controller.rolled_back=kill"),
        (COMMITTED_AND_LOST, "controller.rolled_back=kill@2"),
        (LIES.format(effect="undoable"), "controller.deviated=kill"),
    ],
)
def test_killed_while_things_are_undone(cli: Cli, body: str, point: str) -> None:
    """The head dies in the middle of its second run, once; the launcher begins a third, which ends as if it had not."""
    crash_at_the_gate(cli, body)
    fired = cli.directory / "fired"
    fired.mkdir()
    result = resume(cli, HOPLITE_FAULT=f"0:{point}", HOPLITE_FAULT_FIRED=str(fired))
    assert [path.name for path in fired.iterdir() if not path.name.startswith(".")] == [f"0:{point}"], (
        "it has died there"
    )
    assert result.code == 0, result.text
    *_, left, right = result.json["output"]
    assert left == right
    known = effects(cli)
    assert {key.split("/")[1] for key in known} == ({"v", "w"} if body == COMMITTED_AND_LOST else {"v"})
    assert set(known.values()) == {left}


def test_the_head_is_stopped_for_longer_than_a_lease(cli: Cli) -> None:
    """All ranks' workers are killed meanwhile; that is nobody's failure, and what they did is undone before it is done again."""
    body = """
@ef.task(external=True, rollback=take_back, max_retries=0)
def act(directory, i):
    apply(directory, i)
    log(directory, "acts", i, os.getpid())
    wait_for_gate(directory, i)
    return i

def workflow(directory):
    return join.bind(*(act.options(name=f"a{i}").bind(directory, i) for i in range(3)))
"""
    args = ["--id", "w", "--ranks", "2", "--input", f"directory={cli.directory}", "--json"]
    settings = {"EXOFLOW_WORKERS": "2", "EXOFLOW_LEASE": "4"}
    run = cli.start("run", cli.file(OUTSIDE + body), *args, **settings)
    cli.wait_until(lambda: len(cli.times("waits")) == 3 or run.popen.poll() is not None, "all act")
    assert run.popen.poll() is None, run.wait().text
    workers = [int(words[2]) for words in cli.log if words[0] == "acts"]
    ranks = dict(cli.rank_of(pid) for pid in workers)
    assert set(ranks) == {0, 1}, "of three tasks two fit on one rank"
    os.kill(ranks[0], signal.SIGSTOP)
    try:
        cli.wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers), "their workers are killed")
    finally:
        os.kill(ranks[0], signal.SIGCONT)
    cli.wait_until(lambda: all(count == 2 for count in cli.times("waits").values()), "all act again")
    cli.open_gate()
    result = run.wait()
    assert result.code == 0, result.text
    assert result.json["output"] == [0, 1, 2]
    assert result.json["tasks"]["rolled_back"] == 3
    assert result.json["ranks"]["lost"] == 0
    assert effects(cli) == {f"w/a{i}/1": i for i in range(3)}
    assert "nothing was heard of the controller" in result.stderr


def test_a_lost_rank_takes_a_value_along(cli: Cli) -> None:
    """In the same run: what was made of it is undone and made again, what wasn't is not."""
    body = """
def workflow(directory, n=4):
    ends = []
    for i in range(n):
        a = draw.options(name=f"a{i}").bind(directory, large=True)
        b = passed_on.options(name=f"b{i}", checkpoint="skip").bind(directory, a)
        v = undoable.options(name=f"v{i}").bind(directory, first.bind(b))
        ends.append(gate.options(name=f"g{i}").bind(directory, a, v))
    return join.bind(*ends)

@ef.task
def first(values):
    return int(values[0])
"""
    args = ["--id", "w", "--ranks", "3", "--input", f"directory={cli.directory}", "--json"]
    # each rank is a node, so what it has is lost with it
    nodes = {"EXOFLOW_WORKERS": "2", "HOPLITE_NODE": "node{rank}"}
    run = cli.start("run", cli.file(OUTSIDE + body), *args, **nodes)
    cli.wait_until(lambda: sum(cli.times("waits").values()) == 4 or run.popen.poll() is not None, "all wait")
    assert run.popen.poll() is None, run.wait().text
    waiting = [cli.rank_of(int(words[2])) for words in cli.log if words[0] == "waits"]
    victims = sorted({(rank, pid) for rank, pid in waiting if rank > 0})
    assert victims, "some of them wait elsewhere than at the head"
    before = effects(cli)
    os.kill(victims[0][1], signal.SIGKILL)
    again = sum(rank == victims[0][0] for rank, _ in waiting)
    cli.wait_until(lambda: sum(cli.times("waits").values()) == 4 + again, "those that were lost wait again")
    cli.open_gate()
    result = run.wait()
    assert result.code == 0, result.text
    pairs = result.json["output"]
    assert pairs[::2] == pairs[1::2]
    after = effects(cli)
    assert sorted(after.values()) == sorted(pairs[::2])
    undone = result.json["tasks"]["rolled_back"]
    assert len(set(before) - set(after)) == undone
    assert 1 <= undone <= again
    assert len(set(before) & set(after)) == 4 - undone
    assert result.json["ranks"]["lost"] == 1


def test_what_can_neither_be_repeated_nor_undone_is_refused(cli: Cli) -> None:
    body = "\n@ef.task(external=True)\ndef charge():\n    pass\n\ndef workflow():\n    return charge.bind()\n"
    result = cli("run", cli.file(body), "--id", "w")
    assert result.code == 2
    assert "task 'charge'" in result.stderr
    assert "idempotent=True" in result.stderr
    assert "Traceback" not in result.text
    assert cli("status", "w").code == 2
