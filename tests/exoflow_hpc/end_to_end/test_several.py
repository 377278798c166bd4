"""Several workflows at once on the same ranks: each has a controller of its own, and what befalls one does not befall the others."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hoplite_mpi as hm
from hoplite_mpi.testing import run_ranks

__all__: list[str] = []

pytestmark = pytest.mark.timeout(240)

#: enough workers for all tasks to hold at a time, also when a rank is lost
WORKERS = 5
EACH_A_NODE = {"HOPLITE_NODE": "node{rank}", "EXOFLOW_WORKERS": str(WORKERS)}
TASKS = 3


def meet(session: Any) -> None:
    """Have each rank receive from each other one by MPI: a process that meets one that is just gone may crash."""
    store = session.store
    name = hm.ObjectID.from_name
    others = [rank for rank in range(3) if rank != session.rank]
    for other in others:
        store.put(np.ones(20_000), name(f"{session.rank} to {other}"))
    for other in others:
        store.get(name(f"{other} to {session.rank}"))
    store.barrier()


def program(directory: Path, workers: int, external: bool, meanwhile: bool) -> Any:
    """Run three workflows at once, each with a task on each rank that waits for the gate; return their outputs, and who has led which."""
    import exoflow_hpc as ef

    def note(*what: object) -> None:
        with open(directory / "log", "a") as log:
            log.write(json.dumps(what) + "\n")

    def undo(key: str, args: Any, result: Any) -> None:
        note("undone", key)

    @ef.task(
        deterministic=False,
        checkpoint="sync" if external else "skip",
        external=external,
        rollback=undo if external else None,
    )
    def hold(flow: int, i: int) -> tuple[str, float]:
        note("hold", f"{flow}.{i}", os.getpid())
        deadline = time.monotonic() + 100
        while not (directory / "gate").exists():
            assert time.monotonic() < deadline, "the test never opened the gate"
            time.sleep(0.01)
        note("held", f"{flow}.{i}", ef.context().idempotency_key)
        return f"{flow}.{i}", float(np.random.default_rng().random())

    @ef.task
    def both(held: Any, again: Any) -> list[str]:
        assert held == again, "two values of one task were seen"
        return [name for name, _ in held]

    @ef.task
    def same(held: Any) -> Any:
        return held

    session = ef.api.rank_session()
    meet(session)
    while len(session.pool.statistics().pids) < workers:
        time.sleep(0.01)
    note("workers", session.rank, *session.pool.statistics().pids)
    futures = []
    for flow in range(3):
        held = [hold.bind(flow, i) for i in range(TASKS)]
        futures.append(ef.run_async(both.bind(held, same.bind(held)), f"w{flow}", storage=directory / "storage"))
    if meanwhile:
        note("meanwhile", ef.run(same.bind(7), "m", storage=directory / "storage"))
    return [future.result() for future in futures]


def notes(directory: Path, what: str) -> list[Any]:
    """Return what was noted under that name, without it."""
    with contextlib.suppress(FileNotFoundError):
        lines = [json.loads(line) for line in (directory / "log").read_text().splitlines()]
        return [line[1:] for line in lines if line[0] == what]
    return []


def controllers(directory: Path) -> dict[str, list[int]]:
    """Return workflow → process ids of its controllers, the first one first, by its journal."""
    from exoflow_hpc import journal

    found = {}
    for path in sorted((directory / "storage" / "workflows").iterdir()):
        records = journal.read(path).records
        found[path.name] = [record["pid"] for record in records if record["type"] == "workflow_started"]
    return found


def held_by(directory: Path, rank: int) -> set[str]:
    """Return the tasks that a rank's workers have begun."""
    workers = next(pids for where, *pids in notes(directory, "workers") if where == rank)
    return {name for name, pid in notes(directory, "hold") if pid in workers}


class Killer(threading.Thread):
    """Waits until all tasks hold, says who controls what, kills the controller of one workflow, and opens the gate once that goes on."""

    def __init__(self, directory: Path, victim: str | None) -> None:
        super().__init__(daemon=True)
        self.directory, self.victim = directory, victim
        self.before: dict[str, list[int]] = {}
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.wait(lambda: len(notes(self.directory, "hold")) == 3 * TASKS)
            self.before = controllers(self.directory)
            if self.victim is not None:
                os.kill(self.before[self.victim][0], signal.SIGKILL)
                lost = len(held_by(self.directory, int(self.victim[1:])))
                self.wait(lambda: len(notes(self.directory, "hold")) == 3 * TASKS + lost)
                self.wait(lambda: len(controllers(self.directory)[str(self.victim)]) == 2)
        except BaseException as error:
            self.error = error
        (self.directory / "gate").touch()

    def wait(self, done: Any) -> None:
        deadline = time.monotonic() + 60
        while not done():
            assert time.monotonic() < deadline, (self.directory / "log").read_text()
            time.sleep(0.05)


def run(
    directory: Path, victim: str | None = None, external: bool = False, meanwhile: bool = False
) -> tuple[Killer, Any]:
    killer = Killer(directory, victim)
    killer.start()
    results = run_ranks(3, program, args=(directory, WORKERS, external, meanwhile), env=EACH_A_NODE, timeout=150)
    killer.join(10)
    assert killer.error is None, (killer.error, {rank: result.output for rank, result in results.items()})
    return killer, results


EXPECTED = [[f"{flow}.{i}" for i in range(TASKS)] for flow in range(3)]


def test_each_has_a_controller_of_its_own(tmp_path: Path) -> None:
    killer, results = run(tmp_path, meanwhile=True)
    assert [results[rank].value for rank in range(3)] == [EXPECTED] * 3, results[0].output
    assert len({pids[0] for pids in killer.before.values()}) == 3
    assert [len(pids) for pids in controllers(tmp_path).values()] == [1] * 4
    assert Counter(name for name, _ in notes(tmp_path, "hold")) == {
        f"{flow}.{i}": 1 for flow in range(3) for i in range(TASKS)
    }
    assert notes(tmp_path, "meanwhile") == [[7]] * 3, "a workflow ran and ended while the others waited"


@pytest.mark.parametrize("victim", ["w0", "w1"])
def test_a_controller_dies_and_the_others_go_on(tmp_path: Path, victim: str) -> None:
    """What ran on the lost rank runs elsewhere, once for each workflow; nothing else runs again, of that workflow neither."""
    _, results = run(tmp_path, victim)
    rank = int(victim[1:])
    assert results[rank].exitcode == -signal.SIGKILL
    assert [results[other].value for other in range(3) if other != rank] == [EXPECTED] * 2
    held = Counter(name for name, _ in notes(tmp_path, "hold"))
    there = held_by(tmp_path, rank)
    assert there, "it ran something"
    assert held == {f"{flow}.{i}": 2 if f"{flow}.{i}" in there else 1 for flow in range(3) for i in range(TASKS)}
    after = controllers(tmp_path)
    assert {name: len(pids) for name, pids in after.items()} == {
        f"w{flow}": 2 if f"w{flow}" == victim else 1 for flow in range(3)
    }
    assert after[victim][1] in {pids[0] for name, pids in after.items() if name != victim}, (
        "another one's rank took it over"
    )


def test_effects_of_all_of_them_happen_once(tmp_path: Path) -> None:
    _, results = run(tmp_path, "w1", external=True)
    assert [results[rank].value for rank in (0, 2)] == [EXPECTED] * 2
    done = Counter(name for name, _ in notes(tmp_path, "held"))
    undone = {key for (key,) in notes(tmp_path, "undone")}
    standing = Counter(name for name, key in notes(tmp_path, "held") if key not in undone)
    assert standing == {f"{flow}.{i}": 1 for flow in range(3) for i in range(TASKS)}, (done, undone)


def test_one_that_comes_late_goes_on_with_what_others_were_told(tmp_path: Path) -> None:
    """The head of a run is lost before the next one comes to it, from another run: that one goes on, and begins no other workflow."""

    def late(directory: Path) -> Any:
        import exoflow_hpc as ef

        def note(*what: object) -> None:
            with open(directory / "log", "a") as log:
                log.write(json.dumps(what) + "\n")

        def wait_for(name: str) -> None:
            deadline = time.monotonic() + 100
            while not (directory / name).exists():
                assert time.monotonic() < deadline, f"the test never made {name}"
                time.sleep(0.01)

        @ef.task
        def hold(i: int) -> int:
            note("hold", i, os.getpid())
            wait_for("gate")
            return i

        @ef.task
        def both(*held: int) -> int:
            return sum(held)

        session = ef.api.rank_session()
        meet(session)
        while len(session.pool.statistics().pids) < 2:
            time.sleep(0.01)
        note("workers", session.rank, *session.pool.statistics().pids)
        first = ef.run_async(hold.bind(7), "first", storage=directory / "storage")
        if session.rank == 1:
            wait_for("come")
        second = ef.run(both.bind(*(hold.bind(i) for i in range(2))), storage=directory / "storage")  # it has no id
        return first.result(), second

    (tmp_path / "storage").mkdir()
    killed: list[str] = []
    there: set[str] = set()

    def kill() -> None:
        wait = Killer(tmp_path, None).wait
        wait(lambda: len(notes(tmp_path, "hold")) == 3)
        there.update(held_by(tmp_path, 2))
        killed.extend(sorted(set(controllers(tmp_path)) - {"first"}))
        os.kill(controllers(tmp_path)[killed[0]][0], signal.SIGKILL)
        wait(lambda: len(controllers(tmp_path)["first"]) == 2)  # so rank 1 knows of the loss
        (tmp_path / "come").touch()
        wait(lambda: len(controllers(tmp_path)[killed[0]]) == 2)
        (tmp_path / "gate").touch()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    env = {"HOPLITE_NODE": "node{rank}", "EXOFLOW_WORKERS": "2"}
    results = run_ranks(3, late, args=(tmp_path,), env=env, timeout=120)
    assert results[0].exitcode == -signal.SIGKILL
    for rank in (1, 2):
        assert results[rank].exitcode == 0, results[rank].output
        assert results[rank].value == (7, 1)
    assert sorted(controllers(tmp_path)) == sorted(["first", *killed]), "no workflow was begun beside it"
    assert all(Counter(name for name, _ in notes(tmp_path, "hold"))[name] == 1 for name in there)


def test_one_that_fails_does_not_disturb_the_others(tmp_path: Path) -> None:
    def failing() -> Any:
        import exoflow_hpc as ef

        @ef.task(max_retries=0)
        def fail() -> None:
            raise ValueError("no")

        @ef.task
        def add(*numbers: int) -> int:
            return sum(numbers)

        ef.run(add.bind(1), "known", storage=tmp_path)
        bad = ef.run_async(fail.bind(), "bad", storage=tmp_path)
        good = ef.run_async(add.bind(*(add.bind(i) for i in range(20))), "good", storage=tmp_path)
        refused = ef.run_async(add.bind(2), "known", storage=tmp_path)
        errors = []
        for future in (bad, refused):
            try:
                future.result()
            except ef.ExoFlowError as error:
                errors.append(type(error).__name__)
        return good.result(), errors

    results = run_ranks(2, failing)
    for rank in range(2):
        assert results[rank].exitcode == 0, results[rank].output
        assert results[rank].value == (190, ["TaskError", "WorkflowExistsError"])


def test_a_replacement_gets_what_has_ended(tmp_path: Path) -> None:
    """It starts its program from the begin, when the others have come further: it takes each value for that of its own run."""

    def many() -> Any:
        import exoflow_hpc as ef

        @ef.task(checkpoint="sync")
        def add(*numbers: int) -> int:
            return sum(numbers)

        @ef.task
        def hold(directory: str) -> int:
            while not os.path.exists(os.path.join(directory, "gate")):
                time.sleep(0.01)
            return -1

        session = ef.api.rank_session()
        if session.incarnation == 0:
            meet(session)
        values = [ef.run(add.bind(i, 1), f"w{i}", storage=tmp_path) for i in range(3)]
        futures = [ef.run_async(add.bind(i, 10), f"v{i}", storage=tmp_path) for i in range(3)]
        values += [future.result() for future in futures]
        if session.rank == 1 and session.incarnation == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if session.incarnation:
            (tmp_path / "gate").touch()
        return [*values, ef.run(hold.bind(str(tmp_path)), "held", storage=tmp_path)]

    results = run_ranks(3, many, respawn=True, timeout=120)
    expected = [1, 2, 3, 10, 11, 12, -1]
    for rank in range(3):
        assert results[rank].exitcode == 0, results[rank].output
        assert results[rank].value == expected


def test_all_that_were_interrupted_are_resumed_by_the_ranks(tmp_path: Path) -> None:
    """Each rank gets all outputs, and the same ones, whichever of the workflows it has seen."""

    def interrupted() -> Any:
        import exoflow_hpc as ef
        from exoflow_hpc.storage import Storage

        @ef.task
        def f(x: int) -> int:
            if x == 2:
                raise ValueError("two")
            return 10 * x

        session = ef.api.rank_session()
        if session.rank == 0:
            place = Storage(tmp_path)
            for i in range(4):
                ef.api.submit(place, f.options(max_retries=0).bind(i), f"w{i}", {})
        session.store.barrier()
        results = ef.resume_all(storage=tmp_path)
        return {name: value if isinstance(value, int) else type(value).__name__ for name, value in results.items()}

    results = run_ranks(2, interrupted)
    for rank in range(2):
        assert results[rank].exitcode == 0, results[rank].output
        assert results[rank].value == {"w0": 0, "w1": 10, "w2": "TaskError", "w3": 30}
