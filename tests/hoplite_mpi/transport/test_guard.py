from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hoplite_mpi.launch import find_mpiexec
from hoplite_mpi.testing import run_ranks
from hoplite_mpi.transport import guard


def _send_to_the_dead(directory: str) -> Any:
    """Rank 0: join rank 1, kill it, and send to it; → how many sends it outlived."""
    import time

    os.environ["UCX_TLS"] = "tcp,self"
    guard.load()
    from mpi4py import MPI

    port_file = Path(directory, "port")
    if os.environ["HOPLITE_RANK"] == "1":
        end = time.monotonic() + 30
        while not port_file.exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        peer = MPI.COMM_SELF.Connect(port_file.read_text())
        peer.send(os.getpid(), dest=0)
        peer.recv(source=0)
        signal.pause()
    port = MPI.Open_port()
    port_file.with_suffix(".tmp").write_text(port)
    port_file.with_suffix(".tmp").rename(port_file)
    peer = MPI.COMM_SELF.Accept(port)
    pid = peer.recv(source=0)
    peer.send("go", dest=0)
    os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it may be gone between two looks
        while Path(f"/proc/{pid}/maps").read_bytes():
            time.sleep(0.01)
    sent = []
    # without the guard as long as it takes to crash: on a busy machine UCX is slow to notice
    for size in (8, 1 << 20) * (5 if os.environ.get("HOPLITE_GUARD") != "0" else 100):
        request = peer.Isend(bytearray(size), dest=0)
        end = time.monotonic() + 0.1
        while time.monotonic() < end:
            request.Test()  # lets UCX notice
        sent.append(request)
    return len(sent)


@pytest.fixture
def built() -> None:
    if not guard.load().loaded:
        pytest.skip(f"the guard is not there: {guard.load().why}")


@pytest.mark.usefixtures("built")
def test_sends_to_a_killed_peer_are_outlived(tmp_path: Path) -> None:
    result = run_ranks(2, _send_to_the_dead, args=(str(tmp_path),))
    assert result[1].exitcode == -signal.SIGKILL
    assert (result[0].exitcode, result[0].value) == (0, 10), result[0].output


def test_without_the_guard_they_crash(tmp_path: Path) -> None:
    """The control: when this fails, MPICH has mended it, and the guard can go."""
    if "HYDRA" not in subprocess.run([find_mpiexec(), "--version"], capture_output=True, text=True, check=True).stdout:
        pytest.skip("only MPICH crashes")
    result = run_ranks(2, _send_to_the_dead, args=(str(tmp_path),), env={"HOPLITE_GUARD": "0"})
    assert result[0].exitcode == -signal.SIGSEGV, result[0].output


def _in_a_new_process(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.strip()


_STATE = "from hoplite_mpi.transport.guard import load; s = load(); print(s is load(), s.loaded, s.why)"


@pytest.mark.usefixtures("built")
def test_load_is_idempotent_and_needs_no_mpi() -> None:
    assert _in_a_new_process(_STATE) == "True True"
    assert _in_a_new_process("import sys, hoplite_mpi.transport.guard; print('mpi4py.MPI' in sys.modules)") == "False"


def test_it_can_be_switched_off() -> None:
    assert _in_a_new_process(_STATE, HOPLITE_GUARD="0") == "True False switched off by HOPLITE_GUARD=0"


def test_a_library_that_is_missing_or_broken_is_said_and_not_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOPLITE_GUARD", raising=False)
    broken = tmp_path / "broken.so"
    broken.write_text("not a library")
    for library, why in ((None, "no C compiler"), (broken, "could not be loaded")):
        monkeypatch.setattr(guard, "_library", lambda library=library: library)
        state = guard.load.__wrapped__()
        assert not state.loaded
        assert why in state.why


def test_ucx_is_kept_off_shared_memory_unless_the_user_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)  # another test may have begun MPI in this process
    monkeypatch.delenv("UCX_TLS", raising=False)
    guard.prepare_environment()
    assert os.environ["UCX_TLS"] == guard._transports()
    monkeypatch.setenv("UCX_TLS", "tcp,self")
    guard.prepare_environment()
    assert os.environ["UCX_TLS"] == "tcp,self"


@pytest.mark.mpi
def test_messages_pass_through_the_guard_unharmed() -> None:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    for size in (8, 1 << 20):
        received = bytearray(size)
        sent = bytes([comm.rank]) * size
        comm.Sendrecv(sent, dest=(comm.rank + 1) % comm.size, recvbuf=received, source=(comm.rank - 1) % comm.size)
        assert received == bytes([(comm.rank - 1) % comm.size]) * size


def test_ucx_takes_plain_tcp_only_where_there_is_no_infiniband(tmp_path: Path) -> None:
    assert guard._transports(str(tmp_path / "absent")) == "tcp,self"
    assert guard._transports(str(tmp_path)) == "tcp,self"
    (tmp_path / "mlx5_0").mkdir()
    assert guard._transports(str(tmp_path)) == "^sm"


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize(
    ("first", "mode"), [("import hoplite_mpi", "federated"), ("from mpi4py import MPI", "restart: UCX_TLS=(unset)")]
)
def test_what_was_imported_too_late_makes_no_promise(first: str, mode: str) -> None:
    """UCX has read its settings when MPI began: what is set after that would only look as if it counted."""
    environ = {name: value for name, value in os.environ.items() if name != "UCX_TLS"} | {"SLURM_STEP_ID": "0"}
    code = f"{first}; import hoplite_mpi as hm; store = hm.init(); store.close()"
    command = [find_mpiexec(), "-n", "1", sys.executable, "-c", code]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"fault mode {mode}" in done.stderr
