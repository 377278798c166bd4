"""The campaign of `hoplite_mpi`: kills, stops and cuts of ranks and hosts under load."""

from __future__ import annotations

from hoplite_mpi.testing import POINTS
from tests.chaos.campaign import Campaign
from tests.hoplite_mpi.chaos.plan import KINDS, plan
from tests.hoplite_mpi.chaos.summary import summary
from tests.hoplite_mpi.chaos.trial import Outcome, carry_out

__all__ = ["main"]

main = Campaign(
    "make chaos", plan, carry_out, Outcome, summary, POINTS, KINDS, results="build/chaos.jsonl", kills=500
).main
