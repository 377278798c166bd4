"""`verify`, `gc`, incremental checkpoints and global arrays on workflows that real ranks have run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import exoflow_hpc as ef

if TYPE_CHECKING:
    from .conftest import Cli

__all__: list[str] = []

pytestmark = pytest.mark.timeout(150)

LOOP = """
@ef.task(checkpoint="sync")
def advance(directory, n, state):
    log(directory, "advance", n)
    state = dict(state or {f"p{k}": np.full(40_000, float(k)) for k in range(10)})
    state[f"p{n}"] = state[f"p{n}"] + 100
    return state

@ef.task
def add(state):
    return sum(float(value[0]) for value in state.values())

def workflow(directory, steps=4):
    state = None
    for n in range(int(steps)):
        state = advance.options(name=f"step{n}").bind(directory, n, state)
    return add.bind(state)
"""
BYTES = 10 * 40_000 * 8


def checkpoints(cli: Cli) -> list[Path]:
    return sorted((cli.storage / "workflows" / "w" / "checkpoints").glob("*.h5"))


def test_loop_that_changes_a_tenth_of_its_state(cli: Cli) -> None:
    """What has not changed is linked; what is damaged is named for each output that uses it; retention says what it took."""
    inputs = ["--input", f"directory={cli.directory}"]
    ran = cli("run", cli.file(LOOP), "--id", "w", "--ranks", "1", *inputs, "--json")
    assert ran.values[0] == 45 + 400
    sizes = [path.stat().st_size for path in checkpoints(cli)]
    assert sizes[0] > BYTES
    assert [size < BYTES / 8 for size in sizes[1:]] == [True] * 3
    checked = cli("verify", "w", "--json")
    assert checked.code == 0, checked.text
    assert (checked.json["ok"], checked.json["outputs"]) == (True, 5)

    kept = checkpoints(cli)[0].read_bytes()
    damaged = cli.damage("w", "step0", 9.0)  # type: ignore[arg-type]
    found = cli("verify", "w")
    assert found.code == 1
    lines = found.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == [f"task step{n}" for n in range(4)]
    assert all(damaged in line for line in lines[:-1])
    checkpoints(cli)[0].write_bytes(kept)

    assert cli("gc").stdout == "freed 0 bytes in 0 files\n"
    freed = cli("gc", "--json", EXOFLOW_RETENTION="needed").json
    assert (freed["files"], len(freed["expired"])) == (4, 4)
    assert freed["nbytes"] == sum(sizes)
    assert checkpoints(cli) == []
    gone = cli("output", "w", "step1")
    assert gone.code == 2
    assert "removed by retention" in gone.stderr
    assert cli("verify", "w").code == 0
    assert cli("output", "w").stdout == "445.0\n"
    again = cli("run", cli.file(LOOP), "--id", "w", "--ranks", "1", *inputs, "--json")
    assert (again.values[0], again.json["tasks"]["run"]) == (445.0, 0)


def test_gc_and_verify_while_it_is_killed_and_resumed(cli: Cli) -> None:
    body = """
def workflow(directory):
    done = [block.options(name=f"b{n}").bind(directory, n, []) for n in range(1, 6)]
    tail = gated.bind(directory, 0, [0]).after(*[one.committed() for one in done])
    return total.bind([*done, tail])
"""
    arguments = ["--ranks", "2", "--json"]
    run = cli.start("run", cli.file(body), "--id", "w", "--input", f"directory={cli.directory}", *arguments)
    cli.wait_until(lambda: cli.times("gated") or run.popen.poll() is not None, "the blocks are committed")
    assert cli("gc").code == 0
    assert cli("verify", "w").code == 0
    assert cli.kill_all() > 0
    orphan = checkpoints(cli)[0].with_name("00000001-7.0-000000001.h5")
    orphan.write_bytes(b"what a killed writer has left" * 100)
    assert cli("gc").stdout == "freed 0 bytes in 0 files\n", "whoever resumes may find that it was named"
    resumed = cli.start("resume", "w", *arguments)
    cli.wait_until(lambda: cli.times("gated")["0"] > 1 or resumed.popen.poll() is not None, "it runs again")
    assert cli("gc").stdout == "freed 2,900 bytes in 1 files\n"
    assert not orphan.exists()
    cli.open_gate()
    assert resumed.wait().values[0] == sum(range(1, 6))
    cli.check_committed_ran_once("w")
    assert cli("verify", "w").code == 0


def test_global_array_of_two_ranks(cli: Cli) -> None:
    body = """
@ef.task(checkpoint="sync")
def rows(start, stop, total):
    whole = np.arange(total * 50.0).reshape(total, 50)
    return ef.Shard(whole[start:stop], (start, 0), whole.shape, "grid")

@ef.task
def norm(parts):
    return sum(float(part.array.sum()) for part in parts)

def workflow(total=90):
    bounds = [0, 5, 40, total]
    return norm.bind([rows.bind(a, b, total) for a, b in zip(bounds, bounds[1:])])
"""
    ran = cli("run", cli.file(body), "--id", "w", "--ranks", "2", "--json")
    whole = np.arange(90 * 50.0).reshape(90, 50)
    assert ran.values[0] == whole.sum()
    found = ef.read_global("w", "grid", cli.storage)
    np.testing.assert_array_equal(found[3:77, 10:20], whole[3:77, 10:20])
    made = cli("array", "w", "grid", "--json").json
    import h5py

    with h5py.File(made["file"]) as file:
        np.testing.assert_array_equal(file["grid"][()], whole)
    assert cli("verify", "w").code == 0
