"""Random runs of the whole object protocol.

Any interleaving, deaths, joins, stalls, duplicates; and proof that they find faults.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hoplite_mpi.ids import ObjectID
from hoplite_mpi.protocol import events as ev
from hoplite_mpi.protocol import messages as ms
from hoplite_mpi.protocol.core import Protocol
from hoplite_mpi.protocol.directory import Directory
from hoplite_mpi.protocol.reduce import Reduction
from tests.hoplite_mpi.protocol.world import World

OBJECTS = [ObjectID.from_name(f"object {i}") for i in range(3)]
SMALL = ObjectID.from_name("small")
REDUCES = {
    ObjectID.from_name("large sum"): [ObjectID.from_name(f"large source {i}") for i in range(5)],
    ObjectID.from_name("small sum"): [ObjectID.from_name(f"small source {i}") for i in range(4)],
}
SMALL_SOURCES = set(REDUCES[ObjectID.from_name("small sum")]) | {SMALL}
#: one bit each: a sum tells which sources are in it, and how often
VALUES = {oid: 1 << i for i, oid in enumerate([*OBJECTS, SMALL, *[s for sources in REDUCES.values() for s in sources]])}


def run(
    seed: int,
    protocol: type[Protocol] = Protocol,
    dup_rate: float = 0.05,
    deaths: bool = True,
    stalls: float = 0.05,
    ids: list[ObjectID] = [*VALUES, *REDUCES],  # noqa: B006
) -> World:
    """Run a random scenario to quiescence and check what must hold then."""
    rng = random.Random(seed)
    world = World(rng, rng.randint(1, 5), rng.randint(1, 5), protocol)
    world.dup_rate = dup_rate
    spare = 10
    for _ in range(rng.randint(5, 40)):
        operate(world, rng, deaths, ids)
        for _ in range(rng.choice([0, 1, 5, 30, 200])):
            world.step()
        if rng.random() < stalls:
            fail_some(world, rng)
        if deaths and rng.random() < 0.1:
            world.change(join=[spare])
            spare += 1
    world.settle()
    check(world)
    return world


def operate(world: World, rng: random.Random, deaths: bool, ids: list[ObjectID]) -> None:
    rank = rng.choice(sorted(world.nodes))
    kind = rng.choices(
        ["put", "get", "abandon", "watch", "unwatch", "reduce", "forget", "delete", "kill", "adopt", "evict", "fail"],
        [8, 8, 1, 2, 1, 2, 1, 0.2, 1.5 if deaths else 0, 0.5, 2, 0.5],
    )[0]
    oid = rng.choice(ids)
    match kind:
        case "put":
            oid = rng.choice([oid for oid in ids if oid in VALUES])
            if oid in SMALL_SOURCES or rng.random() < 0.5:
                world.put(rank, oid, VALUES[oid], oid in SMALL_SOURCES, rng.random() < 0.7)
            else:
                world.start_put(rank, oid, VALUES[oid], rng.random() < 0.7)
        case "get":
            world.get(rank, oid)
        case "abandon":
            world.abandon(rank, oid)
        case "watch":
            world.watch(rank, oid)
        case "unwatch":
            world.nodes[rank].watched.discard(oid)
            world.handle(world.nodes[rank], ev.WatchAbandoned(oid))
        case "reduce":
            rid = rng.choice([oid for oid in ids if oid in REDUCES] or list(REDUCES))
            shape = rng.choice([None, "chain", "star", "tree_of_chains", "d_ary"])
            number = rng.choice([None, 1, 2, 3])
            world.reduce(
                rank, world.requests.get(rid) or ev.ReduceRequested(rid, tuple(REDUCES[rid]), "sum", number, shape)
            )
        case "forget":
            world.forget(rank, oid)
        case "delete":
            world.delete(rank, oid)
        case "kill" if len(world.nodes) > 1:
            world.change(kill=[rank], join=[rank] if rng.random() < 0.5 else None)
        case "adopt":
            adopt(world, rank, oid)
        case "evict":
            world.evict(rank, oid)
        case "fail":
            world.fail_put(rank)


def adopt(world: World, rank: int, oid: ObjectID) -> None:
    """A rank finds what another one has sealed in the arena of their node."""
    node = world.nodes[rank]
    mates = [n for n in world.nodes.values() if n.machine == node.machine and n is not node]
    for mate in mates:
        if mate.protocol.client.holds(oid) and (oid, 0) in mate.data and oid not in world.small:
            node.data[oid, 0] = list(mate.data[oid, 0])
            copy = mate.protocol.client._copies[oid]
            world.handle(node, ev.AdoptObject(oid, copy.meta, copy.digest))
            return


def fail_some(world: World, rng: random.Random) -> None:
    """A live transfer stalls for no visible reason."""
    running = [(node, t) for node in world.nodes.values() for t in node.transfers.values()]
    if running:
        world.fail_transfer(*rng.choice(running))


def check(world: World) -> None:
    nodes = list(world.nodes.values())
    usable = {oid for oid in [*VALUES, *REDUCES] if any(n.protocol.client.holds(oid) for n in nodes)}
    buried = {oid for n in nodes for oid in n.protocol.client._tombstones}
    for node in nodes:
        assert not node.putting, "a put was not answered"
        for oid in node.wanted | node.watched:
            assert oid not in buried, f"rank {node.rank} waits for what was deleted"
            assert oid not in usable, f"rank {node.rank} waits for {oid}, which is there"
            assert not feasible(world, oid, usable), f"rank {node.rank} waits for reduce {oid}, which has all it needs"
        for rid, slot in node.slots:
            assert rid not in usable, f"slot {slot} is left behind"
    check_directory(world)
    for rid in REDUCES:
        seen = {(d.version, d.sources) for n in nodes if (d := n.delivered.get(rid)) is not None}
        assert len(seen) <= 1, f"getters saw several versions: {seen}"


def check_directory(world: World) -> None:
    """What the owners know is what is there."""
    for node in world.nodes.values():
        for oid in [*VALUES, *REDUCES]:
            owner = world.nodes[world.view.owner(bytes(oid))].protocol.directory
            place = owner.entry(oid).places.get(node.rank)
            if node.protocol.client.holds(oid):
                assert place is not None, f"the owner of {oid} does not know of rank {node.rank}"
                assert place.complete
            elif place is not None:
                assert not (place.complete and owner.entry(oid).final), f"rank {node.rank} has no {oid}"
                transfer = node.transfers.get(oid)
                assert place.sender is None or transfer is not None, f"rank {place.sender} is checked out for nothing"


def feasible(world: World, rid: ObjectID, usable: set[ObjectID]) -> bool:
    specs = [n.specs[rid] for n in world.nodes.values() if rid in n.specs]
    if not specs:
        return False
    needed = len(specs[0].sources) if specs[0].num_objects is None else specs[0].num_objects
    # one that was deleted may come back when all who knew of it have died, but a coordinator that knew counts on it
    # no longer
    return len((usable - world.deleted) & set(specs[0].sources)) >= needed


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**64))
def test_random_runs(seed: int) -> None:
    run(seed)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**64))
def test_random_runs_without_deaths(seed: int) -> None:
    run(seed, deaths=False, dup_rate=0.3)


# -- a reduce of those who are there ----------------------------------------------------------------------------------

SUMS = [ObjectID.from_name(f"sum of all {i}") for i in range(2)]


def part(number: int, member: tuple[int, int]) -> ObjectID:
    return ObjectID.from_name(f"part {number}", member)


def run_joint(seed: int) -> World:
    """Everybody puts a part and asks for the sum of all parts, with the members that are alive as far as it knows."""
    rng = random.Random(seed)
    world = World(rng, rng.randint(2, 6), rng.randint(1, 3))
    world.dup_rate = 0.05
    founders = [(m.rank, m.incarnation) for m in world.view.members.values()]
    rng.shuffle(founders)
    shape, ordered, small = rng.choice([None, "chain", "star"]), rng.random() < 0.5, rng.random() < 0.3
    bits = {part(n, m): 1 << i for n in range(len(SUMS)) for i, m in enumerate(founders)}
    todo = [(n, m) for n in range(len(SUMS)) for m in founders]
    rng.shuffle(todo)

    def contribute(number: int, member: tuple[int, int]) -> None:
        node = world.alive(*member)
        if node is None or node.protocol.view.number == 0:
            return
        alive = [m for m in founders if node.protocol.view.has(*m)]
        sources = tuple(part(number, m) for m in alive)
        world.put(member[0], part(number, member), bits[part(number, member)], small, confirm=False)
        world.reduce(member[0], ev.ReduceRequested(SUMS[number], sources, "sum", None, shape, ordered, True))
        world.requests[SUMS[number]] = ev.ReduceRequested(SUMS[number], tuple(bits), "sum", skip_lost=True)
        world.get(member[0], SUMS[number])

    while world.nodes[min(world.nodes)].protocol.view.number == 0:
        world.step()
    spare = 10
    while todo:
        contribute(*todo.pop())
        for _ in range(rng.choice([0, 1, 5, 30, 200])):
            world.step()
        if rng.random() < 0.05:
            fail_some(world, rng)
        if rng.random() < 0.2 and len(world.nodes) > 1:
            world.change(kill=[rng.choice(sorted(world.nodes))], join=[spare] if rng.random() < 0.5 else None)
            spare += 1
    world.settle()
    alive = [m for m in founders if world.alive(*m)]
    for number, oid in enumerate(SUMS):
        for member in founders:  # whoever had no view when it was its turn, and whoever died
            if member in alive and part(number, member) not in world.values:
                contribute(number, member)
            for rank in world.nodes:
                world.get(rank, part(number, member))
        world.settle()
        results = {(d.version, d.sources) for m in alive if (d := world.nodes[m[0]].delivered.get(oid))}
        assert len(results) == (1 if alive else 0), f"results of {oid}: {results}"
        for member in alive:
            assert world.nodes[member[0]].failed.get(oid) is None
            assert oid in world.nodes[member[0]].delivered
            assert part(number, member) in next(iter(results))[1]
        for node in world.nodes.values():
            assert node.wanted <= set(SUMS), f"rank {node.rank} waits for a part, whose process may be dead"
    return world


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**64))
def test_a_reduce_skips_what_is_lost(seed: int) -> None:
    run_joint(seed)


# -- making room -------------------------------------------------------------------------------------------------------


def run_evictions(seed: int, protocol: type[Protocol] = Protocol) -> World:
    """Everybody gets, and wants to let go of what it has, in any order, also when who put it is dead: nothing that others have is lost."""
    rng = random.Random(seed)
    world = World(rng, rng.randint(4, 6), rng.randint(3, 5), protocol)
    world.settle()
    putter = rng.choice(sorted(world.nodes))
    others = [rank for rank in sorted(world.nodes) if world.nodes[rank].machine != world.nodes[putter].machine]
    for oid in OBJECTS:
        world.put(putter, oid, VALUES[oid], False, rng.random() < 0.7)
        for rank in others:
            world.get(rank, oid)
    world.settle()
    dead = rng.random() < 0.7
    if dead:
        world.change(kill=[putter])
        world.settle()
    for _ in range(rng.randint(10, 60)):
        operation = rng.choice([world.get, world.evict, world.evict])
        operation(rng.choice(sorted(world.nodes)), rng.choice(OBJECTS))
        for _ in range(rng.choice([0, 1, 5, 30])):
            world.step()
    world.settle()
    for oid in world.values:
        assert world.usable(oid), f"{oid} is lost: all have let go of it"
        assert dead or world.nodes[putter].protocol.client.holds(oid), "who put it keeps it"
    for rank in world.nodes:
        for oid in world.values:
            world.get(rank, oid)
    world.settle()
    check(world)
    for node in world.nodes.values():
        assert not node.wanted
    return world


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**64))
def test_nobody_lets_go_of_the_last_copy(seed: int) -> None:
    run_evictions(seed)


class BothLetGo(Directory):
    """Tells a rank that it may let go, and goes on counting on its copy."""

    def _evict(self, src: int, oid: ObjectID, version: int) -> None:
        places = dict(self.entry(oid).places)
        super()._evict(src, oid, version)
        self.entry(oid).places.update(places)


def test_random_runs_find_that_both_let_go() -> None:
    class Faulty(Protocol):
        directory_class = BothLetGo

    assert sum(run_evictions(seed).evictions for seed in range(20)) > 20
    for seed in range(100):
        try:
            run_evictions(seed, Faulty)
        except AssertionError:
            return
    pytest.fail("100 random runs did not find it")


# -- the runs above do find faults -------------------------------------------------------------------------------------


class DuplicateEvicts(Directory):
    """Takes a failure report that comes again for one about the present sender, as the original does."""

    def _get(self, src: int, message: ms.Get) -> None:
        entry = self.entry(message.oid)
        place = entry.places.get(src)
        known = not self._is_new(entry, src, message.attempt)
        if known and message.suspect is not None and place is not None and place.sender is not None:
            entry.places.pop(place.sender, None)
        super()._get(src, message)


class AnswersEarly(Directory):
    """Answers before the last report."""

    def _complete(self) -> bool:
        return len(self._reports) >= (len(self._port.view) + 1) // 2


class CountsTwice(Reduction):
    """Takes a source in as often as it is announced."""

    def arrived(self, message: ms.Source) -> None:
        counts = self.__dict__.setdefault("counts", Counter())
        counts[message.oid] += 1
        if counts[message.oid] > 1 and message.inline is not None and not self.over and self.version is None:
            self._inputs[ObjectID.random()] = message.inline
            self._compute()
        else:
            super().arrived(message)


class CountsTwiceDirectory(Directory):
    reduction_class = CountsTwice

    def _that_await(self, oid: ObjectID) -> list[Reduction]:
        return [reduction for reduction in self._reductions.values() if oid in reduction.spec.sources]


SMALL_SUM = [ObjectID.from_name("small sum"), *REDUCES[ObjectID.from_name("small sum")]]


@pytest.mark.parametrize(
    ("faulty", "ids", "stalls"),
    [(DuplicateEvicts, OBJECTS[:1], 1.0), (AnswersEarly, OBJECTS, 0.0), (CountsTwiceDirectory, SMALL_SUM, 0.0)],
)
def test_random_runs_find_planted_fault(faulty: type[Directory], ids: list[ObjectID], stalls: float) -> None:
    class Faulty(Protocol):
        directory_class = faulty

    for seed in range(400):
        run(seed, dup_rate=0.5, deaths=faulty is AnswersEarly, stalls=stalls, ids=ids)
        try:
            run(seed, Faulty, dup_rate=0.5, deaths=faulty is AnswersEarly, stalls=stalls, ids=ids)
        except AssertionError:
            return
    pytest.fail(f"400 random runs did not find {faulty.__name__}")
