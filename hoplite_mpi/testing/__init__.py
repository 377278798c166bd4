"""Public harness for tests that kill: ranks, named fault points, emulated hosts.

Product code imports `fault` from here, so the rest is loaded only when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hoplite_mpi.testing import _fault as fault
from hoplite_mpi.testing._points import POINTS, Point

if TYPE_CHECKING:
    from hoplite_mpi.testing._hosts import EmulatedHosts
    from hoplite_mpi.testing._ranks import RankResult, run_ranks

__all__ = ["POINTS", "EmulatedHosts", "Point", "RankResult", "fault", "run_ranks"]


def __getattr__(name: str) -> Any:
    if name == "EmulatedHosts":
        from hoplite_mpi.testing._hosts import EmulatedHosts

        return EmulatedHosts
    if name in ("RankResult", "run_ranks"):
        from hoplite_mpi.testing import _ranks

        return getattr(_ranks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
