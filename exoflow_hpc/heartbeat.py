"""Signs of life of whoever holds an epoch, seen by those who might take over (see *Controllers* in architecture.md).

Nothing is safe or unsafe by it: the journal's fence is what keeps two controllers apart. The heartbeat only keeps a
candidate from taking over one that is well. No clock is compared with another machine's: a watcher looks for *change*
on its own clock.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exoflow_hpc.durable import storage_errors, write_all
from exoflow_hpc.errors import StorageError

__all__ = ["INTERVAL", "TAKEOVER_AFTER", "Heartbeat", "identity", "is_gone", "watch"]

#: seconds between two beats
INTERVAL = 0.5
#: seconds for which a candidate has to see no beat before it takes over; several beats, so that one slow write isn't
#: taken for a death
TAKEOVER_AFTER = 3.0
#: bytes of the file, always: it is rewritten in place, within one block
_SIZE = 512


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _pid_namespace() -> str:
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _process_start(pid: int) -> str | None:
    """Return when a process began (clock ticks since boot), "" if it is gone or a zombie, None if nobody can say."""
    if not os.path.exists("/proc/self/stat"):
        return None
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 2 :].split()  # the name before it may hold spaces and parentheses
    return "" if fields[0] in "ZX" else fields[19]


def identity() -> dict[str, Any]:
    """Return what names this process for whoever shares its process namespace: see `is_gone`."""
    return {
        "boot": _boot_id(),
        "pid_namespace": _pid_namespace(),
        "pid": os.getpid(),
        "started": _process_start(os.getpid()) or "",
    }


def is_gone(who: dict[str, Any]) -> bool:
    """Whether the process of that `identity` has provably died: same boot and process namespace, and no such process."""
    if not who["boot"] or who["boot"] != _boot_id():
        return False
    if not who["pid_namespace"] or who["pid_namespace"] != _pid_namespace():
        return False
    started = _process_start(who["pid"])
    return started is not None and started != who["started"]


class Heartbeat:
    """Rewrites a heartbeat file every *interval* seconds from a thread, until `stop` or a newer epoch's beat."""

    def __init__(self, path: str | os.PathLike[str], epoch: int, interval: float = INTERVAL) -> None:
        self.path = Path(path)
        self.epoch = epoch
        #: time.monotonic() of the last beat that reached the storage
        self.last_beat = 0.0
        #: why the last beat failed; None: it didn't
        self.error: StorageError | None = None
        #: a newer epoch beats in the same file: this controller has been taken over
        self.superseded = False
        #: the same process goes on in the next epoch at once: nobody is to take over meanwhile
        self.handed_on = False
        self._interval = interval
        self._counter = 0
        self._stop = threading.Event()
        self._who = {"epoch": epoch, "host": socket.gethostname(), **identity()}
        self._thread = threading.Thread(target=self._beat_forever, name=f"heartbeat-{epoch}", daemon=True)

    def start(self) -> None:
        """Write the first beat and begin; StorageError if it can't be written."""
        self._beat()
        if self.error is not None:
            raise self.error
        self._thread.start()

    def stop(self) -> None:
        """Stop, and say so in the file unless it is *handed_on*: nobody has to wait before taking over."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if not self.handed_on:
            self._beat(stopped=True)

    def __enter__(self) -> Heartbeat:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _beat_forever(self) -> None:
        while not self._stop.wait(self._interval) and not self.superseded:
            self._beat()

    def _beat(self, stopped: bool = False) -> None:
        try:
            with storage_errors("write the heartbeat", self.path):
                found = _parse(_load(self.path))
                if found is not None and found["epoch"] > self.epoch:
                    self.superseded = True  # beating on would keep others from taking over the newer one
                    return
                self._counter += 1
                text = json.dumps({**self._who, "counter": self._counter, "stopped": stopped})
                # Opened each time: on a network file system, closing is what sends it. Not fsynced: after a power cut
                # nobody beats.
                fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
                try:
                    write_all(fd, text.encode().ljust(_SIZE - 1) + b"\n", 0)
                finally:
                    os.close(fd)
        except StorageError as error:  # kept, not raised: the storage may be back at the next beat
            self.error = error
            return
        self.error = None
        self.last_beat = time.monotonic()


def _load(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _parse(data: bytes | None) -> dict[str, Any] | None:
    """Return the fields of a beat, None for one that is missing or caught half-written."""
    with contextlib.suppress(ValueError):
        found = json.loads(data or b"")
        if isinstance(found, dict) and {"epoch", "boot", "pid_namespace", "pid", "started", "stopped"} <= found.keys():
            return found
    return None


def watch(
    path: str | os.PathLike[str],
    seconds: float = TAKEOVER_AFTER,
    *,
    interval: float = 0.1,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Return whether somebody is at work: True as soon as the heartbeat moves, False when it stood still for *seconds*.
    Blocks.

    False at once if there is no heartbeat, its writer has stopped, or is provably dead. StorageError.
    """
    path = Path(path)
    with storage_errors("read the heartbeat", path):
        first = _load(path)
        deadline = clock() + seconds
        while True:
            now = _load(path)
            if now != first:
                return now is not None
            if now is None:
                return False
            beat = _parse(now)
            if beat is not None and (beat["stopped"] or is_gone(beat)):
                return False
            if clock() >= deadline:
                return False
            sleep(interval)
