"""What one trial of the campaign does: all of it, the workflow too, follows from its seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from tests.exoflow_hpc.chaos.points import POINTS, TAKING_OVER

__all__ = ["KINDS", "Fault", "Step", "Trial", "plan"]

#: trials that don't kill at a point, in the order in which consecutive seeds take their turn
_OTHERS = (
    "kill rank",
    "kill head",
    "kill worker",
    "kill everything",
    "two at once",
    "kill checkpoint writer",
    "kill rank",
    "kill forkserver",
    "one after the other",
    "stop rank",
    "kill everything",
    "kill rank",
    "kill worker",
    "two at once",
    "kill head",
    "stop head",
    "again and again",
    "kill launcher",
    "one after the other",
    "stop worker",
    "again and again",
    "two at once",
)
#: what trials there are
KINDS = ("point", *sorted(set(_OTHERS)))

#: how often a point is passed in a run at least, about: the fatal passing is one of so many
_PASSINGS = {
    "journal.before_write": 6,
    "journal.after_write": 6,
    "journal.before_fsync": 6,
    "journal.after_fsync": 6,
    "controller.dispatch": 8,
    "controller.started": 2,
    "controller.committed": 5,
    "agent.dispatched": 3,
    "agent.task_done": 3,
}
#: elements (int64) of outputs: in the journal; in messages and HDF5; in shared memory and HDF5
SMALL, MEDIUM, LARGE = 8, 1_000, 12_000
#: checkpoint options and effects of tasks; what is irrevocable has all above it committed, so there is little to undo with many of those
_MODES = {
    "mixed": ["sync", "async", "skip", "skip", "auto"],
    "fragile": ["sync", "sync", "async", "skip", "skip", "skip", "skip", "auto"],
}
_EFFECTS = {
    "mixed": ["", "", "", "idempotent", "rollback", "both"],
    "fragile": [""] * 6 + ["idempotent", "rollback", "rollback", "rollback", "both", "both"],
}
#: who dies, and how often in comparison
_VICTIMS = ("rank", "rank", "head", "worker", "worker", "checkpoint writer", "forkserver", "everything")


@dataclass(frozen=True)
class Step:
    """A task of the workflow."""

    name: str
    #: "task" or "reduce"
    kind: str
    data: tuple[str, ...]
    #: control edges: after these have finished, after these are committed
    after: tuple[str, ...] = ()
    after_commit: tuple[str, ...] = ()
    deterministic: bool = True
    checkpoint: str = "auto"
    #: "", "idempotent", "rollback" or "both"
    effect: str = ""
    #: elements of its output; 0: it is the number alone
    size: int = SMALL
    #: how long it takes
    seconds: float = 0.0


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong."""

    #: "kill" or "stop"
    how: str
    #: as what it happens to somebody at a moment; "": at a point
    role: str = ""
    #: rank whose process that is
    rank: int = 0
    #: where, and the how-manieth time that a process gets there; None: at a moment
    point: str | None = None
    at: int = 1
    #: the moment: so many tasks have been started since the trial began (0: a command has been started), and then *after* seconds
    starts: int = 0
    after: float = 0.0
    #: seconds until a stopped process goes on
    seconds: float = 0.0


@dataclass(frozen=True)
class Trial:
    """One trial."""

    seed: int
    kind: str
    #: number of ranks of the first command, of the second, ...; the last one for all that come then
    sizes: tuple[int, ...]
    steps: tuple[Step, ...]
    faults: tuple[Fault, ...]
    #: more environment
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        return self.sizes[0]


def plan(seed: int) -> Trial:
    """Return the trial of a seed. Consecutive seeds go through all points and all other kinds."""
    rng = random.Random(seed)
    names = list(POINTS)
    turn = seed % (len(names) + len(_OTHERS))
    kind = "point" if turn < len(names) else _OTHERS[turn - len(names)]
    ranks = rng.choice([1, 2, 2, 3, 3, 4])
    if "rank" in kind or kind in ("two at once", "one after the other"):
        ranks = max(2, ranks)
    settings = {"EXOFLOW_WORKERS": str(rng.choice([1, 2]))}
    if rng.random() < 0.5:  # a rank that dies takes its outputs along
        settings["HOPLITE_NODE"] = "node{rank}"
    point = names[turn] if kind == "point" else ""
    if point in TAKING_OVER:  # two of them are lost, and one goes on
        ranks = max(3, ranks)
    steps = _Workflow(rng, point).steps
    faults = _at_point(rng, point, ranks, len(steps)) if point else _others(rng, kind, ranks, len(steps))
    sizes = (ranks, *(rng.choice([ranks, ranks, 1, 2, 3]) for _ in range(3)))
    return Trial(seed, kind, sizes, tuple(steps), tuple(faults), settings)


class _Workflow:
    """A random workflow in which, if a point is given, somebody passes it."""

    def __init__(self, rng: random.Random, point: str) -> None:
        self.rng = rng
        #: much varies, little is saved, and each output has many consumers: what is lost takes much along
        self.fragile = rng.random() < 0.6
        self.steps: list[Step] = []
        if point == "controller.roll_back":
            self._undoable()
        elif point.startswith(("checkpoint.", "agent.written")):
            for _ in range(3):
                self._task(size=rng.choice([MEDIUM, LARGE]), checkpoint="sync")
        elif point == "controller.started":
            for _ in range(3):
                self._task(effect=rng.choice(["idempotent", "rollback", "both"]))
        for _ in range(rng.randint(5, 24) - len(self.steps)):
            if rng.random() > 0.1 or not self._reduce():
                self._task()
        read = {name for step in self.steps for name in step.data}
        ends = tuple(step.name for step in self.steps if step.name not in read)
        self.steps.append(Step("end", "task", ends, size=0, seconds=0.05))

    def _undoable(self) -> None:
        for _ in range(3):
            source = self._task(data=(), deterministic=False, checkpoint="skip", size=SMALL)
            self._task(data=(source.name,), effect="rollback", checkpoint="skip", size=SMALL)

    def _task(self, **given: object) -> Step:
        rng, names = self.rng, [step.name for step in self.steps]
        data = tuple(
            rng.sample(names, min(len(names), rng.choice([1, 2, 2, 3] if self.fragile else [0, 1, 1, 1, 2, 2, 3])))
        )
        others = [name for name in names if name not in data]
        after: list[str] = []
        after_commit: list[str] = []
        if others and rng.random() < 0.25:
            other = rng.choice(others)
            durable = next(step for step in self.steps if step.name == other).checkpoint in ("sync", "async")
            (after_commit if durable and rng.random() < 0.5 else after).append(other)
        values: dict[str, object] = {
            "data": data,
            "after": tuple(after),
            "after_commit": tuple(after_commit),
            "deterministic": rng.random() < (0.4 if self.fragile else 0.6),
            "checkpoint": rng.choice(_MODES["fragile" if self.fragile else "mixed"]),
            "effect": rng.choice(_EFFECTS["fragile" if self.fragile else "mixed"]),
            "size": rng.choice([SMALL, SMALL, MEDIUM, LARGE]),
            "seconds": round(rng.choice([0.0, 0.02, 0.1, 0.1, 0.3]) * rng.random(), 3),
        } | given
        step = Step(f"t{len(self.steps)}", "task", **values)  # type: ignore[arg-type]
        self.steps.append(step)
        return step

    def _reduce(self) -> bool:
        """Add a reduce over tasks whose outputs are of one shape, if there are any."""
        size = self.rng.choice([SMALL, MEDIUM, LARGE])
        fit = [step.name for step in self.steps if step.kind == "task" and step.size == size]
        if len(fit) < 2 or sum(step.kind == "reduce" for step in self.steps) >= 3:
            return False
        data = tuple(self.rng.sample(fit, min(len(fit), self.rng.randint(2, 4))))
        checkpoint = self.rng.choice(["sync", "skip", "auto"])
        self.steps.append(Step(f"r{len(self.steps)}", "reduce", data, checkpoint=checkpoint, size=size))
        return True


def _at_point(rng: random.Random, name: str, ranks: int, steps: int) -> list[Fault]:
    fatal = Fault("kill", point=name, at=rng.randint(1, _PASSINGS.get(name, 1)))
    if name in TAKING_OVER:
        return [Fault("kill", "head", starts=_moment(rng, steps), after=rng.uniform(0.0, 0.15)), fatal]
    if name == "controller.roll_back":  # there is something to undo only when an effect has lost its ground
        return [Fault("kill", "everything", starts=max(4, steps - 2), after=rng.uniform(0.0, 0.2)), fatal]
    if name.startswith("journal.") and rng.random() < 0.5:  # in an epoch that goes on with another one's work
        return [Fault("kill", "everything", starts=_moment(rng, steps), after=rng.uniform(0.0, 0.2)), fatal]
    if name.startswith("storage."):
        return [fatal]
    return [fatal, *_more(rng, ranks, steps, rng.choice([0, 1, 1, 2]))]


def _more(rng: random.Random, ranks: int, steps: int, count: int) -> list[Fault]:
    return [_kill(rng, rng.choice(_VICTIMS), ranks, steps) for _ in range(count)]


def _moment(rng: random.Random, steps: int) -> int:
    return rng.randint(1, steps - 1) if rng.random() < 0.5 else rng.randint(max(1, steps // 2), steps - 1)


def _kill(rng: random.Random, role: str, ranks: int, steps: int) -> Fault:
    rank = rng.randrange(1, ranks) if role == "rank" and ranks > 1 else rng.randrange(ranks)
    if role == "rank" and ranks == 1:
        role = "worker"
    starts = 0 if rng.random() < 0.08 else _moment(rng, steps)
    after = rng.uniform(0.2, 2.5) if starts == 0 else rng.uniform(0.0, 0.15)
    return Fault("kill", role, 0 if role == "head" else rank, starts=starts, after=after)


def _others(rng: random.Random, kind: str, ranks: int, steps: int) -> list[Fault]:
    how, _, what = kind.partition(" ")
    if how == "kill":
        return [_kill(rng, what, ranks, steps), *_more(rng, ranks, steps, rng.choice([0, 1, 1, 2]))]
    if how == "stop":
        rank = rng.randrange(1, ranks) if what == "rank" else 0 if what == "head" else rng.randrange(ranks)
        stopped = Fault("stop", what, rank, starts=_moment(rng, steps), seconds=round(rng.uniform(0.3, 4.0), 2))
        return [stopped, *_more(rng, ranks, steps, rng.choice([0, 1, 1]))]
    if how == "again":  # a task may lose its worker three times
        found = _more(rng, ranks, steps, rng.randint(4, 7))
        fatal_to_tasks = [fault for fault in found if fault.role in ("worker", "forkserver")]
        return [fault for fault in found if fault not in fatal_to_tasks[3:]]
    first = _kill(rng, rng.choice(_VICTIMS), ranks, steps)
    # everything at once leaves nobody else to kill at the same time
    second = _kill(rng, rng.choice(_VICTIMS[:-1]), ranks, steps)
    if how == "two":
        first = first if first.role != "everything" else _kill(rng, rng.choice(_VICTIMS[:-1]), ranks, steps)
        after = first.after
    else:
        after = first.after + rng.choice([0.02, 0.2, 1.0, 2.5])
    return [first, Fault("kill", second.role, second.rank, starts=first.starts, after=after)]
