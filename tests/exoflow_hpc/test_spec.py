from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import exoflow_hpc.dag as ef
from exoflow_hpc.compile import compile_workflow
from exoflow_hpc.errors import CorruptCheckpointError, ExoFlowError, IllegalAnnotationError
from exoflow_hpc.spec import WorkflowSpec

ROOT = Path(__file__).parents[2]


@ef.task
def f(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


@ef.task
def g(x: Any = None) -> Any:
    return x


@dataclasses.dataclass(frozen=True)
class Pair:
    left: Any
    right: Any


def evaluate(spec: WorkflowSpec) -> Any:
    """Run a spec as the worker does, one task after the other."""
    values: list[Any] = []
    for task in spec.tasks:
        if task.kind == "reduce":
            values.append(np.sum([values[source] for source in task.data], axis=0))
        else:
            args, kwargs = task.arguments(values.__getitem__, spec.blob)
            values.append(spec.function(task.index)(*args, **kwargs))
    return values[spec.output]


def test_nodes_are_found_wherever_they_are() -> None:
    one, two, three, four = (g.bind(n) for n in (1, 2, 3, 4))
    node = f.bind([one, (two,)], Pair({"k": three}, 0), last=[lambda: four, one])
    spec = WorkflowSpec.from_bytes(compile_workflow(node).to_bytes())
    assert [task.name for task in spec.tasks] == ["g", "g_1", "g_2", "g_3", "f"]
    assert spec.tasks[4].data == (0, 1, 2, 3)
    (first, second), kwargs = evaluate(spec)
    assert (first, second) == ([1, (2,)], Pair({"k": 3}, 0))
    assert kwargs["last"][0]() == 4
    assert kwargs["last"][1] == 1


def test_a_spec_is_the_same_after_a_journey_and_in_a_pickle() -> None:
    spec = compile_workflow(f.bind(g.bind(1).after(g.bind(2)), ef.InputNode().x), {"x": "ü"})
    assert WorkflowSpec.from_bytes(spec.to_bytes()) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_limits_of_a_task_are_in_the_spec_and_in_the_fingerprint() -> None:
    options: dict[str, Any] = {"timeout": 5, "memory": "1 KiB", "catch_exceptions": True, "retry_delay": 0.5}
    plain = compile_workflow(g.bind(1))
    prints = {plain.fingerprint}
    for key, value in options.items():
        prints.add(compile_workflow(g.options(**{key: value}).bind(1)).fingerprint)
    assert len(prints) == 5
    spec = compile_workflow(g.options(**options).bind(1))
    task = WorkflowSpec.from_bytes(spec.to_bytes()).tasks[0]
    assert (task.timeout, task.memory, task.catch_exceptions, task.retry_delay) == (5.0, 1024, True, 0.5)


def test_a_task_whose_failures_are_caught_never_counts_as_deterministic() -> None:
    assert compile_workflow(g.bind(1)).tasks[0].deterministic
    assert not compile_workflow(g.options(catch_exceptions=True).bind(1)).tasks[0].deterministic


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b[:20], lambda b: b"x" + b[1:], lambda b: b + b"!", lambda b: b""]
)
def test_a_damaged_spec_is_never_read(damage: Any) -> None:
    data = compile_workflow(g.bind(1)).to_bytes()
    with pytest.raises(CorruptCheckpointError, match="the file"):
        WorkflowSpec.from_bytes(damage(data), "the file")


def test_any_flipped_byte_is_seen() -> None:
    data = compile_workflow(g.bind(1)).to_bytes()
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 0x10
        with pytest.raises(CorruptCheckpointError):
            WorkflowSpec.from_bytes(bytes(flipped))


def test_names_are_unique_and_explicit_ones_come_first() -> None:
    nodes = [g.bind(0), g.bind(1), g.options(name="g_1").bind(2), g.options(name="g_1").bind(3)]
    spec = compile_workflow(f.bind(nodes))
    assert [task.name for task in spec.tasks] == ["g", "g_2", "g_1", "g_1_1", "f"]
    assert spec.index("g_1") == 2
    with pytest.raises(ExoFlowError, match="no task 'g_9': did you mean g"):
        spec.index("g_9")


def test_functions_and_large_constants_are_stored_once() -> None:
    table = np.arange(100_000.0)
    spec = compile_workflow(
        f.bind([g.bind((table, n)) for n in range(50)], g.bind(1).after(g.options(name="x").bind(0)))
    )
    assert len({task.function for task in spec.tasks}) == 2
    assert len(spec.to_bytes()) < 2 * table.nbytes
    (values, _), _ = evaluate(spec)
    assert [n for _, n in values] == list(range(50))
    np.testing.assert_array_equal(values[7][0], table)
    assert spec.tasks[0].needed_blobs == (spec.tasks[0].function, *spec.tasks[0].blobs)


def test_inputs_are_filled_in() -> None:
    inputs = ef.InputNode()
    assert evaluate(compile_workflow(f.bind(inputs.x, y=[inputs["y"]]), {"x": 1, "y": {2}})) == ((1,), {"y": [{2}]})
    assert evaluate(compile_workflow(g.bind(inputs), {"x": 1})) == {"x": 1}
    assert evaluate(compile_workflow(g.bind(inputs), 5)) == 5
    assert evaluate(compile_workflow(g.bind(inputs))) == {}
    assert evaluate(compile_workflow(g.bind(1), {"x": 2}, unused_inputs=True)) == 1


@pytest.mark.parametrize(
    ("node", "inputs", "message"),
    [
        (g.bind(ef.InputNode().x), {"z": 1, "y": 2}, "input 'x', which is missing; given: y, z"),
        (g.bind(ef.InputNode().x), None, "given: none"),
        (g.bind(ef.InputNode().x), 3, "by name, but was given one of type int"),
        (g.bind(ef.InputNode().x), {"x": 1, "z": 1}, "no task of the workflow takes the input 'z'; it takes: x"),
        (g.bind(1), 3, "no task of the workflow takes|an input was given"),
        (g.bind(ef.InputNode().x), {"x": threading.Lock()}, "input 'x' can't be pickled"),
    ],
)
def test_wrong_inputs_are_named(node: Any, inputs: Any, message: str) -> None:
    with pytest.raises(ef.BadWorkflowError, match=message):
        compile_workflow(node, inputs)


@pytest.mark.parametrize(
    ("value", "message"),
    [(None, "missing"), (g, "bind"), ([g.bind(1)], "a list"), (ef.InputNode().x, "runs nothing"), (3, "type int")],
)
def test_what_is_no_dag(value: Any, message: str) -> None:
    with pytest.raises(ef.BadWorkflowError, match=message):
        compile_workflow(value)


def test_a_circle_is_named() -> None:
    first = g.options(name="first").bind(1)
    second = g.options(name="second").bind(first)
    first.after(g.options(name="between").bind(0).after(second.committed()))
    with pytest.raises(ef.BadWorkflowError, match="circle: second ← first ← between ← second"):
        compile_workflow(f.bind(second))
    node = g.bind(1)
    node.after(node)
    with pytest.raises(ef.BadWorkflowError, match="circle: g ← g;"):
        compile_workflow(node)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: f.bind(1, [threading.Lock()]), r"argument 2 \(list\) of task 'f' can't be pickled: TypeError.*lock"),
        (lambda: f.bind(1, key=threading.Lock()), "argument 'key'"),
        (lambda: f.bind(n for n in [1]), "generator"),
    ],
)
def test_an_argument_that_can_not_be_pickled_is_named(build: Any, message: str) -> None:
    with pytest.raises(ef.BadWorkflowError, match=message):
        compile_workflow(build())


def test_a_list_that_is_too_deep_is_an_error_and_no_crash() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ef.BadWorkflowError, match=r"argument 1.*nested too deeply"):
        compile_workflow(g.bind(deep))
    while deep:
        deep = deep[0]


def test_a_function_that_can_not_be_pickled_is_named() -> None:
    lock = threading.Lock()

    @ef.task
    def locked() -> Any:
        return lock

    with pytest.raises(ef.BadWorkflowError, match=r"function of task 'locked'.*lock"):
        compile_workflow(locked.bind())


def test_waiting_for_a_commit_that_will_never_be_is_refused() -> None:
    skipped = g.options(name="loose", checkpoint="skip").bind(1)
    with pytest.raises(IllegalAnnotationError, match="'f' waits for the commit of 'loose'"):
        compile_workflow(f.bind().after(skipped.committed()))
    with pytest.raises(IllegalAnnotationError):
        compile_workflow(f.bind().after(g.bind(1).committed()), checkpoint="skip")


def test_auto_is_what_the_workflow_says() -> None:
    node = f.bind(g.bind(1), g.options(checkpoint="sync").bind(2))
    assert [t.checkpoint for t in compile_workflow(node, checkpoint="skip").tasks] == ["skip", "sync", "skip"]
    assert [t.checkpoint for t in compile_workflow(node).tasks] == ["auto", "sync", "auto"]


def test_options_and_edges_are_kept() -> None:
    upstream = g.options(name="up").bind(1)
    node = g.options(max_retries=7, retry_exceptions=(OSError,)).bind(2).after(upstream, upstream.committed(), upstream)
    spec = WorkflowSpec.from_bytes(compile_workflow(node).to_bytes())
    task = spec.tasks[1]
    assert (task.after, task.barriers, task.data, task.max_retries) == ((0,), (0,), (), 7)
    assert spec.is_retryable(1, FileNotFoundError())
    assert not spec.is_retryable(1, KeyError())
    assert not spec.is_retryable(0, OSError())


def test_a_reduce_has_its_sources_in_order() -> None:
    sources = [g.bind(np.full(3, n)) for n in range(4)]
    spec = compile_workflow(ef.reduce(sources[::-1], name="all").after(g.options(name="last").bind(0)))
    assert spec.tasks[-1].kind == "reduce"
    assert (spec.tasks[-1].op, spec.tasks[-1].data, spec.tasks[-1].function) == ("sum", (0, 1, 2, 3), "")
    np.testing.assert_array_equal(evaluate(spec), [6, 6, 6])


def test_what_the_program_changes_later_has_no_effect() -> None:
    values = [1]
    spec = compile_workflow(g.bind(values))
    values.append(2)
    assert evaluate(spec) == [1]


def test_a_chain_of_ten_thousand() -> None:
    node = g.bind(0)
    for _ in range(10_000):
        node = g.bind(node)
    spec = WorkflowSpec.from_bytes(compile_workflow(node).to_bytes())
    assert len(spec.tasks) == 10_001
    assert all(task.data == (task.index - 1,) for task in spec.tasks[1:])
    assert spec.tasks[-1].name == "g_10000"
    assert len(spec.blobs) == 1


def test_workers_get_the_users_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = compile_workflow(g.bind(1))
    assert spec.sys_path[0] == str(tmp_path)
    assert not any(
        os.path.realpath(entry).startswith(os.path.realpath(os.path.dirname(os.__file__))) for entry in spec.sys_path
    )


def test_a_function_of_main_runs_where_main_is_another(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(
        "import exoflow_hpc.dag as ef, sys\n"
        "from exoflow_hpc.compile import compile_workflow\n"
        "N = 40\n"
        "class Box:\n    def __init__(self, x): self.x = x\n"
        "def helper(x): return Box(x.x + N)\n"
        "@ef.task\ndef work(x): return helper(x).x\n"
        "open(sys.argv[1], 'wb').write(compile_workflow(work.bind(Box(2))).to_bytes())\n"
    )
    spec_file = tmp_path / "spec"
    subprocess.run(
        [sys.executable, script, spec_file], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60
    )
    assert evaluate(WorkflowSpec.from_bytes(spec_file.read_bytes())) == 42
