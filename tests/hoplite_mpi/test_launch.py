from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hoplite_mpi import launch
from hoplite_mpi.launch import LaunchError, LocalRanks, processes_of_run

_SLEEP = ["-c", "import signal; print('up', flush=True); signal.pause()"]
_RANK = "import os; r = int(os.environ['HOPLITE_RANK'])\n"


def _eventually(condition: Callable[[], object], seconds: float = 15) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def _output(ranks: LocalRanks, rank: int) -> str:
    return ranks.output_file(rank).read_text() if ranks.output_file(rank).exists() else ""


def test_exit_codes_and_signals_are_told_apart(tmp_path: Path) -> None:
    ends = ["os._exit(9)", "os.kill(os.getpid(), 9)", "os.kill(os.getpid(), 11)", "pass"]
    with LocalRanks(4, ["-c", _RANK + f"exec({ends!r}[r])"], output=tmp_path) as ranks:
        assert ranks.wait(30) == {0: 9, 1: -9, 2: -11, 3: 0}


def test_environment_and_rendezvous(tmp_path: Path) -> None:
    code = "import json, os; print(json.dumps(dict(os.environ)))"
    with LocalRanks(1, ["-c", code], env={"A": "1"}, rank_env={0: {"B": "2"}}, output=tmp_path) as ranks:
        ranks.wait(30)
        seen = json.loads(ranks.output_file(0).read_text())
        assert (seen["A"], seen["B"], seen["HOPLITE_SIZE"], seen["HOPLITE_RUN"]) == ("1", "2", "1", ranks.run)
        assert stat.S_IMODE(ranks.rendezvous.stat().st_mode) == 0o700
        secret = Path(seen["HOPLITE_RENDEZVOUS"]) / "secret"
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
        assert len(secret.read_bytes()) == 32
    assert not ranks.rendezvous.exists()


def test_stdout_can_be_turned_aside(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out, LocalRanks(1, ["-c", "print('here')"], stdout=out.fileno()) as ranks:
        assert ranks.wait(30) == {0: 0}
    assert (tmp_path / "out").read_text() == "here\n"


def test_an_enclosing_launcher_is_not_inherited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_RANK", "7")
    monkeypatch.setenv("PMI_FD", "99")
    code = "from mpi4py import MPI; print(MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size)"
    with LocalRanks(1, ["-c", code], output=tmp_path) as ranks:
        assert ranks.wait(30) == {0: 0}, ranks.output_file(0).read_text()
        assert ranks.output_file(0).read_text() == "0 1\n"


def test_a_killed_rank_disturbs_no_other_and_comes_back(tmp_path: Path) -> None:
    with LocalRanks(2, _SLEEP, output=tmp_path) as ranks:
        with pytest.raises(RuntimeError, match="still runs"):
            ranks.respawn(1)
        assert _eventually(lambda: _output(ranks, 1) == "up\n")
        assert ranks.kill(1)
        assert _eventually(lambda: ranks.poll() == {0: None, 1: -9})
        assert not ranks.kill(1)
        assert ranks.respawn(1) == 1
        assert _eventually(lambda: _output(ranks, 1) == "up\nup\n")
        assert ranks.poll() == {0: None, 1: None}
        with pytest.raises(TimeoutError, match=r"\[0, 1\]"):
            ranks.wait(0.05)
    assert processes_of_run(ranks.run) == []


@pytest.mark.parametrize(("number", "ignores_sigterm"), [(signal.SIGTERM, False), (signal.SIGKILL, True)])
def test_the_end_of_mpiexec_is_the_end_of_its_rank(number: int, ignores_sigterm: bool, tmp_path: Path) -> None:
    ignore = "import signal; signal.signal(15, signal.SIG_IGN);" if ignores_sigterm else ""
    with LocalRanks(1, ["-c", ignore + _SLEEP[1]], output=tmp_path) as ranks:
        assert _eventually(lambda: _output(ranks, 0) == "up\n")
        ranks._processes[0].send_signal(number)
        assert _eventually(lambda: ranks.poll()[0] is not None)
        assert _eventually(lambda: not processes_of_run(ranks.run))


@pytest.mark.parametrize("stopped", [False, True])
def test_a_killed_launcher_takes_its_ranks_with_it_and_is_swept(stopped: bool, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom hoplite_mpi.launch import LocalRanks\n"
        f"with LocalRanks(2, {_SLEEP!r}, output=Path({str(tmp_path)!r})) as ranks:\n"
        "    print(ranks.run, ranks.rendezvous, flush=True)\n    ranks.wait()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        run, rendezvous = launcher.stdout.readline().split()
        outputs = [tmp_path / f"rank.{rank}.out" for rank in (0, 1)]
        assert _eventually(lambda: all(file.exists() and file.read_text() for file in outputs))
        if stopped:
            os.kill(int(Path(rendezvous, "pid.1.0").read_text()), signal.SIGSTOP)
        launcher.kill()
    assert _eventually(lambda: not processes_of_run(run))
    assert os.path.exists(rendezvous)
    with LocalRanks(1, ["-c", ""]) as ranks:
        assert not os.path.exists(rendezvous)
        assert ranks.rendezvous.exists()
        launch._sweep(ranks.rendezvous.parent)
        assert ranks.rendezvous.exists()  # that of a live launcher stays


def test_terminate_ends_children_that_left_the_session(tmp_path: Path) -> None:
    code = "import os, signal\nif not os.fork():\n    os.setsid()\n    print('child', flush=True)\nsignal.pause()"
    with LocalRanks(1, ["-c", code], output=tmp_path) as ranks:
        assert _eventually(lambda: "child" in _output(ranks, 0))
        assert len(processes_of_run(ranks.run)) > 3
    assert processes_of_run(ranks.run) == []
    with pytest.raises(RuntimeError, match="terminated"):
        ranks.respawn(0)


def test_a_program_that_cannot_run_is_an_exit_code(tmp_path: Path) -> None:
    with LocalRanks(1, ["-c", "import no_such_module"], output=tmp_path) as ranks:
        assert ranks.wait(30) == {0: 1}
        assert "no_such_module" in ranks.output_file(0).read_text()


def test_no_mpiexec_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="install an MPI"):
        launch.find_mpiexec()


def test_the_mpiexec_beside_python_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("beside", "path"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "mpiexec").write_text("#!/bin/sh\n")
        (tmp_path / place / "mpiexec").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "beside" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert launch.find_mpiexec() == str(tmp_path / "beside" / "mpiexec")
    (tmp_path / "beside" / "mpiexec").unlink()
    assert launch.find_mpiexec() == str(tmp_path / "path" / "mpiexec")


def test_no_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one rank"):
        LocalRanks(0, [])


def test_launching_calls_no_mpi() -> None:
    code = "import sys, hoplite_mpi.launch; print('mpi4py.MPI' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
