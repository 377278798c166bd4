"""What a campaign has done, as tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tests.chaos.counts import Needs, tables

if TYPE_CHECKING:
    from tests.exoflow_hpc.chaos.trial import Outcome

__all__ = ["summary"]

_SUMS = ("tasks", "starts", "undone", "void", "epochs", "commands", "stops")


def summary(outcomes: Sequence[Outcome], needs: Needs) -> str:
    """Return the tables."""
    sums = [sum(getattr(outcome, name) for outcome in outcomes) for name in _SUMS]
    several = sum(outcome.kills > 1 for outcome in outcomes)
    return "\n".join(
        [
            *tables(outcomes, needs, passed=False),
            "| tasks | started | effects undone | commits void | epochs | commands | processes stopped | trials with two kills or more |",
            "|---|---|---|---|---|---|---|---|",
            f"| {' | '.join(map(str, [*sums, several]))} |",
        ]
    )
