"""What a rank answers about runs that it takes part in, has not come to, or that are over for it."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest

from exoflow_hpc.rank import messages as ms
from exoflow_hpc.rank.loop import Loop
from exoflow_hpc.rank.running import Running
from exoflow_hpc.rank.session import Session
from exoflow_hpc.rank.shares import Shares
from exoflow_hpc.rank.turns import Turn
from hoplite_mpi.protocol.view import Member, View

__all__: list[str] = []

BEGIN = ms.Begin(3, "w", "/storage/workflows/w", "job.7.ab")
END = ms.End(3, "SUCCESSFUL", b"", "w", "/storage/workflows/w")


def view(**incarnations: int) -> View:
    """Return a view of ranks 0, 1, ... in those incarnations."""
    members = {int(name[1:]): Member(int(name[1:]), one, "n", ("h", 1), 1 + one) for name, one in incarnations.items()}
    return View(1 + sum(incarnations.values()), members)


class Rank:
    """A session of rank 0 with the store, the workers and the writer left out; what it sends is noted."""

    def __init__(self) -> None:
        self.session: Any = Session.__new__(Session)
        self.said: list[tuple[int, int, ms.Message]] = []
        self.session.__dict__.update(
            {"rank": 0, "incarnation": 0, "job": "job", "loop": Loop(), "shares": Shares(), "slots": 2, "led": False},
            store=Mock(closed=False),
            pool=Mock(),
            writer=Mock(),
            settings=Mock(),
            view=view(r0=0, r1=0, r2=0),
            has_lost=False,
            met=set(),
            _runs={},
            _early={},
            _ended={},
            send=lambda run, rank, message: self.said.append((run, rank, message)),
        )

    def hears(self, run: int, rank: int, message: ms.Message, incarnation: int = 0) -> list[Any]:
        """Take a message; return the answers to that rank."""
        self.said.clear()
        self.session._handle((rank, incarnation), run, message)
        return [said for number, to, said in self.said if (number, to) == (run, rank)]

    def takes_part(self, run: int) -> Running:
        running = self.session._runs[run] = Running(self.session, Turn(run), True, False)
        return running


@pytest.fixture
def rank() -> Rank:
    return Rank()


def test_it_need_not_come_to_a_run_that_is_over(rank: Rank) -> None:
    assert rank.hears(7, 1, BEGIN) == []
    assert rank.hears(7, 1, END) == [ms.Over(3)]
    assert 7 not in rank.session._early
    ended = rank.session.run(Mock(side_effect=AssertionError), Turn(7))
    assert (ended.workflow_id, ended.status, ended.directory) == ("w", "SUCCESSFUL", "/storage/workflows/w")


def test_a_later_one_is_told_how_a_run_has_ended_whatever_epoch_it_knows(rank: Rank) -> None:
    rank.session._ended[7] = END
    (told,) = rank.hears(7, 1, ms.Hello(), incarnation=1)
    assert (told.epoch, told.status, told.workflow_dir) == (0, "SUCCESSFUL", "/storage/workflows/w")
    assert rank.hears(7, 1, BEGIN) == [ms.Over(3)], "nobody waits for it"
    assert rank.hears(7, 1, ms.Survey(4, "/storage/workflows/w", "job.7.ab")) == [ms.Report(4, 0, [], [])]


def test_one_that_has_not_come_says_at_once_that_it_has_nothing(rank: Rank) -> None:
    assert rank.hears(7, 1, ms.Survey(4, "/storage/workflows/w", "job.7.ab")) == [ms.Report(4, 0, [], [])]


def test_who_asks_hears_what_was_told_before_this_rank_came(rank: Rank) -> None:
    assert rank.hears(7, 1, ms.Hello(asks=True)) == [ms.Hello(begun=[])]
    rank.hears(7, 2, BEGIN)
    assert rank.hears(7, 1, ms.Hello(asks=True)) == [ms.Hello(begun=["w", "/storage/workflows/w", "job.7.ab"])]
    assert rank.hears(8, 1, ms.Hello(asks=True)) == [ms.Hello(begun=[])], "that is another run"


def test_one_that_greets_while_the_head_says_goodbye_takes_the_end(rank: Rank) -> None:
    running = rank.takes_part(7)
    running._goodbye = END
    (told,) = rank.hears(7, 1, ms.Hello(), incarnation=1)
    assert (told.epoch, told.status) == (0, "SUCCESSFUL"), "it was never told to begin, so it knows no epoch"
    running.close()


def test_nobody_waits_for_the_answer_of_one_that_was_replaced(rank: Rank) -> None:
    running = rank.takes_part(7)
    running._leaving = {(1, 0), (2, 0)}
    rank.hears(7, 1, ms.Over(3), incarnation=1)
    assert running._leaving == {(1, 0), (2, 0)}, "that is another process"
    rank.hears(7, 2, ms.Over(3))
    rank.session._new_view(view(r0=0, r1=1, r2=0), (Member(1, 0, "n", ("h", 1), 1),))
    assert running._leaving == set()
    assert rank.session.has_lost
    running.close()


def test_an_error_of_one_run_does_not_come_out_of_another(rank: Rank) -> None:
    one, other = rank.takes_part(7), rank.takes_part(8)
    one._agent.handle = Mock(side_effect=KeyError("unforeseen"))  # type: ignore[method-assign]
    rank.hears(7, 1, BEGIN)
    assert other._loop.run_until(lambda: True, 1)
    with pytest.raises(KeyError):
        one._loop.run_until(lambda: False, 1)
    one.close()
    other.close()
