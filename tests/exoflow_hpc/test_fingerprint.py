from __future__ import annotations

import enum
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import exoflow_hpc.dag as ef
from exoflow_hpc.compile import compile_workflow
from exoflow_hpc.fingerprint import Fingerprint

ROOT = Path(__file__).parents[2]

PROGRAM = """
import dataclasses, enum, functools, threading
import numpy as np
import exoflow_hpc.dag as ef
from exoflow_hpc.compile import compile_workflow

LIMITS = {"alpha", "beta", "gamma", "delta"}
LOCK = threading.Lock()

class Colour(enum.Enum):
    RED = 1

@dataclasses.dataclass
class Config:
    names: frozenset
    size: int = 3
    def total(self): return self.size + SCALE

SCALE = 2

def helper(x):
    return x in {"one", "two", "three"} and x not in LIMITS

@ef.task(retry_exceptions=(OSError, KeyError))
def work(x, *, f=lambda v: v + 1):
    def inner(y):
        return helper(y)
    return inner(x), Config, np.sum

configured = work.bind(Config(frozenset("abcdef")))
node = work.bind([configured, {Colour.RED: {1, "a", (2, "b")}}, functools.partial(helper, 1), np.arange(3)])
node.after(ef.reduce([work.bind(ef.InputNode().x)]))
print(compile_workflow(node, {"y": "why", "x": 1.5}, unused_inputs=True).fingerprint)
"""


def fingerprint_of(program: str, path: Path, seed: str = "0") -> str:
    path.write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
    return subprocess.run(
        [sys.executable, path], check=True, env=environment, capture_output=True, text=True, timeout=60
    ).stdout.strip()


def test_it_is_the_same_in_other_processes_files_and_lines(tmp_path: Path) -> None:
    first = fingerprint_of(PROGRAM, tmp_path / "one.py", seed="1")
    assert len(first) == 32
    moved = "# a comment\n\n" + PROGRAM.replace('{"y": "why", "x": 1.5}', '{"x": 1.5, "y": "why"}')
    assert fingerprint_of(moved, tmp_path / "two.py", seed="2") == first


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("v + 1", "v + 2"),
        ('"three"', '"four"'),
        ("inner(x), Config", "inner(x), Colour"),
        ("SCALE = 2", "SCALE = 3"),
        ("self.size + SCALE", "self.size - SCALE"),
        ("size: int = 3", "size: int = 4"),
        ("np.arange(3)", "np.arange(3.0)"),
        ('"x": 1.5', '"x": 1.25'),
        ("KeyError", "IndexError"),
        ("node.after(", "node.after(work.bind(0), "),
        ('frozenset("abcdef")', 'frozenset("abcdeg")'),
        ("ef.reduce([work", "ef.reduce(op='max', nodes=[work"),
    ],
)
def test_any_change_that_matters_is_seen(tmp_path: Path, old: str, new: str) -> None:
    assert old in PROGRAM
    assert fingerprint_of(PROGRAM.replace(old, new), tmp_path / "b.py") != fingerprint_of(PROGRAM, tmp_path / "a.py")


def digest(*values: Any) -> str:
    fingerprint = Fingerprint()
    for value in values:
        fingerprint.add(value)
    return fingerprint.hexdigest()


class Letter(enum.Enum):
    A = 1
    B = 2


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x: Any) -> None:
        self.x = x


def test_values_that_differ_differ() -> None:
    values: list[Any] = [
        None, True, 1, 1.0, 1 + 0j, "1", b"1", -0.0, 0.0, float("nan"), 10**5000, 10**5000 + 1, "\ud800", [], (), {},
        set(), [1], (1,), {1}, frozenset({1}), {1: 2}, {1: 2, 3: 4}, {3: 4, 1: 2}, [[1], 2], [[1, 2]],
        ["ab", "c"], ["a", "bc"],
        list(range(20)), tuple(range(20)), [10**5000] * 20, np.int32(1), np.int64(1), np.zeros(2), np.zeros((2, 1)),
        np.zeros(0),
        np.array(3), np.array([1, "a"], dtype=object), np.zeros(2, dtype="i4,f8"), Letter.A, Letter.B, Letter,
        Slotted(1), Slotted(2),
        len, os.path.join, np.add, np.mean, range(3), slice(1), Ellipsis, types.SimpleNamespace(a=1),
    ]  # fmt: skip
    digests = [digest(value) for value in values]
    assert len(set(digests)) == len(values)
    assert digests == [digest(value) for value in values]


def test_values_that_are_equal_are_equal_whichever_objects_they_are() -> None:
    text = "".join(["shared", " text"])
    assert digest([text, text]) == digest(["shared text", "".join(["shared text"])])
    assert digest(np.arange(6).reshape(2, 3).T) == digest(np.arange(6).reshape(2, 3).T.copy())


def test_what_refers_to_itself_ends() -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    longer: list[Any] = [1, [1]]
    longer[1].append(longer)
    assert digest(loop) == digest(loop) != digest(longer)

    def even(n: int) -> bool:
        return n == 0 or odd(n - 1)

    def odd(n: int) -> bool:
        return n != 0 and even(n - 1)

    assert digest(even) == digest(even) != digest(odd)


def test_order_of_arguments_and_tasks_counts() -> None:
    def f(*args: Any) -> None: ...

    task = ef.task(f)
    one, two = task.bind(1), task.bind(2)
    prints = [
        compile_workflow(node).fingerprint
        for node in (task.bind(one, two), task.bind(two, one), task.bind(one, one), task.bind(1, 2))
    ]
    assert len(set(prints)) == 4
