"""Runs of `python -m exoflow_hpc` from outside: what a user types, sees and kills."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exoflow_hpc._frames import scan

__all__ = ["REPOSITORY", "Cli", "Namespace", "Process", "Result"]

REPOSITORY = Path(__file__).parents[3]
#: seconds that one command may take before the test fails
LIMIT = 90.0

#: functions that the tests' workflow files share; `log` is one atomic append, so that lines of killed tasks are whole
PREAMBLE = '''
import os, threading, time
import numpy as np
import exoflow_hpc as ef

def log(directory, *words):
    fd = os.open(os.path.join(directory, "log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(fd, (" ".join(map(str, words)) + "\\n").encode())
    finally:
        os.close(fd)

@ef.task(checkpoint="sync")
def step(directory, i):
    """Leave one line for each time it really runs."""
    log(directory, "step", i, os.getpid())
    return i

@ef.task(checkpoint="sync")
def gated(directory, i, before):
    """Say where it runs, then wait until the test opens the gate."""
    log(directory, "gated", i, os.getpid())
    deadline = time.monotonic() + 80
    while not os.path.exists(os.path.join(directory, "gate")):
        if time.monotonic() > deadline:
            raise TimeoutError("the test never opened the gate")
        time.sleep(0.01)
    log(directory, "passed", i, os.getpid())
    return sum(before) * 100 + i

@ef.task(checkpoint="sync")
def block(directory, i, before):
    """Return an array too large for the journal: in the directory of the store, or in shared memory if i is odd."""
    here = ef.context()
    log(directory, "block", here.task_id, here.epoch, here.attempt, os.getpid())
    return np.full(20_000 if i % 2 else 2_000, i + sum(int(one[-1]) for one in before))

@ef.task
def total(parts):
    return sum(int(np.max(part)) for part in parts)
'''

#: see `Cli.gated`
GATED_WORKFLOW = """
def workflow(directory, steps=4, gates=1):
    done = [step.bind(directory, i) for i in range(int(steps))]
    return total.bind([gated.bind(directory, i, done) for i in range(int(gates))])
"""


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        """The object on the last line."""
        lines = self.stdout.strip().splitlines()
        assert lines, f"nothing on stdout; stderr: {self.stderr}"
        value = json.loads(lines[-1])
        assert isinstance(value, dict)
        return value

    @property
    def text(self) -> str:
        return self.stdout + self.stderr

    @property
    def values(self) -> tuple[Any, int, int]:
        """Return output, lost and rejoined ranks of a run that has succeeded."""
        assert self.code == 0, self.text
        report = self.json
        assert report["status"] == "SUCCESSFUL"
        return report["output"], report["ranks"]["lost"], report["ranks"]["rejoined"]


class Process:
    """A command that runs; its output goes to files, so that no pipe can fill up or be kept open by a grandchild."""

    def __init__(self, command: list[str], environment: dict[str, str], directory: Path) -> None:
        base = directory / f"command-{uuid.uuid4().hex[:8]}"
        self._out, self._err = base.with_suffix(".out"), base.with_suffix(".err")
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.popen = subprocess.Popen(
                command,
                env=environment,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def wait(self, limit: float = LIMIT) -> Result:
        """Return how it ended; AssertionError with its output if it hangs."""
        try:
            code = self.popen.wait(limit)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.popen.args!r} hangs\n{self._read().text}") from None
        return self._read(code)

    @property
    def stderr(self) -> str:
        """What it has said so far."""
        return self._err.read_text(errors="replace")

    def _read(self, code: int = 0) -> Result:
        return Result(code, self._out.read_text(errors="replace"), self._err.read_text(errors="replace"))


class Namespace:
    """A private mount namespace with tmpfs at a path, as a disk or a /dev/shm that can be full."""

    def __init__(self, path: Path, size: str) -> None:
        script = 'mount -t tmpfs -o size="$2" none "$1" && echo ready && exec sleep 600'
        self._holder = subprocess.Popen(
            ["unshare", "-m", "sh", "-c", script, "sh", str(path), size], stdout=subprocess.PIPE, text=True
        )
        self._path = str(path)
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "ready\n"
        self.prefix = ["nsenter", "-m", "-t", str(self._holder.pid)]

    def resize(self, size: str) -> None:
        subprocess.run([*self.prefix, "mount", "-o", f"remount,size={size}", self._path], check=True, timeout=10)

    def read_only(self) -> None:
        subprocess.run([*self.prefix, "mount", "-o", "remount,ro", self._path], check=True, timeout=10)

    def listing(self) -> list[str]:
        done = subprocess.run([*self.prefix, "ls", self._path], check=True, timeout=10, capture_output=True, text=True)
        return done.stdout.split()

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait()
        assert self._holder.stdout is not None
        self._holder.stdout.close()


class Cli:
    """The command line with a storage of its own. Whatever it starts, to the last grandchild, carries its mark."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.storage = directory / "storage"
        self.mark = f"EXOFLOW_TEST_MARK={uuid.uuid4().hex}"
        name, value = self.mark.split("=")
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("HOPLITE_", "EXOFLOW_", "PMI", "MPI", "HYDRA"))
        }
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        # the environment's own mpiexec, and not that of the machine, belongs to its mpi4py
        programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        self.environment = {**kept, name: value, "PYTHONPATH": path, "PATH": programs}
        #: put before each command, to run it in a `Namespace`
        self.prefix: list[str] = []

    def file(self, body: str, name: str = "flow.py") -> str:
        """Write a workflow file: the shared functions and *body*."""
        path = self.directory / name
        path.write_text(PREAMBLE + body)
        return str(path)

    def gated(self, steps: int, gates: int) -> list[str]:
        """Return arguments that run *steps* committed tasks, then *gates* that wait for `open_gate`, then their sum."""
        inputs = [f"directory={self.directory}", f"steps={steps}", f"gates={gates}"]
        return [self.file(GATED_WORKFLOW, "gated.py"), *(word for text in inputs for word in ("--input", text))]

    def start(self, *args: str, launcher: tuple[str, ...] = (), **environment: str) -> Process:
        command = [*self.prefix, *launcher, sys.executable, "-m", "exoflow_hpc", *args, "--storage", str(self.storage)]
        return Process(command, {**self.environment, **environment}, self.directory)

    def program(self, script: str, launcher: tuple[str, ...] = ()) -> Result:
        """Run a Python program in the directory; its workflows are in the storage as well."""
        environment = {**self.environment, "EXOFLOW_STORAGE": str(self.storage)}
        return Process([*launcher, sys.executable, script], environment, self.directory).wait()

    def __call__(self, *args: str, launcher: tuple[str, ...] = (), **environment: str) -> Result:
        return self.start(*args, launcher=launcher, **environment).wait()

    # --- what the tasks of PREAMBLE left ---

    @property
    def log(self) -> list[list[str]]:
        path = self.directory / "log"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def times(self, kind: str) -> Counter[str]:
        """Return how often each task of that kind has run."""
        return Counter(words[1] for words in self.log if words[0] == kind)

    def open_gate(self) -> None:
        (self.directory / "gate").touch()

    # --- what the journal says ---

    def commits(self, workflow_id: str) -> dict[str, list[tuple[int, dict[str, Any]]]]:
        """Return task → (epoch, record) of each time that it was committed."""
        found: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        for path in sorted((self.storage / "workflows" / workflow_id / "journal").iterdir()):
            for record in scan(int(path.name), path.read_bytes()).records:
                if record["type"] == "task_committed":
                    found.setdefault(record["task_id"], []).append((int(path.name), record))
        return found

    def check_committed_ran_once(self, workflow_id: str) -> None:
        """Assert that each task was committed once, and that no `block` was started after it was committed."""
        commits = self.commits(workflow_id)
        assert {task: len(each) for task, each in commits.items()} == dict.fromkeys(commits, 1)
        for _, task, epoch, attempt, _ in (words for words in self.log if words[0] == "block"):
            when, record = commits[task][0]
            assert (int(epoch), int(attempt)) <= (when, record["attempt"]), f"{task} ran after its commit"

    def damage(self, workflow_id: str, task: str, value: int) -> str:
        """Flip a byte of the checkpoint of a task that returned an array full of *value*; return the file's name."""
        name = self.commits(workflow_id)[task][-1][1]["location"]["file"]
        path = self.storage / "workflows" / workflow_id / "checkpoints" / name
        data = bytearray(path.read_bytes())
        where = data.index(np.full(100, value).tobytes())
        data[where + 1] ^= 1
        path.write_bytes(data)
        return str(name)

    # --- processes and mounts ---

    @staticmethod
    def wait_until(condition: Callable[[], Any], what: str, limit: float = LIMIT) -> Any:
        """Return the first true value of *condition*; AssertionError that names *what* after *limit* seconds."""
        deadline = time.monotonic() + limit
        while not (value := condition()):
            assert time.monotonic() < deadline, f"waited {limit:g} s in vain: {what}"
            time.sleep(0.01)
        return value

    @contextlib.contextmanager
    def mounted(self, path: Path, size: str) -> Iterator[Namespace]:
        """Let all commands see a tmpfs of *size* at *path*."""
        namespace = Namespace(path, size)
        self.prefix = namespace.prefix
        try:
            yield namespace
        finally:
            self.kill_all()
            namespace.close()

    def processes(self) -> list[int]:
        """Return the pids of all live processes that this object has started, directly or not."""
        found = []
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if entry.isdigit() and self.mark.encode() in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                    found.append(int(entry))
        return found

    def kill_all(self) -> int:
        """Kill everything at once, and return how many that were: stopped first, so that none sees another one die."""
        stopped: set[int] = set()
        while new := set(self.processes()) - stopped:
            for pid in new:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
            stopped |= new
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait_until(lambda: not self.processes(), "killed processes are gone")
        return len(stopped)

    @staticmethod
    def rank_of(pid: int) -> tuple[int, int]:
        """Return (rank, pid of the rank's process) for a worker: its ancestor that runs `exoflow_hpc.rank`."""
        while pid > 1:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if command[1:3] == [b"-m", b"exoflow_hpc.rank"]:
                environ = Path(f"/proc/{pid}/environ").read_bytes()
                found = re.search(rb"(?:^|\0)HOPLITE_RANK=(\d+)", environ)
                assert found is not None
                return int(found[1]), pid
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        raise AssertionError(f"process {pid} belongs to no rank")


@pytest.fixture(scope="session")
def new_cli() -> Callable[[Path], AbstractContextManager[Cli]]:
    """Return what makes a `Cli` in a directory."""
    return _new_cli


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    """Return a `Cli`; afterwards nothing that it started may be alive."""
    with _new_cli(tmp_path) as cli:
        yield cli


@contextlib.contextmanager
def _new_cli(directory: Path) -> Iterator[Cli]:
    cli = Cli(directory)
    try:
        yield cli
    except BaseException:
        cli.kill_all()  # the failure itself is the message
        raise
    deadline = time.monotonic() + 10  # workers may need a moment to see that their rank has ended
    while (left := cli.processes()) and time.monotonic() < deadline:
        time.sleep(0.05)
    names = [_command_line(pid) for pid in left]
    cli.kill_all()
    assert not left, f"still alive after the test: {names}"


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return f"{pid} (gone)"
