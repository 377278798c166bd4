"""The whole suite: 1, 2 and 4 live ranks under mpiexec, then everything else, then a look for what was left."""

from __future__ import annotations

import argparse
import os
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from leaks import MARK, find_leaks, kill_marked, snapshot

from hoplite_mpi.launch import find_mpiexec

ROOT = Path(__file__).parent.parent
#: seconds for the runs under mpiexec, each, and for the rest; far more than they take on two cores with nothing else to do
MPI_DEADLINE = 300
DEADLINE = 2300


def main() -> int:
    """Return 0 if every part passed and nothing was left on the machine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", default=str(secrets.randbelow(10**6)), help="of the random order, to repeat a run")
    parser.add_argument("paths", nargs="*", default=["tests"])
    options = parser.parse_args()
    before, mark = snapshot(), secrets.token_hex(8)
    os.environ[MARK] = mark
    common = ["-p", "no:randomly", f"--random-order-seed={options.seed}", *options.paths]
    print(
        f"random-order seed {options.seed}: repeat with '{sys.executable} tests/run.py --seed {options.seed}'",
        flush=True,
    )
    failed = []
    for n in (1, 2, 4):
        print(f"\n== {n} live rank{'s' if n > 1 else ''} under mpiexec", flush=True)
        if not run_mpi([*mpiexec(), "-n", str(n), sys.executable], common, mark):
            failed.append(f"the tests on {n} live ranks")
    print("\n== everything else", flush=True)
    command = [sys.executable, "-m", "pytest", "-m", "not mpi", *common]
    if run(command, DEADLINE, mark) != 0:
        failed.append("the tests that start their own processes, or none")
    leaks = find_leaks(before, mark)
    kill_marked(mark)
    if leaks:
        failed.append("the look for what was left:\n  " + "\n  ".join(leaks))
    for what in failed:
        print(f"FAILED {what}", file=sys.stderr)
    return 1 if failed else 0


def run(command: list[str], deadline: float, mark: str) -> int:
    """Run a command and return its exit code; 124 if it was killed, with all its children, after *deadline* seconds."""
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL)
    try:
        return process.wait(timeout=deadline)
    except subprocess.TimeoutExpired:
        print(f"\nkilled after {deadline} s: {' '.join(command)}", file=sys.stderr, flush=True)
        return 124
    finally:
        if process.poll() is None:  # at the deadline, or ^C
            kill_marked(mark)
            process.wait()


def run_mpi(python: list[str], common: list[str], mark: str) -> bool:
    """Run the tests marked ``mpi`` by that launcher and Python; pytest's "nothing collected" (exit code 5) is a failure, too."""
    with tempfile.TemporaryDirectory(prefix="exoflow-tests-") as output:
        rank = [str(ROOT / "tests/mpi_rank.py"), output, "--with-mpi", "-m", "mpi", *common]
        start = time.monotonic()
        code = run([*python, *rank], MPI_DEADLINE, mark)
        if code != 0:
            print(f"exit code {code} after {time.monotonic() - start:.0f} s; what the other ranks printed:", flush=True)
            for file in sorted(Path(output).iterdir()):
                print(f"--- {file.stem}\n{file.read_text(errors='replace')[-4000:]}", flush=True)
        return code == 0


def mpiexec() -> list[str]:
    """Return this environment's launcher."""
    command = find_mpiexec()
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=False).stdout
    return [command] if "HYDRA" in version else open_mpi(Path(command))


def open_mpi(command: Path, *options: str) -> list[str]:
    """Return Open MPI's launcher with what it needs to run more ranks than cores, and as root."""
    if os.geteuid() == 0:
        os.environ.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    return [str(command), *options, "--oversubscribe", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1"]


if __name__ == "__main__":
    sys.exit(main())
