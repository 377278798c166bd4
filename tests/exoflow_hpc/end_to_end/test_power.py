"""Loss of power at each call that the rank with the controller, its checkpoint writer or the command makes (case 4).

What the tasks did outside stays, the disk is what it can be, and `resume` brings the run to the same end without
running again what the journal says is committed.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from exoflow_hpc import journal
from exoflow_hpc.errors import ExoFlowError
from exoflow_hpc.storage import Storage
from tests.exoflow_hpc.powerloss.disk import Disk, Image, read_image, write_image
from tests.exoflow_hpc.powerloss.preload import Power
from tests.exoflow_hpc.powerloss.sampling import ALL, sample

if TYPE_CHECKING:
    from .conftest import Cli

__all__: list[str] = []

pytestmark = [pytest.mark.timeout(3000 if ALL else 240), pytest.mark.slow]

#: the outputs of `first` and `second` are too large for the journal; `second` acts outside after `first` is committed
WORKFLOW = """
def workflow(directory):
    first = block.bind(directory, 0, [])
    second = block.bind(directory, 1, [first])
    return total.bind([first, second])
"""
OUTPUT = 0 + 1


@dataclass(frozen=True)
class Crash:
    """Where the power went: before call *call* of the processes with the role."""

    role: str
    call: int
    #: what had been done outside, line by line
    log: list[list[str]]
    disk: Disk

    def images(self) -> Iterator[tuple[str, Image]]:
        yield "nothing lasted", self.disk.nothing()
        yield "everything lasted", self.disk.everything()
        yield "a mixture", self.disk.mixture(self.call)


@pytest.fixture
def disk(cli: Cli) -> Path:
    """Return the directory whose power goes; the storage is in it, what the tasks do outside is not."""
    path = cli.directory / "disk"
    path.mkdir()
    cli.storage = path / "storage"
    return path


def start(cli: Cli, power: Power, role: str, call: int) -> bool:
    """Run the workflow; return whether it lost its power, in which case nothing is alive any more."""
    run = cli.start(
        *("run", cli.file(WORKFLOW), "--id", "w", "--ranks", "1", "--json"),
        *("--input", f"directory={cli.directory}"),
        **power.environment(role, call),
    )
    cli.wait_until(lambda: power.lost or run.popen.poll() is not None, "the run ends or loses its power")
    if power.lost:
        cli.kill_all()
        return True
    assert run.wait().values[0] == OUTPUT
    return False


def clear(cli: Cli, disk: Path) -> None:
    shutil.rmtree(disk)
    disk.mkdir()
    (cli.directory / "log").unlink(missing_ok=True)


def crash(cli: Cli, disk: Path, library: Path, role: str, call: int) -> Crash | None:
    """Run until the power goes; None if the run made fewer calls: how many records go to one fsync is a matter of time."""
    clear(cli, disk)
    power = Power(library, disk, cli.directory)
    if not start(cli, power, role, call):
        return None
    found = Disk(disk, power.events())
    assert found.everything() == read_image(disk), "the library has missed something"
    return Crash(role, call, cli.log, found)


def recover(cli: Cli, disk: Path, crash: Crash, image: Image) -> None:
    """Go on from an image of the disk, and check that the end is the same."""
    clear(cli, disk)
    write_image(image, disk)
    (cli.directory / "log").write_text("".join(" ".join(words) + "\n" for words in crash.log))
    before = Counter(words[2] for words in crash.log)
    known = "storage/workflows/w" in image
    if known:
        directory = Storage(cli.storage, create=False).directory("w")
        records = journal.read(directory).records
        committed = {record["task_id"] for record in records if record["type"] == "task_committed"}
        result = cli("resume", "w", "--ranks", "1", "--json")
    else:
        assert crash.role == "cli", "a workflow that ranks were running is gone"
        committed = set()
        again = ("run", cli.file(WORKFLOW), "--id", "w", "--ranks", "1", "--json")
        result = cli(*again, "--input", f"directory={cli.directory}")
    assert result.values[0] == OUTPUT, result.text
    assert "Traceback" not in result.text
    tasks = [words[2] for words in crash.log]
    if len(set(tasks)) == 2:
        assert tasks[0] in committed, "a task had been started by a commit that is gone"
    after = Counter(words[2] for words in cli.log)
    assert {task: after[task] for task in committed if task in after} == {
        task: before[task] for task in committed if task in after
    }, "a committed task ran again"
    cli.check_committed_ran_once("w")


@pytest.mark.parametrize("role", ["cli", "rank0", "writer0"])
def test_power_goes_before_each_call(cli: Cli, disk: Path, library: Path, role: str) -> None:
    power = Power(library, disk, cli.directory)
    assert not start(cli, power, role, 0)
    calls = power.calls
    assert calls > 10
    tried = 0
    for call in sample(range(1, calls + 1), 4):
        found = crash(cli, disk, library, role, call)
        if found is None:
            continue
        images = list(found.images())
        for what, image in images if ALL else [random.Random(call).choice(images)]:
            try:
                recover(cli, disk, found, image)
            except (AssertionError, ExoFlowError) as error:
                raise AssertionError(f"the power went before call {call} of {role}; of the disk {what}") from error
            tried += 1
    print(f"{role}: {calls} calls, {tried} recoveries")
    assert tried
