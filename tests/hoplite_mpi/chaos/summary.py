"""What a campaign has done, as tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tests.chaos.counts import Needs, tables

if TYPE_CHECKING:
    from tests.hoplite_mpi.chaos.trial import Outcome

__all__ = ["summary"]

#: seconds from a death to the view without it
_LIMITS = {"process": 0.5, "host": 5.0}


def summary(outcomes: Sequence[Outcome], needs: Needs) -> str:
    """Return the tables."""
    lines = [
        *tables(outcomes, needs, ("any", "host")),
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
