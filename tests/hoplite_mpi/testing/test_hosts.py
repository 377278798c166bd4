from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hoplite_mpi.testing import EmulatedHosts, run_ranks

pytestmark = pytest.mark.hosts

#: connects to ARGV[1]:5000 within ARGV[2] seconds; exit code 0 if the greeting came
_CONNECT = """
import socket, sys, time
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    try:
        with socket.create_connection((sys.argv[1], 5000), timeout=end - time.monotonic()) as s:
            s.settimeout(max(0.01, end - time.monotonic()))
            sys.exit(0 if s.recv(2) == b"hi" else 1)
    except OSError:
        time.sleep(0.02)
sys.exit(2)
"""
_SERVE = """
import socket
with socket.create_server(("", 5000)) as s:
    print("up", flush=True)
    while True:
        s.accept()[0].sendall(b"hi")
"""


@pytest.fixture
def hosts() -> Iterator[EmulatedHosts]:
    with EmulatedHosts(2) as up:
        yield up


def _serve(hosts: EmulatedHosts, i: int) -> subprocess.Popen[bytes]:
    server = subprocess.Popen([*hosts.command_prefix(i), sys.executable, "-c", _SERVE], stdout=subprocess.PIPE)
    assert server.stdout is not None
    assert server.stdout.readline() == b"up\n"
    return server


def _reaches(hosts: EmulatedHosts, source: int, target: str, seconds: float) -> bool:
    command = [*hosts.command_prefix(source), sys.executable, "-c", _CONNECT, target, str(seconds)]
    return subprocess.run(command, timeout=60, check=False).returncode == 0


def test_cable_and_power(hosts: EmulatedHosts) -> None:
    with _serve(hosts, 1) as server:
        assert _reaches(hosts, 0, "h1", 10)  # by name: each host has an /etc/hosts
        hosts.pull_cable(1)
        assert not _reaches(hosts, 0, "h1", 0.5)
        assert server.poll() is None
        hosts.plug_in(1)
        assert _reaches(hosts, 0, hosts.address(1), 10)
        hosts.power_off(1)
        assert server.wait(timeout=10) != 0
        assert not _reaches(hosts, 0, "h1", 0.5)


def test_two_sets_of_hosts_do_not_see_each_other(hosts: EmulatedHosts) -> None:
    with EmulatedHosts(2) as others:
        server = _serve(others, 1)
        assert _reaches(others, 0, "h1", 10)
        assert not _reaches(hosts, 0, "h1", 0.5)
    with server:
        assert server.wait(timeout=10) == -signal.SIGKILL


def test_ranks_run_on_hosts_with_their_own_shared_memory(hosts: EmulatedHosts) -> None:
    def work() -> tuple[str, list[str]]:
        Path("/dev/shm", os.environ["HOPLITE_RANK"]).touch()
        return os.uname().nodename, os.listdir("/dev/shm")

    result = run_ranks(2, work, hosts=hosts)
    assert [result[rank].value for rank in range(2)] == [("h0", ["0"]), ("h1", ["1"])], result


def test_mpi_works_on_a_host(hosts: EmulatedHosts) -> None:
    def world() -> int:
        from mpi4py import MPI

        return MPI.COMM_WORLD.size

    assert run_ranks(1, world, hosts=hosts, env={"UCX_TLS": "tcp,self"})[0].value == 1


def test_a_killed_owner_leaves_nothing() -> None:
    code = (
        "from hoplite_mpi.testing import EmulatedHosts\n"
        "with EmulatedHosts(1) as h:\n"
        "    print(h.command_prefix(0)[2], flush=True)\n"
        "    input()\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with owner:
        assert owner.stdout is not None
        keeper = int(owner.stdout.readline())
        owner.kill()
    end = time.monotonic() + 10
    while os.path.exists(f"/proc/{keeper}/ns/net") and time.monotonic() < end:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{keeper}/ns/net")


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "tc" else f"/bin/{name}")
    with pytest.raises(RuntimeError, match="need tc"), EmulatedHosts(1):
        pass
