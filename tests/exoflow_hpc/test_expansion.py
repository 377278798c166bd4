"""Workflows by what their tasks continue with: names, edges and order of the tasks, and what the journal says of them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

import exoflow_hpc.dag as ef
from exoflow_hpc import history, records, serialize
from exoflow_hpc.compile import compile_workflow
from exoflow_hpc.context import TaskContext, activate
from exoflow_hpc.continuations import continuation
from exoflow_hpc.expansion import expand
from exoflow_hpc.semantics import descendants, plan
from exoflow_hpc.spec import WorkflowSpec

__all__: list[str] = []


def _task(name: str, *data: ef.StepNode, **options: Any) -> ef.TaskNode:
    return ef.task(name=name, **options)(_values).bind(*data)


def _values(*values: Any) -> Any:
    return values


def chain(*names: str, **options: Any) -> WorkflowSpec:
    """Return the spec of tasks of which each takes the output of the one before."""
    node: ef.StepNode | None = None
    for name in names:
        node = _task(name, *([] if node is None else [node]), **options)
    return compile_workflow(node)


def edges(spec: WorkflowSpec) -> dict[str, list[str]]:
    """Return name → names of the tasks that it takes outputs of; every edge has to point back."""
    assert all(one < task.index for task in spec.tasks for one in (*task.data, *task.after, *task.barriers))
    assert [task.index for task in spec.tasks] == list(range(len(spec.tasks)))
    return {task.name: [spec.tasks[one].name for one in task.data] for task in spec.tasks}


def ends(spec: WorkflowSpec) -> dict[str, str]:
    return {spec.tasks[task].name: spec.tasks[end].name for task, end in spec.ends.items()}


def test_consumers_take_the_output_of_the_dag() -> None:
    base = chain("a", "b", "c")
    found = expand(base, {"b": chain("x", "y")})
    assert edges(found) == {"a": [], "b": ["a"], "b/x": ["b"], "b/y": ["b/x"], "c": ["b/y"]}
    assert ends(found) == {"b": "b/y"}
    assert found.tasks[found.output].name == "c"
    assert found.fingerprint == base.fingerprint
    assert set(base.blobs) | set(chain("x", "y").blobs) == set(found.blobs)
    assert WorkflowSpec.from_bytes(found.to_bytes()) == found
    assert expand(base, {}) is base


def test_the_output_of_the_workflow_can_continue_again_and_again() -> None:
    found = expand(chain("a"), {"a": chain("a"), "a/a": chain("a"), "a/a/a": chain("b")})
    assert edges(found) == {"a": [], "a/a": ["a"], "a/a/a": ["a/a"], "a/a/a/b": ["a/a/a"]}
    assert set(ends(found).values()) == {"a/a/a/b"}
    assert found.tasks[found.output].name == "a/a/a/b"


def test_what_a_void_continuation_had_brought_is_left_out() -> None:
    found = expand(chain("a", "b"), {"a": chain("x"), "a/gone": chain("y"), "other": chain("z")})
    assert list(edges(found)) == ["a", "a/x", "b"]


def test_a_thousand_deep() -> None:
    continued, name = {}, "a"
    for _ in range(1000):
        continued[name] = chain("a")
        name += "/a"
    found = expand(chain("a"), continued)
    assert found.tasks[found.output].name == name
    assert len(found.tasks) == 1001


def test_control_edges_and_reduces_go_to_the_output_too() -> None:
    one, two = _task("one"), _task("two")
    total = ef.reduce([one, two], "sum")
    base = compile_workflow(_task("last", total).after(one, two.committed()))
    sub = compile_workflow(ef.reduce([_task("p"), _task("q")], "sum"))
    found = expand(base, {"one": sub})
    assert edges(found)["reduce"] == ["one/reduce", "two"]
    assert edges(found)["one/reduce"] == ["one/p", "one/q"]  # a reduce takes nothing but its sources
    last = found.tasks[found.output]
    assert [found.tasks[task].name for task in (*last.after, *last.barriers)] == ["one/reduce", "two"]
    assert edges(expand(base, {"two": sub}))["reduce"] == ["one", "two/reduce"]


def test_checkpoint_modes() -> None:
    base = chain("a", "b", checkpoint="skip")
    sub = compile_workflow(_task("y", _task("x"), checkpoint="async"))
    found = expand(base, {"a": sub})
    assert [task.checkpoint for task in found.tasks] == ["sync", "skip", "async", "skip"]


def test_arguments_are_found_where_they_were() -> None:
    base = compile_workflow(_task("c", _task("a"), _task("b")))
    found = expand(base, {"a": chain("x"), "b": chain("y")})
    task = found.tasks[found.output]
    args, _ = task.arguments(lambda index: found.tasks[index].name, found.blob)
    assert args == ("a/x", "b/y")


def test_what_comes_of_a_value_that_varies_is_void_with_it() -> None:
    base = compile_workflow(_task("b", _task("a", deterministic=False)))
    found = expand(base, {"a": compile_workflow(_task("z", _task("x"), _task("y").after(_task("w"))))})
    names = [task.name for task in found.tasks]
    assert [names[one] for one in descendants(found.tasks, [0])] == names[1:]
    committed = {names.index("a/x")}
    begin = plan(found.tasks, found.output, committed)
    assert set(begin.void) == committed
    again = plan(found.tasks, found.output, {*committed, 0})
    assert not again.void
    assert 0 not in again.wanted
    assert not plan(found.tasks, found.output, {names.index("a/x"), names.index("a/y")}).void  # nobody needs it again


# -- the journal


def record(task: str, attempt: int, spec: WorkflowSpec | None = None) -> dict[str, Any]:
    packed = serialize.pack(1 if spec is None else spec.to_bytes())
    continued = "" if spec is None else spec.fingerprint
    data, meta = packed.to_bytes(), packed.meta
    checksum = serialize.checksum(meta, data)
    place = records.Inline(data)
    wire = records.encode(
        records.TaskCommitted(task, attempt, 0, place, checksum, len(data), meta.to_wire(), continued=continued)
    )
    assert ("continued" in wire) == bool(spec)
    return wire


def void(task: str, attempt: int, lost: bool = True) -> dict[str, Any]:
    return records.encode(records.TaskVoided(task, attempt, "", lost))


def loaded(base: WorkflowSpec, past: list[dict[str, Any]]) -> WorkflowSpec:
    return history.expanded(base, Path("none"), history.continued(past))


def test_the_last_continuation_counts_until_its_task_is_committed_anew() -> None:
    base, first, second = chain("a", "b"), chain("x"), chain("y", "z")
    past = [record("a", 0, first)]
    assert list(edges(loaded(base, past))) == ["a", "a/x", "b"]
    past += [record("a/x", 0), void("a", 0), void("a/x", 0)]
    assert list(edges(loaded(base, past))) == ["a", "a/x", "b"]
    assert 0 not in history.facts_of(loaded(base, past), past).committed
    again = [*past, record("a", 1, second), record("a/z", 0)]
    found = loaded(base, again)
    assert list(edges(found)) == ["a", "a/y", "a/z", "b"]
    assert set(history.facts_of(found, again).committed) == {0, 2}  # and what is said of a/x is no matter any more
    plain = [*past, record("a", 1)]
    assert list(edges(loaded(base, plain))) == ["a", "b"]
    assert set(history.facts_of(loaded(base, plain), plain).committed) == {0}


def test_other_pickles_of_the_same_are_the_same() -> None:
    spec = chain("x")
    one, other = (records.decode(record("a", 0, each)) for each in (spec, WorkflowSpec.from_bytes(spec.to_bytes())))
    assert isinstance(one, records.TaskCommitted)
    assert isinstance(other, records.TaskCommitted)
    assert one.seen_as == other.seen_as != one.checksum


# -- for users


def test_outside_of_a_task() -> None:
    with pytest.raises(TypeError, match="running task"):
        continuation(_task("a"))


def test_it_is_no_value() -> None:
    with activate(TaskContext("w", "t", 0, 0, 1)):
        found = continuation(_task("a"))
        with pytest.raises(ef.BadWorkflowError, match="node of a DAG"):
            continuation(3)
    with pytest.raises(TypeError, match="all that a task returns"):
        pickle.dumps([found])
    with pytest.raises(TypeError, match="all that a task returns"):
        serialize.pack({"k": found})
