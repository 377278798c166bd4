"""Random workflows, orders and failures, compared with runs in which nothing fails."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from exoflow_hpc.semantics import check_annotations
from exoflow_hpc.spec import WorkflowSpec

from .world import World, make_spec, recovery_set

__all__: list[str] = []


def random_spec(rng: random.Random, count: int) -> WorkflowSpec:
    rows: list[dict[str, Any]] = []
    for index in range(count):
        row: dict[str, Any] = {"data": tuple(rng.sample(range(index), min(index, rng.choice([0, 1, 1, 2, 3]))))}
        row["checkpoint"] = rng.choice(["sync", "async", "skip", "auto"])
        row["deterministic"] = rng.random() < 0.5
        if rng.random() < 0.4:
            row["external"] = True
            row["idempotent"] = rng.random() < 0.5
            row["rollback"] = "r" if not row["idempotent"] or rng.random() < 0.3 else ""
        if index and rng.random() < 0.35:
            edge = rng.randrange(index)
            if rows[edge]["checkpoint"] != "skip" and rng.random() < 0.5:
                row["barriers"] = (edge,)
            else:
                row["after"] = (edge,)
        rows.append(row)
    used = {up for row in rows for up in (*row["data"], *row.get("after", ()), *row.get("barriers", ()))}
    last = set(range(count - 1)) - used
    rows[-1]["data"] = tuple(sorted({*rows[-1]["data"], *last}))
    spec = make_spec(rows)
    check_annotations(spec.tasks)
    return spec


def hit(world: World, rng: random.Random) -> None:
    """Let something fail."""
    fault = rng.randrange(7)
    if fault == 0:
        world.crash(ghosts=rng.random() < 0.5)
    elif fault == 1 and world.live:
        world.kill_rank(rng.choice(list(world.live)), certain=rng.random() < 0.5, late=rng.random() < 0.5)
    elif fault == 2 and world.commits:
        world.fail_commit(rng.choice(world.commits))
    elif fault == 3:
        runs = [run for run in world.running if not run.canceled and not run.ghost]
        if runs:
            world.fail_attempt(rng.choice(runs))
    elif fault == 4 and world.any_ghosts():
        world.lease_over()
    elif fault == 5 and world.live:
        world.lose_controller(rng.choice(list(world.live)), rng.random() < 0.5, lambda: rng.random() < 0.5)
    elif fault == 6 and world.objects:
        world.lose_value(rng.choice(sorted(world.objects)), noticed=rng.random() < 0.5)


def make_world(rng: random.Random, count: int, ranks: int) -> World:
    """Return a world in which some tasks put objects, nested ones, and some hand on what they were given."""
    spec = random_spec(rng, count)
    large = rng.sample(range(count), count // 2)
    puts = {task: rng.choice([1, 1, 2, 3]) for task in range(count) if rng.random() < 0.4}
    passing = [task for task in range(count) if rng.random() < 0.5]
    return World(spec, rng.choice, ranks=ranks, slots=2, large=large, puts=puts, passing=passing)


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 10), faults=st.integers(0, 6))
@settings(max_examples=600, deadline=None)
def test_whatever_fails_the_end_is_the_same(seed: int, count: int, faults: int) -> None:
    rng = random.Random(seed)
    world = make_world(rng, count, ranks=3)
    steps = 0
    while world.finish is None:
        dead = [rank for rank in range(world.ranks) if rank not in world.live]
        if dead and (not world.actions() or rng.random() < 0.2):
            world.join(rng.choice(dead))
        elif faults and rng.random() < 0.3:
            faults -= 1
            hit(world, rng)
        else:
            world.step()
        steps += 1
        assert steps < 3000, "it does not end"
    world.check_end()


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 10), steps=st.integers(0, 40))
@settings(max_examples=300, deadline=None)
def test_after_a_crash_exactly_the_recovery_set_runs(seed: int, count: int, steps: int) -> None:
    rng = random.Random(seed)
    world = make_world(rng, count, ranks=2)
    for _ in range(steps):
        if world.finish is None:
            world.step()
    need, undo = recovery_set(world.spec, world.facts)
    world.crash()
    world.run()
    world.check_end()
    assert world.ran == dict.fromkeys(need, 1)
    assert set(world.undone) == undo
    counters = world.scheduler.counters
    assert (counters.run, counters.rerun, counters.rolled_back) == (len(need), 0, len(undo))
