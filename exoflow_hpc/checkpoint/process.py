"""The writer process of a rank: puts all outputs that queued up while one file was written into the next."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import sys
import threading
from collections import deque
from pathlib import Path
from typing import Any

from exoflow_hpc.checkpoint.group import Item, UncleanError, write_group
from exoflow_hpc.checkpoint.known import Known
from exoflow_hpc.checkpoint.wire import Channel
from exoflow_hpc.durable import storage_errors
from exoflow_hpc.errors import StorageError
from exoflow_hpc.settings import Settings
from hoplite_mpi.meta import Meta

__all__ = ["main"]

#: a file takes no more than this, so that nobody waits for the acknowledgement of all that is queued
_GROUP_BYTES = 1 << 30
_GROUP_ENTRIES = 4096
#: seconds between two looks at whether the rank still lives, for when a stray copy of its socket hides its death
_PARENT_POLL = 1.0


class _Writer:
    def __init__(self, channel: Channel, name: str, first: int) -> None:
        self._channel = channel
        #: <rank>.<incarnation>, part of the files' names
        self._name = name
        self._next = first
        self._known = Known()
        self._direct_from = Settings.from_environment().direct_io
        self._arrived = threading.Condition()
        self._queue: deque[tuple[dict[str, Any], int | None]] = deque()

    def receive_forever(self, parent: int) -> None:
        """Queue what comes; end the process once the rank is gone, whatever it is doing: no worse than a kill."""
        while True:
            while not self._channel.poll(_PARENT_POLL):
                if os.getppid() != parent:
                    os._exit(0)
            try:
                arrived = self._channel.receive()
            except OSError:
                arrived = None
            if arrived is None:
                os._exit(0)
            with self._arrived:
                self._queue.append(arrived)
                self._arrived.notify()

    def serve_forever(self) -> None:
        """Write groups and answer. Ends by `os._exit`: after "close", or when HDF5 can't be used any more."""
        while True:
            where, group = self._next_group()
            items = [_item(message, fd) for message, fd in group]
            ids = [message["id"] for message, _ in group]
            try:
                self._write(where, ids, items)
            finally:
                for item in items:
                    if item.fd is not None:
                        os.close(item.fd)

    def _next_group(self) -> tuple[tuple[str, int], list[tuple[dict[str, Any], int | None]]]:
        """Return the queued requests of one workflow and epoch; the others keep their order."""
        with self._arrived:
            self._arrived.wait_for(lambda: self._queue)
            group: list[tuple[dict[str, Any], int | None]] = []
            others: list[tuple[dict[str, Any], int | None]] = []
            nbytes = 0
            where: tuple[str, int] | None = None
            while self._queue and len(group) < _GROUP_ENTRIES and nbytes < _GROUP_BYTES:
                message, fd = self._queue.popleft()
                if where is None:
                    if message.get("close"):
                        os._exit(0)
                    where = message["workflow_dir"], message["epoch"]
                if not message.get("close") and (message["workflow_dir"], message["epoch"]) == where:
                    group.append((message, fd))
                    nbytes += message["meta"][1]
                else:
                    others.append((message, fd))
            self._queue.extendleft(reversed(others))
            assert where is not None
            return where, group

    def _write(self, where: tuple[str, int], ids: list[int], items: list[Item]) -> None:
        directory = Path(where[0]) / "checkpoints"
        with contextlib.ExitStack() as mapped:
            try:
                name = self._new_name(directory, where[1])
                with storage_errors("write checkpoint", directory / name):
                    written = write_group(directory, name, items, self._known, self._direct_from, mapped)
            except StorageError as error:
                self._failed(where, ids, items, error)
                return
            for number, result in zip(ids, written, strict=True):
                self._channel.send(
                    {
                        "id": number,
                        "file": result.file,
                        "entry": result.entry,
                        "checksum": result.checksum,
                        "nbytes": result.nbytes,
                    }
                )

    def _failed(self, where: tuple[str, int], ids: list[int], items: list[Item], error: StorageError) -> None:
        unclean = isinstance(error.__cause__, UncleanError)
        if len(items) > 1 and not unclean:
            # one that is too large or can't be read must not take the others with it
            for number, item in zip(ids, items, strict=True):
                self._write(where, [number], [item])
            return
        for number in ids:
            self._channel.send({"id": number, "errno": error.errno, "error": str(error)})
        if unclean:
            os._exit(3)  # the rank starts another, which has nothing open

    def _new_name(self, directory: Path, epoch: int) -> str:
        while True:
            name = f"{epoch:08d}-{self._name}-{self._next:09d}.h5"
            self._next += 1
            if not (directory / name).exists():
                return name


def _item(message: dict[str, Any], fd: int | None) -> Item:
    meta = Meta.from_wire(message["meta"])
    return Item(message["task_id"], message["entry"], meta, message.get("data", b""), fd, message.get("offset", 0))


def main() -> None:
    """Serve the rank. Arguments: descriptor of the socket, <rank>.<incarnation>, first sequence number, parent."""
    fd, name, first, parent = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    # A signal to the whole job (Ctrl-C, the time limit) is the rank's to act on, and what it then saves goes through
    # here.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # each large source that waits holds one
    channel = Channel(socket.socket(fileno=fd))
    writer = _Writer(channel, name, first)
    threading.Thread(target=writer.receive_forever, args=(parent,), name="receive", daemon=True).start()
    try:
        writer.serve_forever()
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)
