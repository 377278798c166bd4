"""Objects by reference, from outside: handed on in every way, lost with ranks, damaged, resumed, collected (R7, cases 6 and 10)."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from .test_exactly_once import OUTSIDE, crash_at_the_gate, effects, resume

if TYPE_CHECKING:
    from .conftest import Cli

__all__: list[str] = []

pytestmark = pytest.mark.timeout(240)

#: each rank is a node with one worker: bytes have to move, and what a rank has is lost with it
NODES = {"EXOFLOW_WORKERS": "1", "HOPLITE_NODE": "node{rank}"}

TASKS = """
def meet(directory, kind, count):
    "Return when that many tasks of this kind have begun."
    deadline = time.monotonic() + 80
    while True:
        with open(os.path.join(directory, "log")) as file:
            if sum(line.split()[0] == kind for line in file) >= count:
                return
        if time.monotonic() > deadline:
            raise TimeoutError(f"the others never came: {kind}")
        time.sleep(0.01)

@ef.task(deterministic=False, checkpoint="skip")
def draw_ref(directory, i=0, others=1):
    log(directory, "draw", i, os.getpid())
    meet(directory, "draw", others)
    value = secrets.randbelow(10**9)
    # beside it something that the journal doesn't take: so a commit writes twice
    return {"ref": ef.put(np.full(100_000, value)), "value": value, "ballast": np.zeros(2_000)}

@ef.task(checkpoint="skip")
def hand_on(directory, given, i=0):
    log(directory, "handed_on", i, os.getpid())
    return given

@ef.task
def read(directory, given, i=0):
    log(directory, "read", i, os.getpid())
    return [int(ef.get(given["ref"])[-1]), given["value"]]
"""


def references(cli: Cli, task: str) -> list[dict[str, Any]]:
    """Return what the last record of a task says of what its output refers to."""
    names = ("task", "attempt", "index", "file", "entry", "checksum", "nbytes", "meta", "refers")
    return [dict(zip(names, wire, strict=True)) for wire in cli.commits("w")[task][-1][1].get("references", [])]


def damage(cli: Cli, file: str, value: int) -> None:
    """Flip a byte of an array full of *value*."""
    path = cli.storage / "workflows" / "w" / "checkpoints" / file
    data = bytearray(path.read_bytes())
    data[data.index(np.full(100, value).tobytes()) + 1] ^= 1
    path.write_bytes(data)


def epochs(cli: Cli) -> int:
    return len(list((cli.storage / "workflows" / "w" / "journal").iterdir()))


HANDED_ON = """
@ef.task(checkpoint="skip")
def make(directory):
    array = ef.put(np.arange(300_000))
    ef.put(b"nobody is given this")
    return {"array": [array], "nested": ef.put({"array": array, "text": "small", "more": ef.put([array, (1, 2)])})}

@ef.task(checkpoint="skip")
def choose(directory, made):
    nested = ef.get(made["nested"])
    assert nested["array"] == made["array"][0]
    return made["nested"], nested["more"], ef.put(np.full(70_000, 3))

@ef.task
def look(directory, chosen, i):
    # as many at once as there are ranks: each on another one
    log(directory, "look", i, os.getpid())
    meet(directory, "look", 2)
    nested, more, threes = map(ef.get, chosen)
    again, pair = more
    array = ef.get(nested["array"])
    assert not array.flags.writeable and array is not ef.get(again)
    assert nested["text"] == "small" and pair == (1, 2)
    return [int(array.sum()), int(ef.get(again)[-1]), int(threes.sum())]

@ef.task
def both(*values):
    return values

def workflow(directory):
    chosen = choose.bind(directory, make.bind(directory))
    return both.bind(*(look.bind(directory, chosen, i) for i in range(2)))
"""


def test_returned_nested_shared_and_handed_on(cli: Cli) -> None:
    args = ["--id", "w", "--ranks", "2", "--input", f"directory={cli.directory}", "--json"]
    result = cli("run", cli.file(OUTSIDE + TASKS + HANDED_ON), *args, **NODES)
    assert result.code == 0, result.text
    seen = [299_999 * 150_000, 299_999, 210_000]
    assert result.json["output"] == [seen, seen]
    ranks = {words[2] for words in cli.log if words[0] == "look"}
    assert len(ranks) == 2, "they ran in two processes at once"
    assert cli("verify", "w").code == 0


def test_case_6_a_rank_takes_the_only_copy_along(cli: Cli) -> None:
    """Only its creator, and what handed it on, run again; the run is not restarted."""
    body = """
def workflow(directory, n=3):
    drawn = [draw_ref.options(name=f"a{i}").bind(directory, i, n) for i in range(n)]
    handed = [hand_on.options(name=f"p{i}").bind(directory, drawn[i], i) for i in range(n)]
    opened = gate.bind(directory)
    for one in handed:
        opened.after(one)
    return join.bind(*(read.options(name=f"r{i}").bind(directory, handed[i], i).after(opened) for i in range(n)))
"""
    args = ["--id", "w", "--ranks", "3", "--input", f"directory={cli.directory}", "--json"]
    run = cli.start("run", cli.file(OUTSIDE + TASKS + body), *args, **NODES)
    cli.wait_until(lambda: cli.times("waits") or run.popen.poll() is not None, "it comes to the gate")
    assert run.popen.poll() is None, run.wait().text
    made = {words[1]: cli.rank_of(int(words[2])) for words in cli.log if words[0] == "draw"}
    handed = {words[1]: cli.rank_of(int(words[2])) for words in cli.log if words[0] == "handed_on"}
    assert made == handed, "what is handed on is handed on where it is"
    assert len(set(made.values())) == 3
    (waiting,) = [cli.rank_of(int(words[2])) for words in cli.log if words[0] == "waits"]
    victim, where = next((i, where) for i, where in made.items() if where[0] != 0 and where != waiting)
    os.kill(where[1], signal.SIGKILL)
    cli.wait_until(lambda: cli.times("handed_on")[victim] == 2, "what was lost is made again")
    cli.open_gate()
    result = run.wait()
    assert result.code == 0, result.text
    pairs = result.json["output"]
    assert pairs[::2] == pairs[1::2]
    once = {str(i): 1 + (str(i) == victim) for i in range(3)}
    assert cli.times("draw") == cli.times("handed_on") == once
    assert cli.times("read") == {"0": 1, "1": 1, "2": 1}
    assert result.json["ranks"]["lost"] == 1
    assert epochs(cli) == 1


CASE_10 = """
@ef.task(external=True, idempotent=True)
def act(directory, given):
    value = int(ef.get(given["ref"])[0])
    assert value == given["value"]
    apply(directory, value)
    log(directory, "acts", ef.context().attempt, os.getpid())
    wait_for_gate(directory, "act")
    return value

def workflow(directory):
    a = draw_ref.options(name="a").bind(directory)
    b = hand_on.options(name="b", checkpoint="{checkpoint}").bind(directory, a)
    return join.bind(act.options(name="v").bind(directory, b))
"""


@pytest.mark.parametrize("checkpoint", ["sync", "skip"])
def test_case_10_a_reference_handed_on_outlives_everything(cli: Cli, checkpoint: str) -> None:
    """The commit before the effect holds the bytes: of what is handed on (B), or else of where it comes from (A)."""
    crash_at_the_gate(cli, TASKS + CASE_10.replace("{checkpoint}", checkpoint))
    committed = "b" if checkpoint == "sync" else "a"
    assert list(cli.commits("w")) == [committed]
    (one,) = references(cli, committed)
    assert (one["task"], one["index"], one["nbytes"]) == ("a", 0, 800_000)
    (acted,) = effects(cli).values()
    result = resume(cli)
    assert result.code == 0, result.text
    assert result.json["output"] == [acted]
    assert list(effects(cli).values()) == [acted]
    assert cli.times("draw") == {"0": 1}
    assert sum(cli.times("acts").values()) == 2


def test_case_10_the_rank_that_held_the_bytes_dies(cli: Cli) -> None:
    """The others go on: what is committed is read from its checkpoint."""
    body = """
@ef.task(external=True, idempotent=True)
def act(directory, given):
    value = int(ef.get(given["ref"])[0])
    apply(directory, value)
    return [value, given["value"]]

def workflow(directory, n=2):
    ends = []
    handed = []
    for i in range(n):
        a = draw_ref.options(name=f"a{i}").bind(directory, i, n)
        handed.append(hand_on.options(name=f"b{i}", checkpoint="sync").bind(directory, a, i))
    opened = gate.bind(directory)
    for one in handed:
        opened.after(one.committed())
    return join.bind(*(act.options(name=f"v{i}").bind(directory, one).after(opened) for i, one in enumerate(handed)))
"""
    args = ["--id", "w", "--ranks", "2", "--input", f"directory={cli.directory}", "--json"]
    run = cli.start("run", cli.file(OUTSIDE + TASKS + body), *args, **NODES)
    cli.wait_until(lambda: cli.times("waits") or run.popen.poll() is not None, "it comes to the gate")
    assert run.popen.poll() is None, run.wait().text
    (victim,) = {pid for rank, pid in (cli.rank_of(int(words[2])) for words in cli.log if words[0] == "draw") if rank}
    os.kill(victim, signal.SIGKILL)
    cli.open_gate()
    result = run.wait()
    assert result.code == 0, result.text
    pairs = result.json["output"]
    assert pairs[::2] == pairs[1::2]
    assert sorted(effects(cli).values()) == sorted(pairs[::2])
    assert cli.times("draw") == cli.times("handed_on") == {"0": 1, "1": 1}
    assert epochs(cli) == 1


DAMAGED = """
@ef.task(checkpoint="sync")
def salted(directory):
    log(directory, "salted", 0)
    with open(os.path.join(directory, "salt")) as file:
        return ["text", ef.put(np.full(20_000, int(file.read())))]

@ef.task(checkpoint="sync")
def same(directory, given):
    log(directory, "same", 0)
    return given[1]

@ef.task
def first(directory, ref, waited=None):
    return int(ef.get(ref)[0])

def workflow(directory):
    ref = same.bind(directory, salted.bind(directory))
    return first.bind(directory, ref, gated.bind(directory, 0, [0]).after(ref.committed()))
"""


@pytest.mark.parametrize("salt", [7, 8])
def test_damaged_checkpoint(cli: Cli, salt: int) -> None:
    """It is reported by name, and computed again with all that refers to it; another value than before is noticed (R12)."""
    (cli.directory / "salt").write_text("7")
    run = cli.start("run", cli.file(DAMAGED), "--id", "w", "--ranks", "1", "--input", f"directory={cli.directory}")
    cli.wait_until(lambda: cli.times("gated") or run.popen.poll() is not None, "what comes before is committed")
    cli.kill_all()
    cli.open_gate()
    (here,), (there,) = references(cli, "salted"), references(cli, "same")
    assert here == there, "it was written once"
    damage(cli, here["file"], 7)
    report = cli("verify", "w", "--json")
    assert report.code == 1
    (finding,) = report.json["findings"]
    assert (finding["task"], finding["entry"]) == ("salted", here["entry"])
    assert here["file"] in finding["file"]
    (cli.directory / "salt").write_text(str(salt))
    result = cli("resume", "w", "--ranks", "2", "--json")
    assert result.values == (salt, 0, 0)
    assert here["file"] in result.stderr
    assert ("taken to be deterministic" in result.stderr) == (salt != 7)
    assert cli.times("salted") == {"0": 2 if salt == 7 else 3}
    assert cli("verify", "w").code == 0


KEPT = """
@ef.task(checkpoint="sync")
def make(directory):
    log(directory, "make", 0)
    return {"large": np.full(20_000, 5), "ref": ef.put([ef.put(np.full(20_000, 6)), "nested"])}

@ef.task(checkpoint="sync")
def after_gate(directory, made, waited):
    return [made["ref"], ef.put(np.full(20_000, 7))]

def workflow(directory):
    made = make.bind(directory)
    return after_gate.bind(directory, made, gated.bind(directory, 0, [0]).after(made.committed()))
"""

READ = """
import json, sys
import exoflow_hpc as ef
outer, sevens = ef.get_output("w")
sixes, text = ef.get(outer)
print(json.dumps([text, int(ef.get(sixes)[-1]), int(ef.get(sevens)[-1]), repr(sevens)]))
"""


def test_resumed_collected_and_read_by_a_program(cli: Cli) -> None:
    """What an older epoch has written is not written again, and stays as long as an output refers to it."""
    run = cli.start("run", cli.file(KEPT), "--id", "w", "--ranks", "1", "--input", f"directory={cli.directory}")
    cli.wait_until(lambda: cli.times("gated") or run.popen.poll() is not None, "what comes before is committed")
    cli.kill_all()
    cli.open_gate()
    result = cli("resume", "w", "--ranks", "2", "--json")
    assert result.code == 0, result.text
    assert cli.times("make") == {"0": 1}
    made, end = references(cli, "make"), references(cli, "after_gate")
    assert [one["refers"] for one in made] == [[1], []]
    assert [(one["task"], one["index"]) for one in end] == [("make", 1), ("after_gate", 0), ("make", 0)]
    assert {one["file"] for one in made} == {one["file"] for one in end if one["task"] == "make"}
    script = cli.directory / "read.py"
    script.write_text(READ)
    for command in (["status", "w"], ["gc"], ["gc", "--retention", "needed"], ["gc"]):
        assert cli(*command).code == 0
        checked = cli("verify", "w", "--json").json
        assert (checked["ok"], checked["references"]) == (True, 3)
        read = cli.program(str(script))
        assert read.code == 0, read.text
        assert json.loads(read.stdout) == ["nested", 6, 7, "<Ref to object 0 of task 'after_gate'>"]
    assert cli("delete", "w").code == 0
    assert not (cli.storage / "workflows" / "w").exists()


def test_worker_that_dies_after_a_put(cli: Cli) -> None:
    body = """
@ef.task
def put_and_die(directory):
    ref = ef.put(np.arange(100_000))
    log(directory, "put", ef.context().attempt)
    if ef.context().attempt == 0:
        os._exit(9)
    return ref

def workflow(directory):
    return read_sum.bind(put_and_die.bind(directory))

@ef.task
def read_sum(ref):
    return int(ef.get(ref).sum())
"""
    result = cli("run", cli.file(body), "--ranks", "1", "--input", f"directory={cli.directory}", "--json")
    assert result.values[0] == 99_999 * 50_000
    assert cli.times("put") == {"0": 1, "1": 1}


def test_rollback_is_given_what_the_task_was_given(cli: Cli) -> None:
    body = """
def undo(key, args, result):
    log(args[0], "undone", int(ef.get(args[1]["ref"])[0]), args[1]["value"])

@ef.task(external=True, rollback=undo)
def act(directory, given):
    log(directory, "acts", int(ef.get(given["ref"])[0]), given["value"])
    if ef.context().incarnation == 0:
        os._exit(9)
    return given["value"]

def workflow(directory):
    return act.bind(directory, draw_ref.bind(directory))
"""
    result = cli(
        "run", cli.file(OUTSIDE + TASKS + body), "--ranks", "1", "--input", f"directory={cli.directory}", "--json"
    )
    assert result.code == 0, result.text
    value = str(result.json["output"])
    assert [words for words in cli.log if words[0] != "draw"] == [
        ["acts", value, value],
        ["undone", value, value],
        ["acts", value, value],
    ]


def test_wrong_uses_are_errors_of_the_task(cli: Cli) -> None:
    body = """
@ef.task
def first():
    ef.put("nobody is given this")
    return ef.put(1), "text"

@ef.task
def second(before):
    import pickle
    texts = []
    for wrong in (lambda: ef.get(before), lambda: pickle.dumps(before[0])):
        try:
            wrong()
        except (TypeError, ef.ExoFlowError) as error:
            texts.append(f"{type(error).__name__}: {error}")
    return texts

def workflow():
    return second.bind(first.bind())
"""
    result = cli("run", cli.file(body), "--ranks", "1", "--json")
    assert result.code == 0, result.text
    got, pickled = result.json["output"]
    assert got.startswith("TypeError: ef.get() takes a reference")
    assert pickled.startswith("TypeError: <Ref to object 1 of task 'first'> can't be pickled here")


def test_killed_in_the_middle_of_a_put(cli: Cli) -> None:
    """Its memory is nobody's then, and the next attempt puts the same under another id."""
    body = """
@ef.task(checkpoint="skip")
def make(directory):
    log(directory, "make", 0, os.getpid())
    return ef.put(np.arange(300_000))

@ef.task
def last(ref):
    return int(ef.get(ref)[-1])

def workflow(directory):
    return last.bind(make.bind(directory))
"""
    fired = cli.directory / "fired"
    fired.mkdir()
    args = ["run", cli.file(body), "--id", "w", "--ranks", "1", "--input", f"directory={cli.directory}", "--json"]
    result = cli(*args, HOPLITE_FAULT="worker.before_put=kill", HOPLITE_FAULT_FIRED=str(fired))
    assert result.values == (299_999, 0, 0)
    assert cli.times("make") == {"0": 2}
    assert list(fired.iterdir())


@pytest.mark.parametrize("checkpoint", ["sync", "skip"])
@pytest.mark.parametrize(
    "point", ["agent.task_done=kill", "agent.written=kill", "agent.written=kill@2", "controller.committed=kill"]
)
def test_the_head_is_killed_on_the_way_to_the_record(cli: Cli, checkpoint: str, point: str) -> None:
    """Between the put, the bytes of the object, those of the output, and the record: V acts once, on one value."""
    fired = cli.directory / "fired"
    fired.mkdir()
    cli.open_gate()
    body = CASE_10.replace("{checkpoint}", checkpoint)
    args = ["--id", "w", "--ranks", "1", "--input", f"directory={cli.directory}", "--json"]
    settings = {"HOPLITE_FAULT": f"0:{point}", "HOPLITE_FAULT_FIRED": str(fired)}
    result = cli("run", cli.file(OUTSIDE + TASKS + body), *args, **settings)
    assert [path.name for path in fired.iterdir() if not path.name.startswith(".")] == [f"0:{point}"]
    assert result.code == 0, result.text
    assert list(effects(cli).values()) == result.json["output"]
    assert cli("verify", "w").code == 0
