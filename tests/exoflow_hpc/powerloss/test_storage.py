"""Storage, journal and checkpoints, without a run: the power goes before each of their calls in turn.

A script is run once; what it has done up to a call is what it would have done if it had been killed there, so each
prefix of its log is a crash, and each is tried with all the images that `Disk` makes of it. What the script had been
told is durable is in the log, too.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exoflow_hpc import checkpoint, journal, serialize
from exoflow_hpc.errors import CorruptCheckpointError, ExoFlowError
from exoflow_hpc.journal import Journal
from exoflow_hpc.storage import Storage

from .disk import Disk, Image, write_image
from .preload import Event, Op, Power
from .sampling import ALL, sample
from .scripts import run_script

__all__: list[str] = []

pytestmark = pytest.mark.timeout(1200 if ALL else 120)

#: seeds of the mixtures that are tried at each call: of a script that is run once, and of those that are run many times
SEEDS_ONCE, SEEDS = range(20 if ALL else 3), range(3 if ALL else 2)

OPEN = """
from exoflow_hpc.storage import Storage
from exoflow_hpc.journal import Journal
storage = Storage(disk / "a" / "storage")
"""

CREATE = OPEN + 'storage.create("w", b"spec" * 500)\nnote("created w")\n'

JOURNAL = (
    CREATE
    + """
n = 0
for epoch in (1, 2, 3):
    opened, history = Journal.open(storage.directory("w"))
    assert [record["n"] for record in history.records] == list(range(n))
    note("epoch", opened.epoch)
    for group in range(3):
        futures = [opened.append({"type": "r", "n": n + i, "data": b"x" * 700 * i}) for i in range(3)]
        for future in futures:
            future.result(30)
            note("record", n)
            n += 1
    opened.close()
"""
)

DELETE = (
    CREATE
    + """
storage.create("other", b"abc")
note("created other")
opened, _ = Journal.open(storage.directory("w"))
note("epoch", opened.epoch)
opened.append({"type": "r", "n": 0, "data": b""}).result(30)
note("record 0")
opened.close()
note("deleting w")
storage.delete("w")
note("deleted w")
storage.create("w", b"spec" * 500)
note("created again")
"""
)

VALUES: list[Any] = [np.arange(900.0), {"a": [1, np.arange(1500)], "b": "text"}, b"bytes" * 200, np.float32(1)]

CHECKPOINT = (
    CREATE
    + """
import json
import numpy as np
from exoflow_hpc import serialize
from exoflow_hpc.checkpoint.group import Item, write_group
from tests.exoflow_hpc.powerloss.test_storage import VALUES
for number in range(2):
    items = []
    for index, value in enumerate(VALUES[number:]):
        plan = serialize.pack(value)
        items.append(Item(f"task{index}", f"e{index}", plan.meta, plan.to_bytes()))
    directory = storage.directory("w") / "checkpoints"
    for result, value in zip(write_group(directory, f"00000001-0.0-00000000{number}.h5", items), items):
        note("written", json.dumps([result.file, result.entry, result.checksum]))
"""
)


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the real disk what is only looked at once. The scripts are processes of their own, and do it all."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(os, "fdatasync", lambda fd: None)
    monkeypatch.setattr(journal, "_PREALLOCATE", 0)


def crashes(
    disk: Disk, events: list[Event], said: Sequence[str] = (), seeds: Sequence[int] = SEEDS
) -> Iterator[tuple[str, list[str], Image]]:
    """Yield what the crash is, what had been said by then, and an image, for each crash before a call, or at the end."""
    said = [*said]
    for number, event in enumerate([*events, None]):
        if event is not None and event.op == Op.NOTE:
            said.append(event.name)
            continue
        where = f"before call {number}, {event}, after {said}"
        yield f"{where}, nothing else lasted", [*said], disk.nothing()
        yield f"{where}, everything lasted", [*said], disk.everything()
        for seed in seeds:
            yield f"{where}, mixture {seed}", [*said], disk.mixture(seed)
        if event is not None:
            disk.apply(event)


def acknowledgements(power: Power, events: list[Event], since: int) -> Iterator[tuple[str, list[str], Image]]:
    """As `crashes`, for those just after something had been said in *events* from number *since* on."""
    disk, said = Disk(power.root), list[str]()
    for number, event in enumerate(events):
        disk.apply(event)
        if event.op == Op.NOTE:
            said.append(event.name)
            if number >= since:
                yield f"after {said}, nothing else lasted", said, disk.nothing()
                for seed in SEEDS:
                    yield f"after {said}, mixture {seed}", said, disk.mixture(seed)


def survive(power: Power, scratch: Path, code: str, check: Callable[[Path, list[str]], None]) -> int:
    """Run *code*, and *check* the disk with what had been said by then, at each crash; return how many there were."""
    run_script(power, code)
    count = 0
    for what, said, image in crashes(Disk(power.root), power.events(), seeds=SEEDS_ONCE):
        check_image(scratch, image, said, check, what)
        count += 1
    return count


def check_image(
    scratch: Path, image: Image, said: list[str], check: Callable[[Path, list[str]], None], what: str
) -> None:
    disk = scratch / "image"
    disk.mkdir()
    write_image(image, disk)
    try:
        check(disk, said)
    except (AssertionError, ExoFlowError) as error:
        raise AssertionError(f"{what}:\n{error!r}\nof {sorted(image)}") from error
    shutil.rmtree(disk)


def numbers(said: list[str], what: str) -> list[int]:
    return [int(words[1]) for words in map(str.split, said) if words[0] == what]


def check_workflow(storage: Storage, said: list[str]) -> None:
    """Check that workflow w has what was acknowledged, nothing that is torn, and that a new controller goes on."""
    directory = storage.directory("w")
    assert storage.spec("w") == b"spec" * 500
    acknowledged = set(numbers(said, "record"))
    found = journal.read(directory).records
    assert [record["n"] for record in found] == list(range(len(found)))
    assert all(record["data"] == b"x" * 700 * (record["n"] % 3) for record in found)
    assert len(found) >= len(acknowledged)
    opened, history = Journal.open(directory)
    with opened:
        assert opened.epoch > max(numbers(said, "epoch"), default=0)  # nobody else may have been given the same one
        assert history.records == found
        opened.append({"type": "r", "n": len(found)}).result(30)
    assert [record["n"] for record in journal.read(directory).records] == list(range(len(found) + 1))


def check_journal(disk: Path, said: list[str]) -> None:
    storage = Storage(disk / "a" / "storage", create="created w" not in said)
    if "created w" not in said and storage.list() == []:
        storage.create("w", b"spec" * 500)
    assert storage.list() == ["w"]
    check_workflow(storage, said)


def test_journal(power: Power, tmp_path: Path) -> None:
    assert survive(power, tmp_path, JOURNAL, check_journal) > 120


def check_delete(disk: Path, said: list[str]) -> None:
    """A deletion is whole or wasn't, and leaves the other workflow alone."""
    storage = Storage(disk / "a" / "storage", create="created w" not in said)
    if "created other" in said:
        assert storage.spec("other") == b"abc"
    if "deleted w" in said:  # what is there now is the new one
        said = [line for line in said if line.startswith("created again")]
    elif "deleting w" not in said:
        assert "created w" not in said or "w" in storage.list()
    else:
        said = said[: said.index("deleting w")]
    if "w" in storage.list():
        check_workflow(storage, said)
    else:
        assert "created again" not in said
        storage.create("w", b"spec" * 500)
        check_workflow(storage, [])
    assert not [name for name in os.listdir(storage.path / "workflows") if name.startswith(".trash-")]


def test_delete(power: Power, tmp_path: Path) -> None:
    assert survive(power, tmp_path, DELETE, check_delete) > 120


#: what comes after a script that was killed: the same storage, in the state that the killed one left in the page cache
SUCCESSOR = (
    OPEN
    + """
if "w" not in storage.list():
    storage.create("w", b"spec" * 500)
opened, history = Journal.open(storage.directory("w"))
note("created w")
note("epoch", opened.epoch)
for record in [*history.records, {"type": "r", "n": len(history.records), "data": b"x" * 700 * (len(history.records) % 3)}]:
    if record["n"] == len(history.records):
        opened.append(record).result(30)
    note("record", record["n"])
opened.close()
"""
)

#: somebody who only looks; what they are told has happened may not turn out never to have
READER = (
    OPEN
    + """
from exoflow_hpc import journal
if "w" in storage.list():
    for record in journal.read(storage.directory("w")).records:
        note("record", record["n"])
"""
)

SWEEPER = OPEN + 'note("swept")\n'


@pytest.mark.parametrize(
    ("first", "then", "check", "undone"),
    [
        pytest.param(CREATE, SUCCESSOR, check_journal, (Op.RENAME, ".new-"), id="create"),
        pytest.param(JOURNAL, SUCCESSOR, check_journal, (Op.WRITE, ""), id="journal"),
        pytest.param(JOURNAL, READER, check_journal, (Op.WRITE, ""), id="read"),
        pytest.param(DELETE, SWEEPER, check_delete, (Op.RENAME, "w"), id="delete"),
    ],
)
def test_power_goes_after_a_kill(
    library: Path,
    tmp_path: Path,
    first: str,
    then: str,
    check: Callable[[Path, list[str]], None],
    undone: tuple[Op, str],
) -> None:
    """One process is killed, the next one finds what that one never made durable, and builds on it.

    Always among the calls before which it is killed: the fsync after the last call that is such as *undone* says.
    """
    run_script(power := new_power(library, tmp_path / "all"), first)
    changes = [event for event in power.events() if event.op != Op.NOTE]
    assert len(changes) == power.calls
    last = max(n for n, event in enumerate(changes, 1) if event.op == undone[0] and event.name.startswith(undone[1]))
    assert changes[last].op == Op.SYNC
    for call in sorted({last + 1, *sample(range(1, power.calls + 1), 2)}):
        power = new_power(library, tmp_path / str(call))
        run_script(power, first, call=call, mode="kill", expected=-signal.SIGKILL)
        since = len(power.events())
        run_script(power, then)
        for what, said, image in acknowledgements(power, power.events(), since):
            check_image(tmp_path, image, said, check, f"killed before call {call}, {what}")


def test_power_goes_again(library: Path, tmp_path: Path) -> None:
    """The successor has what a loss of power left, and loses it, too: at each of its calls."""
    run_script(power := new_power(library, tmp_path / "all"), JOURNAL)
    events = power.events()
    # by then there is something to go on with
    points = [
        number for number, event in enumerate(events) if event.op != Op.NOTE and "created w" in notes(events[:number])
    ]
    for number in sample(points, 2):
        power = new_power(library, tmp_path / str(number))
        write_image(Disk(tmp_path / "all" / "disk", events[:number]).mixture(number), power.root)
        disk = Disk.holding(power.root)
        run_script(power, SUCCESSOR)
        for what, said, image in crashes(disk, power.events(), notes(events[:number])):
            check_image(tmp_path, image, said, check_journal, f"after a loss before call {number}, again {what}")


def notes(events: list[Event]) -> list[str]:
    return [event.name for event in events if event.op == Op.NOTE]


def new_power(library: Path, directory: Path) -> Power:
    (directory / "disk").mkdir(parents=True)
    return Power(library, directory / "disk", directory)


def check_checkpoints(disk: Path, said: list[str]) -> None:
    """What was answered for is there; a file that has its name is whole; one that has not is never read as data."""
    storage = Storage(disk / "a" / "storage", create="created w" not in said)
    if "created w" not in said:
        return
    directory = storage.directory("w")
    for line in said:
        if line.startswith("written "):
            file, entry, checksum = json.loads(line.removeprefix("written "))
            checkpoint.read(directory, file, entry, checksum)
    for path in (directory / "checkpoints").iterdir():
        number = int(path.stem[-1])
        for index, value in enumerate(VALUES[number:]):
            plan = serialize.pack(value)
            try:
                meta, data = checkpoint.read(directory, path.name, f"e{index}")
                assert meta == plan.meta and data == plan.to_bytes()
            except CorruptCheckpointError:
                assert path.name.startswith(".tmp-"), f"{path.name} is not whole"
    assert not [path for path in checkpoint.orphans(directory, []) if path.parent != directory / "checkpoints"]


def test_checkpoint(power: Power, tmp_path: Path) -> None:
    assert survive(power, tmp_path, CHECKPOINT, check_checkpoints) > 120
