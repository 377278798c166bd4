"""Which rank controls which run."""

from __future__ import annotations

from exoflow_hpc.rank.turns import controlling
from hoplite_mpi.protocol.view import Member, View

__all__: list[str] = []


def view(**joined: int) -> View:
    """Return a view of ranks that joined in the views of those numbers."""
    return View(9, {int(name[1:]): Member(int(name[1:]), 0, "n", ("h", 1), when) for name, when in joined.items()})


def test_runs_are_spread_over_the_ranks() -> None:
    assert [controlling(view(r0=1, r1=1, r2=1), first) for first in range(3)] == [0, 1, 2]


def test_the_first_one_is_controlled_by_the_coordinator() -> None:
    for one in (view(r0=1, r1=1), view(r1=1, r2=1), view(r0=4, r1=2, r2=3), view(r0=3, r2=3)):
        assert controlling(one, 0) == one.coordinator


def test_a_loss_moves_the_runs_of_the_lost_rank_only() -> None:
    before, after = view(r0=1, r1=1, r2=1, r3=1), view(r0=1, r2=1, r3=1)
    for first in range(4):
        had, has = controlling(before, first), controlling(after, first)
        assert had == has if had != 1 else has == 2


def test_the_ring_is_closed() -> None:
    assert controlling(view(r0=1, r1=1, r2=1), 7) == 0
    assert controlling(view(r0=1, r1=1), 2) == 0


def test_one_that_joins_takes_no_run_from_those_that_are_there() -> None:
    assert [controlling(view(r0=1, r1=5, r2=1), first) for first in range(3)] == [0, 2, 2]
    assert [controlling(view(r0=7, r1=5, r2=7), first) for first in range(3)] == [1, 1, 1]
