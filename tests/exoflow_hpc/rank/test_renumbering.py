"""Tests of what attempts are called once tasks have other indices."""

from __future__ import annotations

import pytest

import exoflow_hpc.dag as ef
from exoflow_hpc.compile import compile_workflow
from exoflow_hpc.errors import ExoFlowError
from exoflow_hpc.expansion import expand
from exoflow_hpc.rank import messages as ms
from exoflow_hpc.rank.renumbering import Renumbering

__all__: list[str] = []


@ef.task
def f(*values: int) -> int:
    return sum(values)


BASE = compile_workflow(f.options(name="c").bind(f.options(name="a").bind(), f.options(name="b").bind()))
SUB = compile_workflow(f.options(name="x").bind())
#: a, a/x, b, c
EXPANDED = expand(BASE, {"a": SUB})
KEPT = {("b", 0), ("c", 4)}


def test_of_what_runs() -> None:
    run = ms.Run(1, 2, 4, 0, False, [["a", 0, True]], [ms.InputPlace(1, "memory", 7)], [ms.InputPlace(0, "memory")])
    found = Renumbering(BASE, EXPANDED).run(run)
    assert (found.task, found.attempt, found.stand) == (3, 4, run.stand)
    assert [place.task for place in (*found.inputs, *found.references)] == [2, 0]
    assert Renumbering(EXPANDED, BASE).run(found) == run


def test_of_what_was_to_be_said() -> None:
    renamed = Renumbering(BASE, EXPANDED)
    finished = ms.Finished(1, 1, 0, [], 3, b"123", 0.1, [[2, 4, 0]], [[0, [], [[1, 0, 1]]]])
    assert renamed.said(finished, 5, KEPT) == ms.Finished(
        5, 2, 0, [], 3, b"123", 0.1, [[3, 4, 0]], [[0, [], [[2, 0, 1]]]]
    )
    failed = ms.Failed(1, 2, 4, "lost-input", [], False, [[1, 0], [1, 0, 3]])
    assert renamed.said(failed, 5, KEPT) == ms.Failed(5, 3, 4, "lost-input", [], False, [[2, 0], [2, 0, 3]])
    assert renamed.said(ms.Corrupt(1, 1, 9, "torn"), 5, KEPT) == ms.Corrupt(5, 2, 9, "torn")
    assert renamed.said(ms.Progress(1, 1, 1, 0.5, ""), 5, KEPT) is None, "of an attempt that is over"
    assert renamed.said(ms.Renew(1, 0.0), 5, KEPT) is None


def test_of_what_the_workflow_has_no_more() -> None:
    gone = Renumbering(EXPANDED, BASE)
    assert gone.said(ms.Progress(1, 1, 0, 0.5, ""), 5, {("a/x", 0)}) is None
    with pytest.raises(ExoFlowError, match="no task 'a/x'"):
        gone.task(1)
