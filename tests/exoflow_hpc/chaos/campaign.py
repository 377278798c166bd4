"""The campaign of `exoflow_hpc`: kills of all its kinds of processes during workflows with effects in a database."""

from __future__ import annotations

from tests.chaos.campaign import Campaign
from tests.exoflow_hpc.chaos.plan import KINDS, plan
from tests.exoflow_hpc.chaos.points import POINTS, ROLES
from tests.exoflow_hpc.chaos.summary import summary
from tests.exoflow_hpc.chaos.trial import Outcome, carry_out

__all__ = ["main"]

main = Campaign(
    "make chaos-workflows",
    plan,
    carry_out,
    Outcome,
    summary,
    POINTS,
    KINDS,
    results="build/chaos-workflows.jsonl",
    kills=1000,
    each=8,
    each_role=20,
    more_roles=ROLES,
).main
