"""Tasks that continue with a DAG: on real ranks, again and again, with effects, and with kills around the record that says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from .test_exactly_once import OUTSIDE, crash_at_the_gate, effects, resume

if TYPE_CHECKING:
    from .conftest import Cli

__all__: list[str] = []

pytestmark = pytest.mark.timeout(240)

RECURSION = """
@ef.task
def add(*numbers):
    return sum(numbers)

@ef.task
def fibonacci(directory, n):
    log(directory, "fibonacci", n)
    if n < 2:
        return n
    return ef.continuation(add.bind(fibonacci.bind(directory, n - 1), fibonacci.bind(directory, n - 2)))

@ef.task
def countdown(n, big):
    return float(big.sum()) if n == 0 else ef.continuation(countdown.bind(n - 1, big))

def workflow(directory, n=5, deep=0):
    down = countdown.bind(int(deep), np.ones(20_000))
    return add.bind(fibonacci.bind(directory, int(n)), down)
"""


def run(cli: Cli, body: str, **inputs: Any) -> list[str]:
    given = {"directory": cli.directory, **inputs}
    words = [word for key, value in given.items() for word in ("--input", f"{key}={value}")]
    return ["run", cli.file(body), "--id", "w", "--json", *words]


def output(cli: Cli, task: str) -> Any:
    return cli("output", "w", task, "--json").json["output"]


def test_recursion(cli: Cli) -> None:
    result = cli(*run(cli, RECURSION, n=4, deep=3), "--ranks", "2")
    assert result.values[0] == 3 + 20_000
    assert result.json["tasks"]["run"] == 1 + 4 + 9 + 4  # add, a chain of four, a tree of nine with its four sums
    assert output(cli, "fibonacci") == 3
    assert output(cli, "fibonacci/fibonacci_1") == 1
    assert output(cli, "countdown") == output(cli, "countdown/countdown/countdown/countdown") == 20_000
    for what in (["verify", "w"], ["gc", "--retention", "needed"], ["status", "w"], run(cli, RECURSION, n=4, deep=3)):
        assert cli(*what).code == 0
    assert cli("output", "w", "--json").json["output"] == 3 + 20_000


def test_what_runs_and_is_in_memory_is_left_alone(cli: Cli) -> None:
    """While a task continues again and again, another one runs on the same rank or another, and an output is in memory only."""
    body = """
@ef.task(deterministic=False, checkpoint="skip")
def draw(directory):
    log(directory, "draw", 0)
    return np.full(100_000, int(time.time() * 1000))

@ef.task
def countdown(directory, n, drawn):
    log(directory, "countdown", n)
    return 0 if n == 0 else ef.continuation(countdown.bind(directory, n - 1, None))

@ef.task
def joined(drawn, gated, down):
    return [gated, down]

def workflow(directory):
    drawn = draw.bind(directory)
    return joined.bind(drawn, gated.bind(directory, 0, []), countdown.bind(directory, 3, drawn))
"""
    started = cli.start(*run(cli, body), "--ranks", "2")
    cli.wait_until(lambda: cli.times("countdown")["0"] and cli.times("gated"), "the last one has run")
    cli.open_gate()
    result = started.wait()
    assert result.values == ([0, 0], 0, 0)
    assert result.json["tasks"] == {"run": 7, "skipped": 0, "rerun": 0, "rolled_back": 0}
    assert cli.times("gated") == cli.times("draw") == {"0": 1}
    assert cli.times("countdown") == dict.fromkeys("0123", 1)


#: what varies goes on with an effect that is undone, one that can't be, and what takes both
EFFECTS = """
@ef.task
def both(*values):
    return list(values)

@ef.task(deterministic=False)
def decide(directory):
    value = secrets.randbelow(10**9)
    log(directory, "decide", 0)
    undone = undoable.options(name="undone").bind(directory, value)
    return ef.continuation(both.bind(undone, for_good.options(name="for_good").bind(directory, value)))

def workflow(directory):
    return join.bind(decide.bind(directory))
"""
#: where rank 0 is killed, once → how often the task that continues has run in the end
POINTS = {
    "agent.task_done": 2,
    "journal.before_fsync@3": None,
    "journal.after_fsync@3": None,
    "controller.continued": 1,
    "journal.sealed@2": 1,
    "controller.started": 1,
    "agent.task_done@3": 1,
}


@pytest.mark.parametrize("point", POINTS)
def test_killed_around_the_record(cli: Cli, point: str) -> None:
    name, _, number = point.partition("@")
    args = ["--id", "w", "--ranks", "1", "--json", "--input", f"directory={cli.directory}"]
    fired = cli.directory / "fired"
    fired.mkdir()
    fault = f"0:{name}=kill" + (f"@{number}" if number else "")
    faults = {"HOPLITE_FAULT": fault, "HOPLITE_FAULT_FIRED": str(fired)}
    result = cli("run", cli.file(OUTSIDE + EFFECTS), *args, EXOFLOW_LEASE="2", **faults)
    assert list(fired.iterdir())
    if result.code:
        result = resume(cli)
    assert result.code == 0, result.text
    first, second = result.json["output"]
    assert first == second
    found = effects(cli)
    assert set(found.values()) == {first}
    assert found.keys() >= {"w/decide/for_good/0"}
    assert len(found) == 2
    assert POINTS[point] in (None, cli.times("decide")["0"])
    commits = cli.commits("w")
    assert {task: len(each) for task, each in commits.items()} == dict.fromkeys(commits, 1)


@pytest.mark.parametrize(
    "fault", ["0:controller.continued", "0:journal.sealed=kill@2", "1:agent.report", "1:agent.kept"]
)
def test_a_rank_is_lost_as_the_workflow_changes(cli: Cli, fault: str) -> None:
    """The one that controls the run, or the other one: who is left knows the tasks by their names."""
    fired = cli.directory / "fired"
    fired.mkdir()
    faults = {"HOPLITE_FAULT": fault if "=" in fault else f"{fault}=kill", "HOPLITE_FAULT_FIRED": str(fired)}
    args = ["--id", "w", "--ranks", "2", "--json", "--input", f"directory={cli.directory}"]
    result = cli("run", cli.file(OUTSIDE + EFFECTS), *args, EXOFLOW_LEASE="2", **faults)
    assert list(fired.iterdir())
    assert result.code == 0, result.text
    first, second = result.json["output"]
    assert set(effects(cli).values()) == {first} == {second}
    assert cli.times("decide") == {"0": 1}


def test_a_damaged_continuation(cli: Cli) -> None:
    """Its task runs again, and so does what has come of it."""
    body = """
@ef.task(checkpoint="sync")
def big(directory, array):
    log(directory, "big", 0)
    return int(array.sum())

@ef.task
def begin(directory):
    log(directory, "begin", 0)
    return ef.continuation(big.bind(directory, np.full(20_000, 7)))

def workflow(directory):
    return gated.bind(directory, 0, [begin.bind(directory)])
"""
    started = cli.start(*run(cli, body), "--ranks", "1")
    cli.wait_until(lambda: cli.times("gated") or started.popen.poll() is not None, "it comes to the gate")
    cli.kill_all()
    cli.open_gate()
    name = cli.damage("w", "begin", 7)
    assert name in cli("verify", "w").text
    result = cli("resume", "w", "--ranks", "1", "--json")
    assert result.values[0] == 14_000_000
    assert "task begin runs again" in result.stderr
    assert "deterministic" not in result.stderr
    assert cli.times("begin") == cli.times("big") == {"0": 2}
    assert cli("verify", "w").code == 0
    cli.damage("w", "begin", 7)
    assert cli("output", "w").code != 0
    assert cli("resume", "w", "--ranks", "1").code == 0
    assert cli("output", "w", "--json").json["output"] == 14_000_000  # it had succeeded: nothing needs what was damaged


@pytest.mark.parametrize("large", [False, True])
def test_what_it_came_from_is_lost(cli: Cli, large: bool) -> None:
    """It goes on anew, and what it had gone on with is undone first, by its own function."""
    crash_at_the_gate(
        cli,
        f"""
@ef.task
def go_on(directory, value):
    log(directory, "go_on", 0)
    return ef.continuation(passed_on.bind(directory, undoable.bind(directory, value)))

def workflow(directory):
    a = draw.bind(directory, {large})
    b = go_on.bind(directory, a)
    return join.bind(b, gate.bind(directory, a).after(b.committed()))
""",
    )
    (before,) = effects(cli).items()
    assert before[0] == "w/go_on/send/0"
    result = resume(cli)
    assert result.code == 0, result.text
    left, right = result.json["output"]
    assert left == right != before[1]
    assert effects(cli) == {"w/go_on/send/1": left}
    assert [words[2] for words in cli.log if words[0] == "take_back"] == ["w/go_on/send/0"]
    assert cli.times("draw") == cli.times("go_on") == cli.times("passed_on") == {"0": 2}


WRONG = {
    "return [ef.continuation(one.bind())]": "all that a task returns",
    "return ef.continuation(ef.task(external=True)(one.function).bind())": "is external",
    "return ef.continuation(one.bind(ef.put(1)))": "argument 1 (Ref) of task 'one' can't be pickled",
    "return ef.continuation(1)": "has to be a node of a DAG",
}


@pytest.mark.parametrize("body", WRONG)
def test_what_can_not_be_continued_with(cli: Cli, body: str) -> None:
    result = cli(
        *run(
            cli,
            f"""
@ef.task
def one(value=1):
    return value

@ef.task
def wrong():
    {body}

def workflow(directory):
    return wrong.bind()
""",
        ),
        "--ranks",
        "1",
    )
    assert result.code == 1
    assert WRONG[body] in result.json["error"], result.text
