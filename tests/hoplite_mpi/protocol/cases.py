"""What the tests of single cases share."""

from __future__ import annotations

import random
from collections.abc import Callable

from hoplite_mpi.ids import ObjectID
from tests.hoplite_mpi.protocol.world import CHUNKS, Node, World

__all__ = ["make", "owned_by", "partial", "until", "value"]


def owned_by(world: World, rank: int, text: str = "") -> ObjectID:
    """Return an id whose shard that rank owns."""
    return next(
        oid for i in range(10_000) if world.view.owner(bytes(oid := ObjectID.from_name(f"{text}{rank}/{i}"))) == rank
    )


def make(ranks: int, machines: int | None = None, seed: int = 0) -> World:
    world = World(random.Random(seed), ranks, machines or ranks)
    world.settle()
    return world


def until(world: World, done: Callable[[], bool]) -> None:
    """Step until *done*."""
    while not done():
        assert world.step(), "nothing more happens"


def partial(world: World, rank: int, oid: ObjectID) -> bool:
    return any(o == oid and 0 < len(chunks) < CHUNKS for (o, _), chunks in world.nodes[rank].data.items())


def value(node: Node, oid: ObjectID) -> int:
    (chunks,) = {tuple(c) for (o, _), c in node.data.items() if o == oid}
    (found,) = set(chunks)
    return found
