"""Tests of what a rank remembers of its outputs."""

from __future__ import annotations

from exoflow_hpc.rank.made import Made, MadeOutputs

__all__: list[str] = []


def made(task: int, nbytes: int = 100) -> Made:
    return Made(str(task), 0, ["bytes", nbytes, None, None], nbytes, bytes(nbytes), [])


def tasks(outputs: MadeOutputs) -> list[int]:
    return [int(one.task) for one in outputs.all()]


def test_the_oldest_are_forgotten() -> None:
    outputs = MadeOutputs(3 * made(0).cost)
    for task in range(5):
        outputs.add(made(task))
    assert tasks(outputs) == [2, 3, 4]


def test_the_newest_is_remembered_whatever_its_size() -> None:
    outputs = MadeOutputs(10)
    outputs.add(made(0))
    outputs.add(made(1))
    assert tasks(outputs) == [1]


def test_what_does_not_count_makes_room() -> None:
    outputs = MadeOutputs(3 * made(0).cost)
    for task in range(3):
        outputs.add(made(task))
    outputs.keep({("1", 0)})
    for task in range(3, 5):
        outputs.add(made(task))
    assert tasks(outputs) == [1, 3, 4]
    outputs.clear()
    assert tasks(outputs) == []
