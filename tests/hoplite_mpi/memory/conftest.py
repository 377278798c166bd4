"""Arenas of their own, and other processes to share them with."""

from __future__ import annotations

import ast
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hoplite_mpi
from hoplite_mpi.memory import Arena, arena_directory
from hoplite_mpi.memory._roster import remove_if_unused

_SOURCES = str(Path(hoplite_mpi.__file__).parent.parent)
_PROLOGUE = """
import os, sys
import numpy as np
from hoplite_mpi.errors import *
from hoplite_mpi.ids import ObjectID
from hoplite_mpi.memory import *
from hoplite_mpi.meta import Meta

run = sys.argv[1]
A, B = ObjectID.from_name("a"), ObjectID.from_name("b")

def say(value):
    print(repr(value), flush=True)

def hear():
    line = sys.stdin.readline()
    if not line:
        os._exit(3)  # the test is gone
    return line.strip()

def put(arena, oid, array, version=0):
    array = np.asarray(array)
    region = arena.allocate(oid, Meta.of_array(array), version)
    region.array()[...] = array
    return region.seal()

"""


class Child:
    """Another process of the run: runs *code*; `hear` what it says, `tell` it to go on, `kill` it."""

    def __init__(self, code: str, run: str, *args: str, prefix: tuple[str, ...] = ()) -> None:
        command = [*prefix, sys.executable, "-c", _PROLOGUE + code, run, *args]
        environment = {**os.environ, "PYTHONPATH": _SOURCES}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0
        )
        self._heard = b""
        self.pid = self._process.pid

    def hear(self, timeout: float = 30.0) -> Any:
        """Return the next value it says."""
        assert self._process.stdout is not None
        while b"\n" not in self._heard:
            ready, _, _ = select.select([self._process.stdout], [], [], timeout)
            assert ready, f"the child said nothing for {timeout} s"
            data = os.read(self._process.stdout.fileno(), 65536)
            assert data, f"the child ended with {self._process.wait(timeout)}"
            self._heard += data
        line, _, self._heard = self._heard.partition(b"\n")
        return ast.literal_eval(line.decode())

    def tell(self, line: str = "go") -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        self._process.send_signal(signal.SIGKILL)
        assert self._process.wait(10) == -signal.SIGKILL

    def wait(self, timeout: float = 30.0) -> int:
        return self._process.wait(timeout)

    def stop(self) -> None:
        """Clean up whatever state it is in."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(10)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


@pytest.fixture
def run() -> Iterator[str]:
    """A run id whose arena nobody may use after the test; what killed processes left is swept."""
    name = f"test-{secrets.token_hex(6)}"
    yield name
    directory = arena_directory(name)
    remove_if_unused(directory)
    left = sorted(os.listdir(directory)) if os.path.exists(directory) else None
    shutil.rmtree(directory, ignore_errors=True)
    assert left is None, f"the test left {left} in {directory}, in use by a live process"


@pytest.fixture
def child(run: str) -> Iterator[Callable[..., Child]]:
    """Start processes of the run."""
    children: list[Child] = []

    def start(code: str, *args: str, prefix: tuple[str, ...] = ()) -> Child:
        children.append(Child(code, run, *args, prefix=prefix))
        return children[-1]

    yield start
    for one in children:
        one.stop()


@pytest.fixture
def arena(run: str) -> Iterator[Arena]:
    with Arena(run, 0, 0) as one:
        yield one


@pytest.fixture
def mate(run: str, arena: Arena) -> Iterator[Arena]:
    """Another process of the node, as far as the arena can tell."""
    with Arena(run, 1, 0) as one:
        yield one
