"""How the runs of a rank share its workers."""

from __future__ import annotations

from unittest.mock import Mock

from exoflow_hpc.rank.shares import Shares

__all__: list[str] = []


def test_each_sees_what_the_others_have() -> None:
    shares = Shares()
    one, other, idle = (shares.join(Mock()) for _ in range(3))
    one.add(3)
    other.add(2)
    other.add(-1)
    assert (one.besides, other.besides, idle.besides) == ((1, 2), (3, 2), (4, 3))


def test_the_others_are_told_and_not_the_one_itself() -> None:
    shares = Shares()
    told = [Mock(), Mock()]
    one, _ = (shares.join(call) for call in told)
    one.add(1)
    assert [call.call_count for call in told] == [0, 1]


def test_what_has_left_has_nothing_and_comes_late_in_vain() -> None:
    shares = Shares()
    told = Mock()
    other, one = shares.join(told), shares.join(Mock())
    one.add(5)
    one.leave()
    assert other.besides == (0, 1)
    calls = told.call_count
    one.leave()
    one.add(-1)
    assert (other.besides, told.call_count) == ((0, 1), calls)
