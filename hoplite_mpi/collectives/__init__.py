"""Collectives over the members of a store, whoever dies in them and whoever joins."""

from __future__ import annotations

from hoplite_mpi.collectives.operations import Collectives
from hoplite_mpi.collectives.rounds import Rounds

__all__ = ["Collectives", "Rounds"]
