"""What one trial of the campaign does: all of it follows from its seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from hoplite_mpi.testing import POINTS

__all__ = ["KINDS", "Fault", "Trial", "plan"]

#: trials that don't kill at a point, in the order in which consecutive seeds take their turn
_OTHERS = (
    "kill",
    "stop short",
    "two at once",
    "hosts power_off",
    "kill",
    "stop long",
    "one after the other",
    "hosts pull_cable",
    "kill",
    "stop middle",
    "two at once",
    "hosts cut",
    "kill",
    "stop long",
    "one after the other",
    "hosts power_off",
)
#: what trials there are
KINDS = ("point", *sorted(set(_OTHERS)))

#: the points are passed only once somebody has died and is replaced; of these, those that only the first one's death leads to
_AFTER_A_DEATH = ("rebuild.", "membership.", "join.", "collective.table", "collective.begins")
_AFTER_THE_FIRST = ("membership.prepare", "membership.promise", "membership.promised")
#: the points are passed only when a sender stalls, or a reduce begins again
_AFTER_A_STALL = ("transfer.stop", "transfer.stopped", "transfer.drained")
#: the points are passed only by who has less memory than it holds
_UNDER_PRESSURE = ("spill.", "evict.")
#: objects (of 1.2 MB) for which each rank has memory then, beside two of each: those in use at once fit in, what is still to go does not
_PRESSED = 10
#: how often a point is passed in a trial, at least about: the fatal passing is one of so many
_PASSINGS = {
    "transfer.chunk_sent": 60,
    "transfer.chunk_received": 60,
    "transfer.chunk_relayed": 30,
    "reduce.chunk": 30,
    "directory.announced": 12,
    "directory.asked": 12,
    "directory.answer": 12,
    "collective.put": 6,
    "collective.wait": 6,
    "collective.finished": 4,
    "put.sealed": 3,
    "put.announced": 6,
    "put.piece": 3,
    "put.copied": 1,
    "evict.asked": 3,
    "evict.granted": 1,
    "evict.heard": 1,
    "arena.before_rename": 6,
    "arena.after_rename": 6,
    "reduce.source": 6,
    "reduce.slot_given": 5,
    "reduce.child_given": 4,
    "rebuild.report": 3,
    "rebuild.reported": 3,
    "membership.tell": 4,
    "membership.propose": 3,
    "membership.vote": 2,
    "transfer.pulled": 6,
    "transfer.completed": 5,
    "transfer.stop": 1,
    "transfer.stopped": 1,
    "transfer.drained": 1,
    "membership.promise": 1,
    "join.let_in": 1,
    "join.in": 1,
}
#: where a process that is stopped has bytes under way
_BUSY = ("transfer.chunk_sent", "transfer.chunk_received", "transfer.chunk_relayed", "reduce.chunk")
#: seconds for which a process is stopped: shorter than a stall, longer than that, longer than the others wait for it
_STOPS = {"short": (0.1, 0.4), "middle": (0.8, 2.0), "long": (5.5, 9.0)}


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong."""

    #: "kill", "stop", "power_off" or "pull_cable"
    how: str
    #: whom; None: the first who gets to the point
    rank: int | None = None
    #: where, and the how-manieth time that the process gets there; None: at a time
    point: str | None = None
    at: int = 1
    #: from the start, and not only when the load has begun: also while the ranks of the start connect
    early: bool = False
    #: seconds after the load has begun
    after: float = 0.0
    #: seconds until a stopped process goes on, or a cable is plugged in again
    seconds: float = 0.0


@dataclass(frozen=True)
class Trial:
    """One trial."""

    seed: int
    kind: str
    #: number of ranks
    ranks: int
    #: rank → node; ranks of one node share memory
    nodes: tuple[int, ...]
    faults: tuple[Fault, ...]
    #: more environment
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def pressed(self) -> bool:
        """Whether each rank has less memory than it holds."""
        return "HOPLITE_MEMORY_LIMIT" in self.settings

    @property
    def on_hosts(self) -> bool:
        """Whether the nodes are emulated hosts."""
        return self.kind.startswith("hosts")


def plan(seed: int) -> Trial:
    """Return the trial of a seed. Consecutive seeds go through all points and all other kinds."""
    rng = random.Random(seed)
    names = list(POINTS)
    turn = seed % (len(names) + len(_OTHERS))
    kind = "point" if turn < len(names) else _OTHERS[turn - len(names)]
    ranks = rng.choice([3, 4, 4, 5])
    settings = {
        "HOPLITE_CHUNK_SIZE": str(rng.choice([8, 16, 64]) * 1024),
        "HOPLITE_WINDOW": str(rng.choice([1, 2, 8])),
        "HOPLITE_STALL_TIMEOUT": "0.5",
        "HOPLITE_KEEPALIVE_TIMEOUT": "3" if kind.startswith("hosts") else "2",
        "HOPLITE_JOIN_TIMEOUT": "4",
        # so short only where somebody is to be put out: a busy machine is slow, too
        "HOPLITE_EVICT_TIMEOUT": "4.5" if kind == "stop long" else "15",
        "HOPLITE_DEFAULT_TIMEOUT": "25",
        "HOPLITE_CLOSE_TIMEOUT": "3",
    }
    nodes: tuple[int, ...]
    if kind.startswith("hosts"):
        # of a cut the part of the last host is the smaller one, and does not have the most senior rank
        nodes = (0, 0, 0, 1, 1) if kind == "hosts cut" else tuple(range(ranks))
    else:
        nodes = tuple(rng.randrange(ranks) if rng.random() < 0.4 else rank for rank in range(ranks))
    if kind == "hosts cut":
        rng.shuffle(order := list(nodes[1:]))
        nodes = (0, *order)
    faults = _at_point(rng, names[turn], len(nodes)) if kind == "point" else _others(rng, kind, nodes)
    pressure = names[turn].startswith(_UNDER_PRESSURE) if kind == "point" else rng.random() < 0.15
    if pressure:
        settings["HOPLITE_MEMORY_LIMIT"] = str((2 * ranks + _PRESSED) * 1_200_000)
    return Trial(seed, kind, len(nodes), nodes, tuple(faults), settings)


def _at_point(rng: random.Random, name: str, ranks: int) -> list[Fault]:
    at = rng.randint(1, _PASSINGS.get(name, 2))
    early = name.startswith("join.") and name not in ("join.hello", "join.let_in", "join.in") and rng.random() < 0.4
    fatal = Fault("kill", point=name, at=at if not early else 1, early=early)
    when = rng.uniform(0.0, 0.4)
    if early:
        return [fatal]
    if name in _AFTER_THE_FIRST:
        return [fatal, Fault("kill", rank=0, after=when)]
    if name.startswith(_AFTER_A_DEATH):
        return [fatal, Fault("kill", rank=rng.randrange(ranks), after=when)]
    if name in _AFTER_A_STALL:
        return [fatal, _stop(rng, "transfer.chunk_sent", "middle")]
    if rng.random() < 0.2:  # somebody else dies at about the same time
        return [fatal, Fault("kill", rank=rng.randrange(ranks), after=when)]
    return [fatal]


def _stop(rng: random.Random, point: str, how_long: str) -> Fault:
    return Fault("stop", point=point, at=rng.randint(1, _PASSINGS[point]), seconds=rng.uniform(*_STOPS[how_long]))


def _others(rng: random.Random, kind: str, nodes: tuple[int, ...]) -> list[Fault]:
    first, second = rng.sample(range(len(nodes)), 2)
    when = rng.uniform(0.0, 0.8)
    how, _, what = kind.partition(" ")
    if how == "stop" and rng.random() < 0.6:
        return [_stop(rng, rng.choice(_BUSY), what)]
    if how == "stop":
        return [Fault("stop", rank=first, after=when, seconds=rng.uniform(*_STOPS[what]))]
    if how == "two":
        return [Fault("kill", rank=first, after=when), Fault("kill", rank=second, after=when)]
    if how == "one":
        return [
            Fault("kill", rank=first, after=when),
            Fault("kill", rank=second, after=when + rng.choice([0.005, 0.05, 0.5])),
        ]
    if what == "cut":
        return [Fault("pull_cable", rank=nodes.index(1), after=when, seconds=rng.uniform(9, 11))]
    if how == "hosts":
        return [Fault(what, rank=first, after=when, seconds=rng.uniform(6, 8))]
    return [Fault("kill", rank=first, after=when)]
