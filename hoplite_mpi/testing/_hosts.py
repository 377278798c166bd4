"""Emulated hosts: network namespaces joined by shaped links, so that a test can cut a cable or the power."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType

from hoplite_mpi.launch import spawn_tied

__all__ = ["EmulatedHosts"]

_TOOLS = ("ip", "tc", "unshare", "nsenter", "mount", "hostname")
_TIMEOUT = 20.0
#: the kernel's smallest bucket that still lets 1 Gbit/s through at its timer's resolution
_SHAPE = "burst 256kb latency 50ms"


class EmulatedHosts:
    """*n* hosts on one switch, each with its own network, hostname, /etc/hosts and /dev/shm; they share files and pids.

    rate: of each link, both ways, in tc's notation. Host i is called ``h<i>`` and has address 10.77.0.(i+1); nothing
    outside the hosts is reachable from them, and nothing is changed outside: they are namespaces without a name, held
    by one process each that dies with this one, so two of these can be up at the same time and a killed test leaves
    nothing.

    A context manager; leaving it kills what still runs on the hosts. RuntimeError when not root, or without iproute2.
    """

    def __init__(self, n: int, rate: str = "1gbit") -> None:
        if not 1 <= n <= 200:
            raise ValueError(f"there can be 1 to 200 emulated hosts, not {n}")
        self.n = n
        self.rate = rate
        #: processes that hold the namespaces of the hosts
        self._keepers: list[subprocess.Popen[bytes]] = []
        self._switch: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> EmulatedHosts:
        _check_allowed()
        try:
            self._switch = _keep("switch", [])
            self._on_switch("ip link add br0 type bridge && ip link set br0 up")
            for i in range(self.n):
                self._add(i)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _add(self, i: int) -> None:
        keeper = _keep(f"h{i}", [f"{self.address(j)} h{j}" for j in range(self.n)])
        self._keepers.append(keeper)
        shape = f"root tbf rate {self.rate} {_SHAPE}"
        self._on_switch(
            f"ip link add v{i} type veth peer name e0 netns {keeper.pid} && ip link set v{i} master br0 up"
            f" && tc qdisc add dev v{i} {shape}"
        )
        _shell(
            self.command_prefix(i),
            f"ip addr add {self.address(i)}/24 dev e0 && ip link set e0 up && tc qdisc add dev e0 {shape}",
        )

    @staticmethod
    def address(i: int) -> str:
        """Return the IPv4 address of host *i*."""
        return f"10.77.0.{i + 1}"

    def command_prefix(self, i: int) -> list[str]:
        """Return what to put before a command so that it runs on host *i* modulo `n`, in the present directory."""
        if not self._keepers:
            raise RuntimeError("these emulated hosts are not up: use them inside 'with EmulatedHosts(...) as hosts:'")
        return _enter(self._keepers[i % self.n])

    def pull_cable(self, i: int) -> None:
        """Cut the link of host *i*: its processes go on, and nothing they send arrives, no reset either."""
        self._on_switch(f"ip link set v{self._index(i)} down")

    def plug_in(self, i: int) -> None:
        """Join the link of host *i* again."""
        self._on_switch(f"ip link set v{self._index(i)} up")

    def power_off(self, i: int) -> None:
        """Cut the link of host *i*, kill everything on it, empty its /dev/shm. `plug_in` brings it back, empty."""
        self.pull_cable(i)  # first: the kernel of a dead process would send resets, that of a dead machine doesn't
        _kill_all_on(self._keepers[i])
        _shell(self.command_prefix(i), "rm -rf /dev/shm/*")

    def close(self) -> None:
        """Kill what runs on the hosts and take them down. May be called twice."""
        keepers = [*self._keepers, *([self._switch] if self._switch else [])]
        for keeper in keepers:
            _kill_all_on(keeper)
        for keeper in keepers:
            keeper.kill()
            keeper.wait(timeout=_TIMEOUT)
            if keeper.stdout:
                keeper.stdout.close()
        self._keepers.clear()
        self._switch = None

    def _index(self, i: int) -> int:
        if not 0 <= i < len(self._keepers):
            raise ValueError(f"there is no emulated host {i}: they are 0 to {len(self._keepers) - 1}")
        return i

    def _on_switch(self, command: str) -> None:
        assert self._switch is not None
        _shell(_enter(self._switch), command)


def _check_allowed() -> None:
    if os.geteuid() != 0:
        raise RuntimeError("emulated hosts need root, for network and mount namespaces")
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        raise RuntimeError(
            f"emulated hosts need {', '.join(missing)}: apt-get install iproute2 util-linux mount hostname"
        )


def _keep(hostname: str, names: list[str]) -> subprocess.Popen[bytes]:
    """Start the process that holds the namespaces of one host, and return when they are set up."""
    setup = f"""set -e
hostname {hostname}
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t sysfs sysfs /sys  # UCX looks for network links there
h=$(mktemp); printf '%s\\n' '127.0.0.1 localhost' {" ".join(f"'{line}'" for line in names)} > $h; chmod 644 $h
mount --bind $h /etc/hosts; rm $h
ip link set lo up
echo up
exec sleep infinity"""
    keeper = spawn_tied(
        ["unshare", "--mount", "--uts", "--net", "--propagation", "private", "sh", "-c", setup],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    assert keeper.stdout is not None
    if keeper.stdout.readline() != b"up\n":
        keeper.kill()
        keeper.wait()
        raise RuntimeError(f"emulated host {hostname} could not be set up (see stderr): are namespaces allowed here?")
    return keeper


def _enter(keeper: subprocess.Popen[bytes]) -> list[str]:
    return ["nsenter", "-t", str(keeper.pid), "--mount", "--uts", "--net", f"--wd={os.getcwd()}"]


def _shell(prefix: list[str], command: str) -> None:
    done = subprocess.run([*prefix, "sh", "-c", command], capture_output=True, text=True, timeout=_TIMEOUT)
    if done.returncode:
        raise RuntimeError(f"{command!r} failed on an emulated host: {done.stderr.strip()}")


def _kill_all_on(keeper: subprocess.Popen[bytes]) -> None:
    """Kill every process in the keeper's network namespace but the keeper; return when none is left."""
    try:
        network = os.stat(f"/proc/{keeper.pid}/ns/net").st_ino
    except FileNotFoundError:
        return  # it was killed from outside, and its namespace goes with the last process in it
    deadline = time.monotonic() + _TIMEOUT
    while left := [pid for pid in _processes_in(network) if pid != keeper.pid]:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {left} on an emulated host did not end within {_TIMEOUT} s of SIGKILL")
        time.sleep(0.01)


def _processes_in(network: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.stat(entry / "ns" / "net").st_ino == network:
                    found.append(int(entry.name))
            except OSError:  # gone, or a zombie
                continue
    return found
