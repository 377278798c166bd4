"""What every campaign counts: trials, kills at each point and in each role; what it has not done often enough; the tables of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hoplite_mpi.testing import Point

__all__ = ["BaseOutcome", "Needs", "add_up", "lacking", "tables"]

#: trials of each kind at least
_EACH_KIND = 3


@dataclass
class BaseOutcome:
    """What became of a trial."""

    seed: int
    kind: str
    ranks: int
    seconds: float = 0.0
    #: processes that were killed, powered off, or put out of the view
    kills: int = 0
    #: point → kills there
    points: dict[str, int] = field(default_factory=dict)
    #: role → kills of one in it
    roles: dict[str, int] = field(default_factory=dict)
    #: point → how often it was passed by those who came to the end
    passed: dict[str, int] = field(default_factory=dict)
    #: processes that ended by themselves and were replaced, and why
    left: list[str] = field(default_factory=list)
    #: what was wrong; empty: nothing
    wrong: list[str] = field(default_factory=list)
    #: what the ranks printed, if anything was wrong
    output: str = ""


@dataclass(frozen=True)
class Needs:
    """How often all has to be killed."""

    kills: int
    #: at each point, in each role
    each: int
    each_role: int
    #: kinds of trials that can be carried out here
    kinds: set[str]
    points: Mapping[str, Point]
    #: roles in which a process can be killed that need not be at a point
    more_roles: tuple[str, ...] = ()

    @property
    def roles(self) -> tuple[str, ...]:
        """All roles of which there is a minimum."""
        return tuple(dict.fromkeys([*(point.role for point in self.points.values()), *self.more_roles]))

    def wants(self, trial: Any, outcomes: Sequence[BaseOutcome]) -> bool:
        """Whether a trial adds to what there is not enough of."""
        points = add_up(o.points for o in outcomes)
        roles = add_up(o.roles for o in outcomes)
        kinds = Counter(o.kind for o in outcomes)
        fatal = [f for f in trial.faults if f.how == "kill"]
        at_points = [f.point for f in fatal if f.point is not None]
        timed = [f.role for f in fatal if f.point is None and getattr(f, "role", "") in self.more_roles]
        return (
            kinds[trial.kind] < _EACH_KIND
            or any(points[p] < self.each for p in at_points)
            or any(roles[self.points[p].role] < self.each_role for p in at_points)
            or any(roles[role] < self.each_role for role in timed)
        )


def add_up(counts: Iterable[dict[str, int]]) -> Counter[str]:
    """Return the sums of counts by name."""
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return total


def lacking(outcomes: Sequence[BaseOutcome], needs: Needs) -> list[str]:
    """Return a line for everything that has not been done often enough."""
    kills = sum(o.kills for o in outcomes)
    points, roles = add_up(o.points for o in outcomes), add_up(o.roles for o in outcomes)
    kinds = Counter(o.kind for o in outcomes)
    found = [] if kills >= needs.kills else [f"kills: {kills} of {needs.kills}"]
    found += [f"kills at {p}: {points[p]} of {needs.each}" for p in needs.points if points[p] < needs.each]
    found += [f"kills of a {r}: {roles[r]} of {needs.each_role}" for r in needs.roles if roles[r] < needs.each_role]
    found += [f"trials of kind {k}: {kinds[k]} of {_EACH_KIND}" for k in sorted(needs.kinds) if kinds[k] < _EACH_KIND]
    return found


def tables(
    outcomes: Sequence[BaseOutcome], needs: Needs, other_roles: Sequence[str] = (), *, passed: bool = True
) -> list[str]:
    """Return the lines of the tables of kinds, points and roles.

    other_roles: those without a minimum. passed: with how often who lived has passed each point.
    """
    points, roles = add_up(o.points for o in outcomes), add_up(o.roles for o in outcomes)
    passings, kinds = add_up(o.passed for o in outcomes), Counter(o.kind for o in outcomes)
    failed = Counter(o.kind for o in outcomes if o.wrong)
    seconds = sorted(o.seconds for o in outcomes) or [0.0]
    totals = (
        f"{len(outcomes)} trials, {sum(o.kills for o in outcomes)} kills, {sum(failed.values())} trials failed; "
        f"{seconds[len(seconds) // 2]:.1f} s for a trial (median), {seconds[-1]:.1f} s at most."
    )
    by = " passed by those who lived |" if passed else ""
    return [
        "## Campaign",
        "",
        totals,
        "",
        "| kind of trial | trials | failed |",
        "|---|---|---|",
        *(f"| {kind} | {kinds[kind]} | {failed[kind]} |" for kind in sorted(kinds)),
        "",
        f"| fault point | role |{by} kills |",
        f"|---|---|{'---|' if passed else ''}---|",
        *(
            f"| {name} | {point.role} |{f' {passings[name]} |' if passed else ''} {points[name]} |"
            for name, point in needs.points.items()
        ),
        "",
        "| role | kills |",
        "|---|---|",
        *(f"| {role} | {roles[role]} |" for role in (*needs.roles, *other_roles)),
        "",
    ]
