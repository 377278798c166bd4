"""Random workflows whose tasks continue, with failures, compared with runs in which nothing fails."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from exoflow_hpc.spec import WorkflowSpec

from .continuing import ContinuingWorld
from .test_random import hit, random_spec
from .world import Value

__all__: list[str] = []

#: levels of continuations
DEEPEST = 2


def make_world(rng: random.Random, count: int, ranks: int) -> ContinuingWorld:
    """Return a world in which what a task continues with depends on its name and its value alone."""
    seed = rng.random()

    def will(name: str, value: Value) -> WorkflowSpec | None:
        chance = random.Random(repr((seed, name, value)))
        if name.count("/") >= DEEPEST or chance.random() < 0.6:
            return None
        return random_spec(chance, chance.choice([1, 1, 2, 3]))

    return ContinuingWorld(random_spec(rng, count), rng.choice, will, lambda: rng.random() < 0.5, ranks)


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 6), faults=st.integers(0, 6))
@settings(max_examples=400, deadline=None)
def test_whatever_fails_the_end_is_the_same(seed: int, count: int, faults: int) -> None:
    rng = random.Random(seed)
    world = make_world(rng, count, ranks=3)
    steps = 0
    while world.finish is None:
        dead = [rank for rank in range(world.ranks) if rank not in world.live]
        if dead and (not world.actions() or rng.random() < 0.2):
            world.join(rng.choice(dead))
        elif faults and rng.random() < 0.2:
            faults -= 1
            hit(world, rng)
        else:
            world.step()
        steps += 1
        assert steps < 5000, "it does not end"
    world.check_end()


def test_the_worlds_do_continue() -> None:
    worlds = [make_world(random.Random(seed), 4, ranks=1) for seed in range(20)]
    for world in worlds:
        world.run()
        world.check_end()
    assert sum(world.changes > 1 for world in worlds) > 5
    assert any("/t0/" in task.name for world in worlds for task in world.spec.tasks)
