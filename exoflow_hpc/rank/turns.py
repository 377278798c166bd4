"""Runs of a job, which its ranks count alike, and which rank controls which of them."""

from __future__ import annotations

from dataclasses import dataclass

from hoplite_mpi.protocol.view import View

__all__ = ["Turn", "controlling"]


@dataclass(frozen=True)
class Turn:
    """A run's place among those of a job."""

    #: counted from 0, in the order in which a rank calls for them: the same on each rank
    number: int
    #: rank that controls it if it has been there for long enough; runs at the same time have different ones
    first: int = 0


def controlling(view: View, first: int) -> int:
    """Return the rank that controls a run: of the members that have been there for longest the next one from *first* on, in a ring.

    Each rank says the same without asking; a loss moves the runs of the lost rank only, and whoever joins takes none from a member that
    is there.
    """
    joined = min(member.joined for member in view.members.values())
    senior = sorted(member.rank for member in view.members.values() if member.joined == joined)
    return next((rank for rank in senior if rank >= first), senior[0])
