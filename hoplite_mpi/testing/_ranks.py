"""`run_ranks`: run a callable or script on live ranks, kill some of them, and look at what the others have to say."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle

from hoplite_mpi.launch import REPLACE_ME, CommandPrefix, LocalRanks
from hoplite_mpi.testing._rank_main import BEGUN, PAYLOAD, VALUE

__all__ = ["RankResult", "run_ranks"]

_POLL = 0.02
#: characters of each rank's output that a TimeoutError shows
_TAIL = 2000
#: a rank that is killed each time it comes back is a bug, not a test
_MAX_RESPAWNS = 5


@dataclass(frozen=True)
class RankResult:
    """What became of one rank; of its last incarnation, if it was started again."""

    #: what the callable returned; None if it did not return, or was a script
    value: Any
    #: exit code; -N if signal N ended it; 1 after an exception
    exitcode: int
    #: stdout and stderr, of all incarnations in turn
    output: str
    #: number of the last incarnation
    incarnation: int


def run_ranks(
    n: int,
    script_or_callable: str | os.PathLike[str] | Callable[..., Any],
    args: Sequence[Any] = (),
    kill: Sequence[tuple[int, float | str]] = (),
    timeout: float = 60,
    hosts: CommandPrefix | None = None,
    respawn: bool = False,
    env: Mapping[str, str] | None = None,
) -> dict[int, RankResult]:
    """Run a script, or ``callable(*args)``, in *n* ranks, each started alone; wait for all; return rank → result.

    The callable and its arguments are pickled by value (cloudpickle), and so is what it returns. ``HOPLITE_RANK`` and
    ``HOPLITE_SIZE`` in the environment say who it is. Leaving is by ``os._exit``: no atexit handlers, no MPI_Finalize.

    kill: (rank, seconds since all ranks have begun) or (rank, name of a fault point, optionally ``NAME@K``): SIGKILL
    there. respawn: start the next incarnation of a rank that a signal ended, or that left with
    `launch.REPLACE_ME`. env: more environment for all ranks.
    hosts: `EmulatedHosts`; rank r runs on host r modulo their number.

    After *timeout* seconds everything is killed, and TimeoutError shows the end of each rank's output, in which those that
    still ran say what each of their threads was doing. Whatever happens, no process, rendezvous directory or shared
    memory of the run is left.
    """
    for rank, _ in kill:
        if not 0 <= rank < n:
            raise ValueError(f"kill= names rank {rank}, but there are ranks 0 to {n - 1}")
    faults = ";".join(_fault_rule(rank, when) for rank, when in kill if isinstance(when, str))
    timed = sorted((float(when), rank) for rank, when in kill if not isinstance(when, str))
    more = dict(env or {})
    more["HOPLITE_FAULT"] = ";".join(
        filter(None, (more.get("HOPLITE_FAULT", os.environ.get("HOPLITE_FAULT", "")), faults))
    )
    more.setdefault("PYTHONPATH", _python_path())
    deadline = time.monotonic() + timeout
    payload = _payload(script_or_callable, args, deadline)
    ranks = LocalRanks(n, ["-m", "hoplite_mpi.testing._rank_main"], env=more, hosts=hosts)
    try:
        ranks.output = ranks.rendezvous / "output"
        ranks.output.mkdir()
        (ranks.rendezvous / PAYLOAD).write_bytes(payload)
        ranks.start()
        codes = _watch(ranks, timed, deadline, respawn)
        if codes is None:
            raise TimeoutError(_story(ranks, timeout))
        return {rank: _result(ranks, rank, code) for rank, code in codes.items()}
    finally:
        ranks.terminate()
        _remove_shared_memory(ranks.run, n, hosts)


def _fault_rule(rank: int, when: str) -> str:
    name, at, count = when.partition("@")
    return f"{rank}:{name}=kill{at}{count}"


def _python_path() -> str:
    # The ranks' `-m` has to find this package also where it isn't installed and the caller's sys.path leads to it.
    root = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))


def _payload(target: str | os.PathLike[str] | Callable[..., Any], args: Sequence[Any], deadline: float) -> bytes:
    path = [entry or os.getcwd() for entry in sys.path]
    payload: dict[str, Any] = {"path": path, "script": None, "args": list(args), "deadline": deadline}
    if callable(target):
        with _by_value(target):
            payload |= {"call": cloudpickle.dumps((target, tuple(args))), "args": []}
    else:
        payload["script"] = os.path.abspath(target)
        if not os.path.isfile(payload["script"]):
            raise FileNotFoundError(f"no script {payload['script']}")
    return pickle.dumps(payload)


@contextmanager
def _by_value(function: Callable[..., Any]) -> Iterator[None]:
    """Pickle what is in the function's own module by value: a test module need not be importable in the rank."""
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    ours = module is None or module.__name__.partition(".")[0] in ("__main__", "hoplite_mpi", "exoflow_hpc", "builtins")
    if module is None or ours or module.__name__ in cloudpickle.list_registry_pickle_by_value():
        yield
        return
    cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(module)


def _watch(ranks: LocalRanks, timed: list[tuple[float, int]], deadline: float, respawn: bool) -> dict[int, int] | None:
    """Kill and respawn as asked until all ranks have ended; return their exit codes, or None at the deadline."""
    began: float | None = None
    while time.monotonic() < deadline:
        codes = ranks.poll()
        if began is None and all((ranks.rendezvous / BEGUN.format(rank, 0)).exists() for rank in codes):
            began = time.monotonic()
        while began is not None and timed and time.monotonic() >= began + timed[0][0]:
            ranks.kill(timed.pop(0)[1])
        if respawn:
            for rank, code in codes.items():
                if code is not None and (code < 0 or code == REPLACE_ME) and ranks.incarnations[rank] < _MAX_RESPAWNS:
                    ranks.respawn(rank)
                    codes[rank] = None
        ended = {rank: code for rank, code in codes.items() if code is not None}
        if len(ended) == len(codes):
            return ended
        time.sleep(_POLL)
    return None


def _result(ranks: LocalRanks, rank: int, code: int) -> RankResult:
    incarnation = ranks.incarnations[rank]
    output = ranks.output_file(rank).read_text(errors="replace")
    value_file = ranks.rendezvous / VALUE.format(rank, incarnation)
    value = pickle.loads(value_file.read_bytes()) if value_file.exists() else None
    return RankResult(value, code, output, incarnation)


def _story(ranks: LocalRanks, timeout: float) -> str:
    lines = [f"ranks still run after {timeout} s; all were killed"]
    for rank, code in ranks.poll().items():
        state = "still ran" if code is None else f"exit code {code}"
        output = ranks.output_file(rank).read_text(errors="replace")
        lines.append(f"--- rank {rank}, incarnation {ranks.incarnations[rank]}: {state}\n{output[-_TAIL:]}")
    return "\n".join(lines)


def _remove_shared_memory(run: str, n: int, hosts: CommandPrefix | None) -> None:
    """Remove the arenas of the run, which nobody maps any more, from every node, and MPICH's leavings on this one."""
    if hosts is None:
        for path in Path("/dev/shm").glob(f"hoplite-{os.getuid()}-{run}*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        _remove_unused_segments()
        return
    for prefix in {tuple(hosts.command_prefix(rank)) for rank in range(n)}:
        remove = f"rm -rf /dev/shm/hoplite-{os.getuid()}-{run}*"
        subprocess.run([*prefix, "sh", "-c", remove], check=False, timeout=10, start_new_session=True)


def _remove_unused_segments() -> None:
    """Remove MPICH's segments (a killed process leaves its one) that are our own and that no process uses."""
    segments = {str(path) for path in Path("/dev/shm").glob("mpich_shm_*") if _is_own(path)}
    for process in Path("/proc").iterdir() if segments else ():
        if process.name.isdigit() and _is_own(process):
            # A process that does not let us look (the init of a container) runs no MPI of ours. In this order: whoever
            # has a segment open and not yet mapped is seen by one of the two.
            segments -= set(_open_files(process)) | set(_mapped_files(process))
    for segment in segments:
        Path(segment).unlink(missing_ok=True)


def _is_own(path: Path) -> bool:
    try:
        return path.stat().st_uid == os.getuid()
    except FileNotFoundError:
        return False


def _open_files(process: Path) -> Iterator[str]:
    try:
        numbers = os.listdir(process / "fd")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return
    for number in numbers:
        try:
            yield os.readlink(process / "fd" / number)
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # closed meanwhile
            continue


def _mapped_files(process: Path) -> Iterator[str]:
    try:
        for line in (process / "maps").read_text().splitlines():
            yield line.split(maxsplit=5)[-1]
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return
