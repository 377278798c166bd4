"""What a campaign has done, as tables in Markdown, and what it has not done often enough."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hoplite_mpi.testing import POINTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tests.hoplite_mpi.chaos.plan import Trial
    from tests.hoplite_mpi.chaos.trial import Outcome

__all__ = ["Needs", "lacking", "summary"]

#: seconds from a death to the view without it
_LIMITS = {"process": 0.5, "host": 5.0}
#: trials of each kind at least
_EACH_KIND = 3
_ROLES = tuple(dict.fromkeys(point.role for point in POINTS.values()))


@dataclass(frozen=True)
class Needs:
    """How often all has to be killed."""

    kills: int
    #: at each point, in each role
    each: int
    each_role: int
    #: kinds of trials that can be carried out here
    kinds: set[str]

    def wants(self, trial: Trial, outcomes: Sequence[Outcome]) -> bool:
        """Whether a trial adds to what there is not enough of."""
        points = _sum(o.points for o in outcomes)
        roles = _sum(o.roles for o in outcomes)
        kinds = Counter(o.kind for o in outcomes)
        fatal = [f.point for f in trial.faults if f.point is not None and f.how == "kill"]
        return (
            kinds[trial.kind] < _EACH_KIND
            or any(points[p] < self.each for p in fatal)
            or any(roles[POINTS[p].role] < self.each_role for p in fatal)
        )


def _sum(counts: Iterable[dict[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return total


def lacking(outcomes: Sequence[Outcome], needs: Needs) -> list[str]:
    """Return a line for everything that has not been done often enough."""
    kills = sum(o.kills for o in outcomes)
    points, roles = _sum(o.points for o in outcomes), _sum(o.roles for o in outcomes)
    kinds = Counter(o.kind for o in outcomes)
    found = [] if kills >= needs.kills else [f"kills: {kills} of {needs.kills}"]
    found += [f"kills at {p}: {points[p]} of {needs.each}" for p in POINTS if points[p] < needs.each]
    found += [f"kills of a {r}: {roles[r]} of {needs.each_role}" for r in _ROLES if roles[r] < needs.each_role]
    found += [f"trials of kind {k}: {kinds[k]} of {_EACH_KIND}" for k in sorted(needs.kinds) if kinds[k] < _EACH_KIND]
    return found


def summary(outcomes: Sequence[Outcome], needs: Needs) -> str:
    """Return the tables."""
    points, roles = _sum(o.points for o in outcomes), _sum(o.roles for o in outcomes)
    passed, kinds = _sum(o.passed for o in outcomes), Counter(o.kind for o in outcomes)
    failed = Counter(o.kind for o in outcomes if o.wrong)
    seconds = sorted(o.seconds for o in outcomes) or [0.0]
    totals = (
        f"{len(outcomes)} trials, {sum(o.kills for o in outcomes)} kills, {sum(failed.values())} trials failed; "
        f"{seconds[len(seconds) // 2]:.1f} s for a trial (median), {seconds[-1]:.1f} s at most."
    )
    lines = [
        "## Campaign",
        "",
        totals,
        "",
        "| kind of trial | trials | failed |",
        "|---|---|---|",
        *(f"| {kind} | {kinds[kind]} | {failed[kind]} |" for kind in sorted(kinds)),
        "",
        "| fault point | role | passed by those who lived | kills |",
        "|---|---|---|---|",
        *(f"| {name} | {point.role} | {passed[name]} | {points[name]} |" for name, point in POINTS.items()),
        "",
        "| role | kills |",
        "|---|---|",
        *(f"| {role} | {roles[role]} |" for role in (*_ROLES, "any", "host")),
        "",
        "| from the death of | survivors | median | 90 % | 99 % | slowest | limit | over it |",
        "|---|---|---|---|---|---|---|---|",
        _detection("process", [s for o in outcomes for s in o.process_seconds]),
        _detection("host", [s for o in outcomes for s in o.host_seconds]),
        "",
        _handover([s for o in outcomes for s in o.handover_seconds]),
    ]
    return "\n".join(lines)


def _detection(what: str, seconds: list[float]) -> str:
    limit, values = _LIMITS[what], sorted(seconds)
    if not values:
        return f"| a {what} | 0 | | | | | {limit:g} s | |"
    shown = [values[min(len(values) - 1, int(share * len(values)))] for share in (0.5, 0.9, 0.99, 1.0)]
    return f"| a {what} | {len(values)} | {' | '.join(f'{s:.3f} s' for s in shown)} | {limit:g} s | {sum(s > limit for s in values)} |"


def _handover(seconds: list[float]) -> str:
    if not seconds:
        return "No cut in two parts."
    return (
        f"Cuts: {len(seconds)} shards of smaller parts changed hands, "
        f"{min(seconds):.3f} to {max(seconds):.3f} s after the last answer there."
    )
