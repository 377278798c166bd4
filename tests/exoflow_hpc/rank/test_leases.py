"""Tests of leases: for how long somebody may still have effects."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from exoflow_hpc import heartbeat, records
from exoflow_hpc.errors import FencedError
from exoflow_hpc.history import Facts
from exoflow_hpc.rank.leases import DRIFT, GRACE, Leases, unfinished

__all__: list[str] = []

PLACE = records.Inline(b"")


def no_check() -> None: ...


def started(attempt: int = 0, process: dict[str, object] | None = None) -> records.TaskStarted:
    return records.TaskStarted("t", attempt, 0, process=process or {})


def test_a_rank_that_is_lost_may_have_effects_until_its_lease_is_over() -> None:
    leases = Leases(100.0, no_check)
    leases.grant(3)
    assert 100.0 * DRIFT - 1.0 < leases.seconds_left(3, dead=False) - GRACE <= 100.0 * DRIFT
    leases.grant(3)
    assert leases.seconds_left(3, dead=True) == GRACE


def test_one_that_was_granted_none_counts_from_the_begin_of_the_epoch() -> None:
    leases = Leases(0.01, no_check)
    time.sleep(0.02)
    assert leases.seconds_left(1, dead=False) == GRACE


def test_nothing_is_granted_by_who_was_replaced() -> None:
    def fenced() -> None:
        raise FencedError("another controller has taken over")

    leases = Leases(100.0, fenced)
    with pytest.raises(FencedError):
        leases.grant(0)
    with pytest.raises(FencedError):
        leases.grant(0)  # a look that failed counts for none


def test_the_epoch_is_not_looked_at_for_each_rank() -> None:
    looks: list[int] = []
    leases = Leases(100.0, lambda: looks.append(1))
    for rank in range(10):
        leases.grant(rank)
    assert len(looks) <= 2


def test_what_an_older_epoch_began_is_waited_for_unless_its_process_is_gone() -> None:
    leases = Leases(10.0, no_check)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import json; from exoflow_hpc import heartbeat; print(json.dumps(heartbeat.identity()))",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    gone = json.loads(done.stdout)  # of a process that has ended
    assert leases.seconds_left_of([started(process=gone)]) == GRACE
    assert leases.seconds_left_of([started(process=gone), started(process=heartbeat.identity())]) > 11.0 * DRIFT
    assert leases.seconds_left_of([started()]) > 11.0 * DRIFT, "nobody knows whose it was"


def test_what_is_unfinished() -> None:
    commit = records.TaskCommitted("t", 1, 0, PLACE, "", 0, [])
    facts = Facts[int](effects={0: started(1), 1: started(2), 2: started(0)}, results={0: commit, 1: commit})
    facts.rollbacks[0] = records.RollbackStarted("t", 5)
    assert sorted((task, start.attempt) for task, start in unfinished(facts)) == [(0, 5), (1, 2), (2, 0)]
