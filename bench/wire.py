"""Broadcast and reduce of 64 MiB over four emulated hosts with links of 1 Gbit/s, as a multiple of what the wire allows.

    python bench/wire.py [ROUNDS]          needs root, for the emulated hosts

In every round all is measured side by side: a raw TCP stream of the same size between two hosts (S/B), MPICH's own Bcast and Reduce
in one MPI world over the same links, and ours: all ready at once; and with arrivals 100 ms apart, in two orders. Seconds run from the
last rank's being ready to the last one's having the result (staggered: the mean over the receivers, each from its own arrival; for
the reduce from the last arrival). The first round, in which all memory is touched for the first time, is shown apart.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

HOSTS, NBYTES = 4, 64 << 20
STAGGER = 0.1
PORT = 4711
HERE = os.path.abspath(__file__)


def receive_stream() -> None:
    """Receive NBYTES over plain TCP, on one host."""
    with socket.create_server(("", PORT)) as server:
        print("listening", flush=True)
        stream, _ = server.accept()
        buffer, left = bytearray(1 << 20), NBYTES
        while left:
            left -= stream.recv_into(buffer, min(left, len(buffer)))
        stream.sendall(b"done")


def send_stream(address: str) -> None:
    """Send NBYTES over plain TCP, on another one; print the seconds."""
    data = bytes(NBYTES)
    with socket.create_connection((address, PORT)) as stream:
        began = time.perf_counter()
        stream.sendall(data)
        stream.recv(4)
        print(time.perf_counter() - began, flush=True)


def raw_stream(hosts: Any) -> float:
    """Return the seconds of one TCP stream from host 0 to host 1."""
    receiver = subprocess.Popen(
        [*hosts.command_prefix(1), sys.executable, HERE, "receive-stream"], stdout=subprocess.PIPE
    )
    assert receiver.stdout is not None
    receiver.stdout.readline()
    send = [*hosts.command_prefix(0), sys.executable, HERE, "send-stream", hosts.address(1)]
    seconds = float(subprocess.run(send, check=True, capture_output=True, timeout=60).stdout)
    receiver.wait(10)
    return seconds


def world(rounds: int) -> None:
    """Measure MPICH's collectives, as one rank of an MPI world; rank 0 prints (start, end) of each rank."""
    import numpy as np
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    mine = np.full(NBYTES // 8, 1.0 + comm.rank)
    result = np.empty_like(mine)
    found: dict[str, list[list[tuple[float, float]]]] = {"broadcast": [], "reduce": []}
    small = np.zeros(1 << 17)
    for root in range(comm.size):  # makes the connections
        comm.Bcast(small, root)
        comm.Reduce(np.ones(1 << 17), small, MPI.SUM, root)
    for _ in range(rounds + 1):
        for name in found:
            comm.Barrier()
            began = time.monotonic()
            if name == "broadcast":
                comm.Bcast(mine if comm.rank == 0 else result)
            else:
                comm.Reduce(mine, result, MPI.SUM, 0)
            spans = comm.allgather((began, time.monotonic()))
            found[name].append(spans)
    if comm.rank == 0:
        print(json.dumps(found), flush=True)


def ours(rounds: int) -> tuple[dict[str, list[tuple[float, float]]], str]:
    """Measure ours, as one of the ranks; return name → (ready, done) of each round, and what the store says of a reduce."""
    import numpy as np

    import hoplite_mpi as hm

    store = hm.init()
    mine = np.full(NBYTES // 8, 1.0 + store.rank)
    found: dict[str, list[tuple[float, float]]] = {}
    orders = {"": [0] * HOSTS, ", in order": list(range(HOSTS)), ", against it": [0, 3, 2, 1]}
    small = [hm.ObjectID.from_name(f"small {rank}") for rank in range(HOSTS)]
    store.put(np.zeros(1 << 17), small[store.rank])
    for oid in small:  # makes the connections
        store.get(oid)
    for turn in range(rounds + 1):
        for order, delays in orders.items():
            oid = hm.ObjectID.from_name(f"broadcast {turn}{order}")
            if store.rank == 0:
                store.put(mine, oid)
            store.barrier()
            time.sleep(STAGGER * delays[store.rank])
            ready = time.monotonic()
            assert store.get(oid)[-1] == 1
            span = ready, time.monotonic()
            found.setdefault(f"broadcast{order}", []).append(span)
            store.barrier()
            if store.rank == 0:
                store.delete(oid)

            sources = [hm.ObjectID.from_name(f"source {turn}{order} {rank}") for rank in range(HOSTS)]
            rid = hm.ObjectID.from_name(f"reduce {turn}{order}")
            if not order:
                store.put(mine, sources[store.rank])
            store.barrier()
            if order:
                time.sleep(STAGGER * delays[store.rank])
                store.put(mine, sources[store.rank])
            ready = time.monotonic()
            if store.rank == 0:
                store.reduce(sources, object_id=rid)
                assert store.get(rid)[-1] == HOSTS * (HOSTS + 1) / 2
            span = ready, time.monotonic()
            found.setdefault(f"reduce{order}", []).append(span)
            store.barrier()
            if store.rank == 0:
                for oid in (rid, *sources):
                    store.delete(oid)
            store.barrier()
    explanation = str(store.explain_reduce(HOSTS, NBYTES))
    store.barrier()
    store.close()
    return found, explanation


def seconds_of(name: str, spans: list[tuple[float, float]]) -> float:
    """Return what counts of the (ready, done) of all ranks in one round."""
    if "," in name and name.startswith("broadcast"):  # each waits from its own arrival
        return statistics.mean(done - ready for ready, done in spans[1:])
    return max(done for _, done in spans) - max(ready for ready, _ in spans)


def main(rounds: int) -> None:
    """Run all, print a table."""
    from hoplite_mpi.testing import EmulatedHosts, run_ranks

    with EmulatedHosts(HOSTS, rate="1gbit") as hosts:
        wire = [raw_stream(hosts) for _ in range(rounds)]
        theirs = _world_on(hosts, rounds)
        results = run_ranks(HOSTS, ours, (rounds,), hosts=hosts, timeout=120 + 30 * rounds)
        wire += [raw_stream(hosts) for _ in range(rounds)]
    for rank, result in results.items():
        if result.value is None:
            sys.exit(f"rank {rank} ended with {result.exitcode}:\n{result.output}")
    bound = statistics.median(wire)
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}"
    print(f"{time.strftime('%Y-%m-%d %H:%M')}, {machine}, Python {platform.python_version()}")
    print(f"{HOSTS} emulated hosts, 1 Gbit/s each, {NBYTES >> 20} MiB, {rounds} rounds: median (least, most)")
    print(f"raw TCP stream, S/B: {bound:.3f} s ({min(wire):.3f}, {max(wire):.3f}), {NBYTES / bound / 1e6:.1f} MB/s")
    print(f"{'':34}{'seconds':>22}   {'times S/B':>9}   {'of wire speed':>13}   {'first':>7}")
    for name, spans in theirs.items():
        _line(f"MPICH {name}", [seconds_of(name, one) for one in spans], bound)
    for name in results[0].value[0]:
        turns = zip(*(results[rank].value[0][name] for rank in range(HOSTS)), strict=True)
        _line(f"hoplite_mpi {name}", [seconds_of(name, list(turn)) for turn in turns], bound)
    print(f"explain_reduce on rank 0: {results[0].value[1]}")


def _world_on(hosts: Any, rounds: int) -> dict[str, list[list[tuple[float, float]]]]:
    """Run an MPI world over the hosts: mpiexec reaches each through its name space instead of ssh."""
    ssh = os.path.join("/tmp", f"hoplite-wire-ssh-{os.getpid()}")
    enter = {hosts.address(i): " ".join(hosts.command_prefix(i)) for i in range(HOSTS)}
    cases = "\n".join(f'  {address}) shift; exec {prefix} sh -c "$*" ;;' for address, prefix in enter.items())
    with open(ssh, "w") as script:
        script.write(f'#!/bin/sh\nwhile [ "${{1#-}}" != "$1" ]; do shift; done\ncase "$1" in\n{cases}\nesac\n')
    os.chmod(ssh, 0o700)
    try:
        mpiexec = os.path.join(os.path.dirname(sys.executable), "mpiexec")
        names = ",".join(enter)
        command = f"{mpiexec} -launcher ssh -launcher-exec {ssh} -hosts {names} -n {HOSTS} -ppn 1 {sys.executable} {HERE} world {rounds}"
        environment = {**os.environ, "UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "e0"}
        done = subprocess.run(
            [*hosts.command_prefix(0), "sh", "-c", command],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120 + 30 * rounds,
        )
    finally:
        os.unlink(ssh)
    if done.returncode:
        sys.exit(f"MPICH's collectives failed: {done.stdout}\n{done.stderr}")
    result: dict[str, list[list[tuple[float, float]]]] = json.loads(done.stdout.splitlines()[-1])
    return result


def _line(name: str, seconds: list[float], bound: float) -> None:
    first, *rest = seconds
    median = statistics.median(rest)
    spread = f"{median:.3f} ({min(rest):.3f}, {max(rest):.3f})"
    print(f"{name:34}{spread:>22}   {median / bound:9.2f}   {100 * bound / median:11.0f} %   {first:7.3f}")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["receive-stream"]:
            receive_stream()
        case ["send-stream", target]:
            send_stream(target)
        case ["world", count]:
            world(int(count))
        case _ if os.geteuid():
            print("left out: emulated hosts need root")
        case _:
            main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
