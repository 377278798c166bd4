"""Who am I, and who are the others: from an MPI world, or from the rendezvous directory of ranks started one by one."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpi4py import MPI

from hoplite_mpi import ending
from hoplite_mpi.errors import HopliteError
from hoplite_mpi.protocol.view import Member

__all__ = ["Contact", "Place", "find_place", "node_identity"]


@dataclass(frozen=True)
class Contact:
    """Where a process that has said hello can be called."""

    rank: int
    incarnation: int
    address: tuple[str, int]
    node: str


@dataclass(frozen=True)
class Place:
    """This process in its run."""

    rank: int
    #: ranks at the start of the run
    size: int
    incarnation: int
    #: 16 hex digits, the same on all ranks
    run: str
    secret: bytes
    node: str
    #: the communicator of ranks that were started together; None for ranks started one by one
    comm: MPI.Comm | None
    rendezvous: Path | None

    @property
    def arena(self) -> str:
        """Name of this node's arena."""
        given = _given_node()
        return f"{self.run}-{given}" if given else self.run

    def founders(self, address: tuple[str, int]) -> list[Member]:
        """Return the members of the first view; collective over the communicator."""
        assert self.comm is not None
        with _together(self.comm):
            everyone = self.comm.allgather((self.node, address))
        return [Member(rank, 0, node, there, 1) for rank, (node, there) in enumerate(everyone)]

    def announce(self, address: tuple[str, int]) -> None:
        """Write this process's contact where the others look."""
        assert self.rendezvous is not None
        name = f"rank.{self.rank}.{self.incarnation}.json"
        contact = {"address": list(address), "node": self.node, "pid": os.getpid(), "host": socket.gethostname()}
        temporary = self.rendezvous / f".{name}.{os.getpid()}"
        temporary.write_text(json.dumps(contact))
        temporary.rename(self.rendezvous / name)

    def contacts(self) -> list[Contact]:
        """Return the other processes that have announced themselves: the newest incarnation of each rank, lowest rank first."""
        assert self.rendezvous is not None
        newest: dict[int, Contact] = {}
        for path in self.rendezvous.glob("rank.*.json"):
            _, rank, incarnation, _ = path.name.split(".")
            known = newest.get(int(rank))
            if int(rank) == self.rank or (known is not None and known.incarnation > int(incarnation)):
                continue
            wire: dict[str, Any] = json.loads(path.read_text())
            address = (str(wire["address"][0]), int(wire["address"][1]))
            newest[int(rank)] = Contact(int(rank), int(incarnation), address, wire["node"])
        return [newest[rank] for rank in sorted(newest)]


@contextlib.contextmanager
def _together(comm: MPI.Comm | None = None) -> Iterator[None]:
    """Make HopliteError of an error in a collective call on *comm*, and have the others, who may be waiting in it, get one, too."""
    try:
        yield
    except MPI.Exception as error:
        if comm is not None:
            with contextlib.suppress(MPI.Exception, NotImplementedError):  # what has no ULFM ends them anyhow
                comm.Revoke()
        ending.skip_finalize()
        raise HopliteError(
            f"the store can't be opened, since another rank has died: start all of them again ({error})"
        ) from error


def _given_node() -> str | None:
    given = os.environ.get("HOPLITE_NODE")
    return None if given is None else given.replace("{rank}", os.environ.get("HOPLITE_RANK", ""))


def node_identity() -> str:
    """Return a name that processes share exactly if they share /dev/shm and the network.

    HOPLITE_NODE in the environment wins, with ``{rank}`` in it standing for the rank: ranks of one machine with different values treat
    each other as on different nodes.
    """
    given = _given_node()
    if given:
        return given
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
    shm = os.stat("/dev/shm").st_dev
    net = os.stat("/proc/self/ns/net").st_ino
    return f"{socket.gethostname()}/{boot}/{shm}/{net}"


def find_place(comm: MPI.Comm | None) -> Place:
    """Return this process's place; collective over *comm* (default COMM_WORLD) unless ranks were started one by one."""
    environ = os.environ
    rendezvous = environ.get("HOPLITE_RENDEZVOUS")
    if comm is None and rendezvous is not None:
        try:
            secret = Path(rendezvous, "secret").read_bytes()
            return Place(
                rank=int(environ["HOPLITE_RANK"]),
                size=int(environ["HOPLITE_SIZE"]),
                incarnation=int(environ.get("HOPLITE_INCARNATION", "0")),
                run=environ["HOPLITE_RUN"],
                secret=secret,
                node=node_identity(),
                comm=None,
                rendezvous=Path(rendezvous),
            )
        except (KeyError, ValueError, OSError) as error:
            raise HopliteError(
                f"HOPLITE_RENDEZVOUS={rendezvous} says that this rank was started one by one, but {error!r}: "
                "start ranks with `python -m exoflow_hpc run` or hoplite_mpi.launch"
            ) from error
    with _together():
        comm = (MPI.COMM_WORLD if comm is None else comm).Dup()
    comm.Set_errhandler(MPI.ERRORS_RETURN)
    with _together(comm):
        run, secret = comm.bcast((secrets.token_hex(8), secrets.token_bytes(32)) if comm.rank == 0 else None)
    return Place(comm.rank, comm.size, 0, run, secret, node_identity(), comm, None)
