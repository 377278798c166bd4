"""All workflows of up to four tasks, all annotations, and all crash points: `python -m tests.exoflow_hpc.semantics.exhaustive 4`.

For each workflow, a crash after each step of a run whose steps come in one order or its reverse; what the journal and the outside then are,
each but once, is where a second run begins. It has to do exactly what the rules say, and end as if nothing had failed.
"""

from __future__ import annotations

import itertools
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from .world import Facts, World, make_spec, recovery_set

__all__ = ["check", "count", "rows_of", "shapes"]

#: what a task can say of itself
EFFECTS: list[dict[str, Any]] = [
    {},
    {"external": True, "idempotent": True},
    {"external": True, "rollback": "r"},
    {"external": True, "idempotent": True, "rollback": "r"},
]
ANNOTATIONS = [
    {**effect, "deterministic": deterministic, "checkpoint": checkpoint}
    for effect in EFFECTS
    for deterministic in (True, False)
    for checkpoint in ("sync", "async", "skip")
]
#: the output is committed whatever its checkpoint is, and nobody waits for it
LAST = [annotation for annotation in ANNOTATIONS if annotation["checkpoint"] == "sync"]


def shapes(n: int) -> list[tuple[tuple[int, ...], ...]]:
    """Return the data edges of all DAGs of *n* tasks in which each task is an input of a later one, but for the last."""
    found = []
    edges = [list(itertools.product((False, True), repeat=index)) for index in range(n)]
    for chosen in itertools.product(*edges):
        data = tuple(tuple(up for up, there in enumerate(row) if there) for row in chosen)
        if {up for row in data for up in row} == set(range(n - 1)):
            found.append(data)
    return found


def count(n: int) -> int:
    """Return how many workflows of *n* tasks there are."""
    return int(len(shapes(n)) * len(ANNOTATIONS) ** (n - 1) * len(LAST))


def rows_of(n: int, number: int) -> list[dict[str, Any]]:
    """Return workflow *number* of those of *n* tasks."""
    number, last = divmod(number, len(LAST))
    notes = [LAST[last]]
    for _ in range(n - 1):
        number, which = divmod(number, len(ANNOTATIONS))
        notes.append(ANNOTATIONS[which])
    return [{"data": data, **note} for data, note in zip(shapes(n)[number], reversed(notes), strict=True)]


def _first(actions: list[Callable[[], None]]) -> Callable[[], None]:
    return actions[0]


def _last(actions: list[Callable[[], None]]) -> Callable[[], None]:
    return actions[-1]


def _crash_points(world: World) -> Iterator[Facts]:
    while True:
        yield world.facts.copy()
        if world.finish is not None:
            return
        world.step()


def check(n: int, number: int) -> int:
    """Let workflow *number* of those of *n* tasks crash everywhere; return at how many different points. AssertionError."""
    spec = make_spec(rows_of(n, number))
    points: dict[Any, Facts] = {}
    for order in (_first, _last):
        world = World(spec, order)
        for facts in _crash_points(world):
            points.setdefault(facts.key(), facts)
        world.check_end()
        assert not world.undone
    for facts in points.values():
        need, undo = recovery_set(spec, facts)
        world = World(spec, _first, facts)
        world.run()
        world.check_end()
        assert world.ran == dict.fromkeys(need, 1), f"ran {world.ran}, but {need} is what is needed"
        assert set(world.undone) == undo
    return len(points)


def _slice(n: int, first: int, step: int) -> int:
    done = 0
    for number in range(first, count(n), step):
        try:
            done += check(n, number)
        except AssertionError as error:
            raise AssertionError(f"workflow {number} of {n} tasks, {rows_of(n, number)}: {error}") from error
    return done


def main() -> None:
    """Check all workflows of as many tasks as said, on all cores."""
    n, began = int(sys.argv[1]), time.monotonic()
    cores = multiprocessing.cpu_count()
    with multiprocessing.Pool(cores) as pool:
        points = sum(pool.starmap(_slice, [(n, first, 200) for first in range(200)], chunksize=1))
    print(
        f"{count(n)} workflows of {n} tasks, {points} crash points: {time.monotonic() - began:.0f} s on {cores} cores"
    )


if __name__ == "__main__":
    main()
