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

#: each task acts outside, and its output is too large for the journal; `block` starts when all others are committed,
#: and those go on only when all are at work, so that each rank has one
WORKFLOW = """
@ef.task(checkpoint="sync")
def meet(directory, i, number):
    here = ef.context()
    log(directory, "block", here.task_id, here.epoch, here.attempt, os.getpid())
    deadline = time.monotonic() + 60
    while len({line.split()[1] for line in open(os.path.join(directory, "log"))}) < number:
        if time.monotonic() > deadline:
            raise TimeoutError("the others never came")
        time.sleep(0.01)
    return np.full(20_000 if i % 2 else 2_000, i)

def workflow(directory, number=1):
    number = int(number)
    met = [meet.bind(directory, i, number) for i in range(number)]
    return total.bind([*met, block.bind(directory, number, met)])
"""


@dataclass(frozen=True)
class Run:
    """What is run, and whose calls are counted."""

    ranks: int
    role: str

    @property
    def output(self) -> int:
        return sum(range(self.ranks)) * 2 + self.ranks

    def command(self, cli: Cli) -> list[str]:
        inputs = [f"directory={cli.directory}", f"number={self.ranks}"]
        options = ["--id", "w", "--ranks", str(self.ranks), "--json"]
        return ["run", cli.file(WORKFLOW), *options, *(word for text in inputs for word in ("--input", text))]


@dataclass(frozen=True)
class Crash:
    """Where the power went."""

    run: Run
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


def start(cli: Cli, power: Power, run: Run, call: int) -> bool:
    """Run the workflow; return whether it lost its power, in which case nothing is alive any more."""
    process = cli.start(*run.command(cli), EXOFLOW_WORKERS="1", **power.environment(run.role, call))
    cli.wait_until(lambda: power.lost or process.popen.poll() is not None, "the run ends or loses its power")
    if power.lost:
        cli.kill_all()
        return True
    assert process.wait().values[0] == run.output
    return False


def clear(cli: Cli, disk: Path) -> None:
    shutil.rmtree(disk)
    disk.mkdir()
    (cli.directory / "log").unlink(missing_ok=True)


def crash(cli: Cli, disk: Path, library: Path, run: Run, call: int) -> Crash | None:
    """Run until the power goes; None if the run made fewer calls: how many records go to one fsync is a matter of time."""
    clear(cli, disk)
    power = Power(library, disk, cli.directory)
    if not start(cli, power, run, call):
        return None
    found = Disk(disk, power.events())
    assert found.everything() == read_image(disk), "the library has missed something"
    return Crash(run, call, cli.log, found)


def recover(cli: Cli, disk: Path, crash: Crash, image: Image) -> None:
    """Go on from an image of the disk, and check that the end is the same."""
    clear(cli, disk)
    write_image(image, disk)
    (cli.directory / "log").write_text("".join(" ".join(words) + "\n" for words in crash.log))
    before = Counter(words[2] for words in crash.log)
    committed = set[str]()
    if "storage/workflows/w" in image:
        directory = Storage(cli.storage, create=False).directory("w")
        records = journal.read(directory).records
        committed = {record["task_id"] for record in records if record["type"] == "task_committed"}
        result = cli("resume", "w", "--ranks", str(crash.run.ranks), "--json", EXOFLOW_WORKERS="1")
    else:
        assert crash.run.role == "cli", "a workflow that ranks were running is gone"
        result = cli(*crash.run.command(cli), EXOFLOW_WORKERS="1")
    assert result.values[0] == crash.run.output, result.text
    assert "Traceback" not in result.text
    if len(before) > crash.run.ranks:
        last = crash.log[-1][2]
        assert before.keys() - {last} <= committed, f"{last} had been started upon commits that are gone"
    after = Counter(words[2] for words in cli.log)
    again = {task for task in committed if after[task] != before[task]}
    assert not again, f"{again} ran again, though committed"
    cli.check_committed_ran_once("w")


@pytest.mark.parametrize(
    "run", [Run(1, "cli"), Run(1, "rank0"), Run(1, "writer0"), Run(2, "writer1")], ids=lambda run: run.role
)
def test_power_goes_before_each_call(cli: Cli, disk: Path, library: Path, run: Run) -> None:
    power = Power(library, disk, cli.directory)
    assert not start(cli, power, run, 0)
    calls = power.calls
    tried = 0
    for call in sample(range(1, calls + 1), 3):
        found = crash(cli, disk, library, run, call)
        if found is None:
            continue
        images = list(found.images())
        for what, image in images if ALL else [random.Random(call).choice(images)]:
            try:
                recover(cli, disk, found, image)
            except (AssertionError, ExoFlowError) as error:
                raise AssertionError(f"the power went before call {call} of {run}; of the disk {what}") from error
            tried += 1
    print(f"{run}: {calls} calls, {tried} recoveries")
    assert tried
