"""Starts the ranks of a run on this machine one by one, so that each of them can die alone. Calls no MPI itself.

A rank is four processes::

    launcher ─ mpiexec -n 1 ─ proxy of mpiexec ─ watcher ─ the program itself

Each is tied to its parent by the kernel (PR_SET_PDEATHSIG) or by its connection to it, so a launcher that is killed
takes its ranks with it, stopped ones too. The *watcher* is there because mpiexec reports "killed by signal 9" and "exit
code 9" alike; it also writes down the program's process id before the program runs.
"""

from __future__ import annotations

import fcntl
import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

__all__ = [
    "REPLACE_ME",
    "CommandPrefix",
    "LaunchError",
    "LocalRanks",
    "find_mpiexec",
    "kill_run",
    "processes_of_run",
    "spawn_tied",
]

#: exit code of a rank that can't go on, though a replacement could
REPLACE_ME = 70

#: marks a rendezvous directory as that of a live launcher: it holds a lock on this file, which no child inherits
_LOCK = "launcher.lock"
_DIR_PREFIX = "hoplite-run-"
#: how often `wait` looks; only the local kernel is asked
_POLL = 0.02

_TIE = "import ctypes,os,signal,sys\nctypes.CDLL(None).prctl(1,9)\n"  # 1: PR_SET_PDEATHSIG
# The parent may have died before prctl; then nobody would send the signal any more, so look.
_TIED = _TIE + "p=int(sys.argv[1])\nif os.getppid()!=p: os._exit(137)\nos.execvp(sys.argv[2],sys.argv[2:])\n"
# The signals of a terminal reach the program as well; what to do with them is its business, and the watcher waits for
# it.
_WATCHER = (
    _TIE
    + """
me=os.getpid()
if os.getppid()==1: os._exit(137)
pid=os.fork()
if not pid:
    ctypes.CDLL(None).prctl(1,9)
    if os.getppid()!=me: os._exit(137)
    with open(sys.argv[1]+'.tmp','w') as f: f.write(str(os.getpid()))
    os.rename(sys.argv[1]+'.tmp',sys.argv[1])
    try: os.execvp(sys.argv[2],sys.argv[2:])
    except OSError as e: os.write(2,f'cannot run {sys.argv[2]}: {e}\\n'.encode()); os._exit(127)
def forward(number,frame):
    try: os.kill(pid,number)
    except ProcessLookupError: pass
for s in (signal.SIGTERM,signal.SIGUSR1,signal.SIGUSR2,signal.SIGHUP): signal.signal(s,forward)
signal.signal(signal.SIGINT,signal.SIG_IGN)
code=os.waitstatus_to_exitcode(os.waitpid(pid,0)[1])
os._exit(code if code>=0 else 128-code)
"""
)
# What an enclosing launcher put into the environment would make a new mpiexec's process believe that it is that one.
_FOREIGN = ("PMI_", "PMIX_", "HYDI_", "MPI_LOCAL")
_FOREIGN_OPEN_MPI = ("OMPI_", "PRTE_")


class LaunchError(RuntimeError):
    """Ranks can't be started on this machine; the message says what is missing."""


class CommandPrefix(Protocol):
    """Hosts to start ranks on."""

    def command_prefix(self, rank: int) -> list[str]:
        """Return what to put before a command so that it runs on the host of *rank*."""
        ...


@functools.cache
def _spawner() -> ThreadPoolExecutor:
    # PR_SET_PDEATHSIG fires when the *thread* that forked ends, so all forks come from one that lives as long as the
    # process.
    return ThreadPoolExecutor(1, thread_name_prefix="hoplite-spawner")


def spawn_tied(command: Sequence[str], prefix: Sequence[str] = (), **popen: Any) -> subprocess.Popen[bytes]:
    """Start *command* as the leader of a new session that is killed (SIGKILL) when this process ends, however it ends.

    *prefix* may enter a host first, and has to exec rather than fork. Keyword arguments go to `subprocess.Popen`.
    """
    tied = [*prefix, sys.executable, "-I", "-S", "-c", _TIED, str(os.getpid()), *command]

    def fork() -> subprocess.Popen[bytes]:
        return subprocess.Popen(tied, start_new_session=True, **popen)

    return _spawner().submit(fork).result()


def find_mpiexec() -> str:
    """Return the path of mpiexec: the one beside this Python first, then the one in PATH; else LaunchError."""
    beside = Path(sys.executable).parent / "mpiexec"
    if os.access(beside, os.X_OK):
        return str(beside)
    found = shutil.which("mpiexec")
    if found is None:
        raise LaunchError(
            f"no mpiexec beside {sys.executable} nor in PATH: "
            "install an MPI, for example with 'pip install exoflow-hpc[mpich]'"
        )
    return found


@functools.cache
def mpiexec_command(mpiexec: str) -> tuple[str, ...]:
    """Return mpiexec with the arguments for one process on this machine."""
    answer = subprocess.run(
        [mpiexec, "--version"], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
    )
    text = answer.stdout + answer.stderr
    if "Open MPI" in text or "prte" in text.lower():
        return (mpiexec, "--oversubscribe", "--bind-to", "none", "-n", "1")
    if "HYDRA" in text:
        # Inside a Slurm allocation hydra would otherwise start the process with srun, on a node of Slurm's choice.
        return (mpiexec, "-launcher", "fork", "-localhost", "127.0.0.1", "-n", "1")
    return (mpiexec, "-n", "1")


def processes_of_run(run: str) -> list[int]:
    """Return the ids of all live processes of this user that have ``HOPLITE_RUN=run`` in their environment.

    A process in a session of its own, or whose parents are gone, is found as well.
    """
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and _is_of_run(int(name), run)]


def _is_of_run(pid: int, run: str) -> bool:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")  # empty for a zombie
    except OSError:  # gone, or another user's
        return False
    return f"HOPLITE_RUN={run}".encode() in variables


def kill_run(run: str, timeout: float = 10.0) -> None:
    """Kill (SIGKILL) every process of the run but this one, also those started meanwhile; return when all are gone.

    TimeoutError after *timeout* seconds, which happens when one hangs in the kernel (a dead network file system).
    """
    deadline = time.monotonic() + timeout
    while left := [pid for pid in processes_of_run(run) if pid != os.getpid()]:
        for pid in left:
            _kill_if(pid, run, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {left} of run {run} did not end within {timeout} s of SIGKILL")
        time.sleep(_POLL)


def _kill_if(pid: int, run: str, number: int) -> bool:
    """Send a signal to *pid* if it still is a process of the run: process ids are used again."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        if not _is_of_run(pid, run):
            return False
        signal.pidfd_send_signal(handle, number)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)


def _sweep(parent: Path) -> None:
    """Remove the rendezvous directories that launchers which were killed left in *parent*."""
    for directory in parent.glob(f"{_DIR_PREFIX}*"):
        try:
            if directory.stat().st_uid != os.getuid():
                continue
            with open(directory / _LOCK) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory, ignore_errors=True)
        except OSError:  # in use, just being made, or just removed by another launcher
            continue


class LocalRanks:
    """The ranks of one run, each under an ``mpiexec -n 1`` of its own. A context manager: leaving it ends them all.

    size: number of ranks; argv: arguments of this Python interpreter, the same for every rank; env: more environment,
    for every rank, or by `rank_env` for one of them; output: directory for one file per rank (default: the launcher's
    own stdout and stderr); stdout: file descriptor for what ranks and mpiexec print there (default: the launcher's own
    stdout; of no effect with *output*); hosts: where each rank runs (default: here).

    Environment of a rank: ``HOPLITE_RENDEZVOUS`` (mode 0700, on this machine), ``HOPLITE_RUN``, ``HOPLITE_RANK``,
    ``HOPLITE_SIZE``, ``HOPLITE_INCARNATION``. LaunchError if there is no mpiexec.
    """

    def __init__(
        self,
        size: int,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        rank_env: Mapping[int, Mapping[str, str]] | None = None,
        output: Path | None = None,
        stdout: int | None = None,
        hosts: CommandPrefix | None = None,
        cwd: str | os.PathLike[str] | None = None,
    ) -> None:
        if size < 1:
            raise ValueError(f"a run has at least one rank, not {size}")
        self.size = size
        self.run = secrets.token_hex(8)
        self.output = output
        self._stdout = stdout
        self._argv = list(argv)
        self._env = dict(env or {})
        self._rank_env = {rank: dict(more) for rank, more in (rank_env or {}).items()}
        self._hosts = hosts
        self._cwd = cwd
        self._mpiexec = mpiexec_command(find_mpiexec())
        #: incarnation that was started last
        self.incarnations: dict[int, int] = {}
        #: mpiexec of the last incarnation; its exit is the rank's
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        parent = Path(tempfile.gettempdir())
        _sweep(parent)
        self.rendezvous = Path(tempfile.mkdtemp(prefix=f"{_DIR_PREFIX}{self.run}-", dir=parent))  # mkdtemp: mode 0700
        try:
            self._lock = open(self.rendezvous / _LOCK, "w")  # noqa: SIM115  (held until terminate)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            secret = os.open(self.rendezvous / "secret", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(secret, "wb") as file:
                file.write(secrets.token_bytes(32))
        except BaseException:
            shutil.rmtree(self.rendezvous, ignore_errors=True)
            raise

    def start(self) -> None:
        """Start every rank that has not been started; if one of them can't be started, none is left."""
        try:
            for rank in range(self.size):
                if rank not in self._processes:
                    self._start(rank, 0)
        except BaseException:
            self.terminate()
            raise

    def respawn(self, rank: int) -> int:
        """Start the next incarnation of a rank that has ended, and return its number; RuntimeError if it still runs."""
        if self._processes[rank].poll() is None:
            raise RuntimeError(f"rank {rank}, incarnation {self.incarnations[rank]}, still runs: kill it first")
        self._start(rank, self.incarnations[rank] + 1)
        return self.incarnations[rank]

    def _start(self, rank: int, incarnation: int) -> None:
        if not self.rendezvous.is_dir():
            raise RuntimeError(f"run {self.run} has been terminated: make a new LocalRanks")
        environment = self._environment(rank, incarnation)
        pid_file = self._pid_file(rank, incarnation)
        python = [sys.executable, "-I", "-S", "-c", _WATCHER, str(pid_file), sys.executable, *self._argv]
        prefix = self._hosts.command_prefix(rank) if self._hosts is not None else []
        target = open(self.output_file(rank), "ab") if self.output is not None else None  # noqa: SIM115
        try:
            self._processes[rank] = spawn_tied(
                [*self._mpiexec, *python],
                prefix,
                env=environment,
                cwd=self._cwd,
                stdin=subprocess.DEVNULL,
                stdout=target or self._stdout,
                stderr=subprocess.STDOUT if target else None,
            )
        finally:
            if target:
                target.close()
        self.incarnations[rank] = incarnation

    def _environment(self, rank: int, incarnation: int) -> dict[str, str]:
        foreign = _FOREIGN + (_FOREIGN_OPEN_MPI if "OMPI_COMM_WORLD_RANK" in os.environ else ())
        environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        if "--oversubscribe" in self._mpiexec and os.getuid() == 0:
            environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        return {
            **environment,
            **self._env,
            **self._rank_env.get(rank, {}),
            "HOPLITE_RENDEZVOUS": str(self.rendezvous),
            "HOPLITE_RUN": self.run,
            "HOPLITE_RANK": str(rank),
            "HOPLITE_SIZE": str(self.size),
            "HOPLITE_INCARNATION": str(incarnation),
        }

    def _pid_file(self, rank: int, incarnation: int) -> Path:
        return self.rendezvous / f"pid.{rank}.{incarnation}"

    def output_file(self, rank: int) -> Path:
        """Return the file that takes stdout and stderr of a rank, all its incarnations in turn; needs `output`."""
        if self.output is None:
            raise ValueError("the output of these ranks isn't kept: give LocalRanks a directory as output=")
        return self.output / f"rank.{rank}.out"

    def poll(self) -> dict[int, int | None]:
        """Return rank → exit code of its last incarnation, None if it runs, -N if signal N ended it."""
        return {rank: _exit_code(process.poll()) for rank, process in self._processes.items()}

    def wait(self, timeout: float | None = None) -> dict[int, int]:
        """Wait until every rank has ended; return rank → exit code as `poll` does; TimeoutError after *timeout* s."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            codes = {rank: code for rank, code in self.poll().items() if code is not None}
            if len(codes) == len(self._processes):
                return codes
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"ranks {sorted(self._processes.keys() - codes.keys())} still run after {timeout} s")
            time.sleep(_POLL)

    def pid(self, rank: int) -> int | None:
        """Return the process id of the program of a rank, or None before it has one."""
        try:
            return int(self._pid_file(rank, self.incarnations[rank]).read_text())
        except FileNotFoundError:
            return None

    def kill(self, rank: int, number: int = signal.SIGKILL) -> bool:
        """Signal the program of a rank (not its mpiexec), as soon as it has begun; return False if it has ended."""
        while (pid := self.pid(rank)) is None:
            if self._processes[rank].poll() is not None:
                return False
            time.sleep(_POLL)
        return self._processes[rank].poll() is None and _kill_if(pid, self.run, number)

    def terminate(self) -> None:
        """End every process of the run, whatever it does, and remove the rendezvous directory. May be called twice."""
        try:
            kill_run(self.run)
            for process in self._processes.values():
                process.wait(timeout=10)
        finally:
            shutil.rmtree(self.rendezvous, ignore_errors=True)
            self._lock.close()

    def __enter__(self) -> LocalRanks:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.terminate()


def _exit_code(code: int | None) -> int | None:
    """Return the code in `subprocess`'s convention: the watcher and Open MPI say 128 + N for signal N."""
    return 128 - code if code is not None and 128 < code <= 192 else code
