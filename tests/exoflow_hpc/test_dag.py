from __future__ import annotations

import copy
import pickle
from typing import Any

import cloudpickle
import pytest

import exoflow_hpc.dag as ef
from exoflow_hpc.errors import IllegalAnnotationError
from exoflow_hpc.options import check_name


@ef.task
def add(x: int, y: int = 1) -> int:
    """Add."""
    return x + y


@ef.task(name="total", max_retries=1)
def total(values: list[int]) -> int:
    return sum(values)


@ef.task
def countdown(n: int) -> int:
    return n if n == 0 else countdown(n - 1)


def test_a_task_called_directly_is_the_function() -> None:
    assert add(2, y=3) == 5
    assert add.__doc__ == "Add."
    assert (add.name, total.name) == ("add", "total")


def test_options_make_another_task() -> None:
    other = add.options(name="plus", checkpoint="sync")
    assert (other.name, other.task_options.checkpoint) == ("plus", "sync")
    assert (add.name, add.task_options.checkpoint) == ("add", "auto")
    assert other.options(max_retries=0).name == "plus"
    assert other(1) == 2


@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((1, 2, 3), {}), ((1,), {"z": 1})])
def test_bind_checks_the_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"'add' can't be bound.*add\(x"):
        add.bind(*args, **kwargs)


def test_what_can_not_be_a_task() -> None:
    async def coroutine() -> None: ...

    def generator() -> Any:
        yield 1

    class Class: ...

    for wrong in (coroutine, generator, Class, 3):
        with pytest.raises(TypeError):
            ef.task(wrong)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="already"):
        ef.task(add)
    with pytest.raises(IllegalAnnotationError):
        ef.task(num_returns=2)


def test_a_task_travels_even_if_it_calls_itself() -> None:
    again = pickle.loads(cloudpickle.dumps(countdown))
    assert again(5) == 0
    assert again.name == "countdown"
    again.bind(3)


def test_nodes_do_not_travel() -> None:
    node = add.bind(1)
    for thing in (node, node.committed(), ef.InputNode()["x"]):
        with pytest.raises(TypeError, match=r"pickled|after"):
            cloudpickle.dumps([thing])


def test_after() -> None:
    first, second, third = add.bind(1), add.bind(2), add.bind(3)
    assert third.after(first).after(second.committed()) is third
    assert third.controls == [(first, False), (second, True)]
    for wrong in (3, add, ef.InputNode().x):
        with pytest.raises(TypeError, match="after"):
            third.after(wrong)  # type: ignore[arg-type]


def test_inputs_by_key_and_by_attribute() -> None:
    inputs = ef.InputNode()
    assert inputs["x"].key == inputs.x.key == "x"
    assert inputs["_x"].key == "_x"
    assert copy.copy is not None
    for wrong in (lambda: inputs[0], lambda: list(inputs)):  # type: ignore[index]
        with pytest.raises(TypeError, match="name"):
            wrong()
    with pytest.raises(AttributeError):
        inputs.__array__  # noqa: B018  (NumPy asks)


def test_reduce_takes_nodes_only() -> None:
    one, two = add.bind(1), add.bind(2)
    node = ef.reduce([one, two], op="max", name="best")
    assert (node.name, node.op, node.sources) == ("best", "max", (one, two))
    assert ef.reduce(iter([one])).op == "sum"
    with pytest.raises(TypeError, match="not one"):
        ef.reduce([one, 3])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="not one"):
        ef.reduce([ef.InputNode().x])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="catch_exceptions"):
        ef.reduce([add.options(catch_exceptions=True).bind(1)])
    with pytest.raises(ValueError, match="no nodes"):
        ef.reduce([])
    with pytest.raises(ValueError, match="twice"):
        ef.reduce([one, one])
    with pytest.raises(ValueError, match="sum, prod"):
        ef.reduce([one], op="median")
    with pytest.raises(ValueError, match="checkpoint"):
        ef.reduce([one], checkpoint="perhaps")


@pytest.mark.parametrize("name", ["a/b", "..", "", "x" * 300, "a b", "\ud800", "<lambda>"])
def test_any_name_of_a_function_becomes_one_that_a_task_can_have(name: str) -> None:
    def function() -> None: ...

    function.__name__ = name
    assert check_name(ef.task(function).name) is not None
