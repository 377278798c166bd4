"""Remove what dead runs left in shared memory. Never touches what a live process uses."""

from __future__ import annotations

import logging
import os
import re
import stat
import time
from contextlib import suppress

from ._roster import remove_if_unused

__all__ = ["sweep", "unlink_own_segments"]

#: device and inode
File = tuple[int, int]

_log = logging.getLogger(__name__)
#: seconds; a younger segment of MPICH's may belong to a process between creating and mapping it
_MPICH_MIN_AGE = 30.0
#: inodes of the initial namespaces, fixed in the kernel
_INITIAL_PID_NAMESPACE = "pid:[4026531836]"
_INITIAL_IPC_NAMESPACE = "ipc:[4026531839]"


def sweep(root: str = "/dev/shm") -> list[str]:
    """Remove own arenas of *root* that no live process has a slot in, and own segments of MPICH's that none has mapped.

    Return the removed names. Safe beside other sweepers and starting runs: an arena goes only under the lock of all
    its slots, and whoever starts in it meanwhile begins anew.
    """
    removed = []
    uid = os.geteuid()
    segments = []
    for entry in os.scandir(root):
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue
        if status.st_uid != uid:
            continue
        if re.fullmatch(rf"hoplite-{uid}-[A-Za-z0-9_-]+", entry.name) and stat.S_ISDIR(status.st_mode):
            try:
                if remove_if_unused(entry.path):
                    removed.append(entry.name)
            except OSError as error:  # one that can't be removed must keep no run from starting
                _log.warning("could not sweep %s: %s", entry.path, error)
        elif (
            entry.name.startswith("mpich_shm_")
            and stat.S_ISREG(status.st_mode)
            and time.time() - status.st_ctime > _MPICH_MIN_AGE
        ):
            segments.append((entry.name, (status.st_dev, status.st_ino)))
    if segments:
        removed += _sweep_segments(root, segments, uid)
    return removed


def unlink_own_segments() -> None:
    """Take away the names of the segments of MPICH's that this process has mapped: however it ends, it leaves none.

    For a world of one process, or at the end: nobody else will open them, and MPI_Finalize doesn't miss the names.
    """
    with open("/proc/self/maps", errors="surrogateescape") as file:
        paths = {line.rstrip("\n").split(maxsplit=5)[-1] for line in file if "/dev/shm/mpich_shm_" in line}
    for path in paths:
        with suppress(FileNotFoundError):
            os.unlink(path.removesuffix(" (deleted)"))


def _sweep_segments(root: str, segments: list[tuple[str, File]], uid: int) -> list[str]:
    if not _sees_all_processes():
        return []
    try:
        used, mapped_names = _in_use(uid)
    except PermissionError as error:
        _log.info("MPICH's segments in %s stay: %s", root, error)
        return []
    removed = []
    for name, file in segments:
        if file not in used and name not in mapped_names:
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(root, name))
                removed.append(name)
    return removed


def _sees_all_processes() -> bool:
    """Whether nobody whom /proc doesn't show can have this node's /dev/shm."""
    if os.readlink("/proc/self/ns/pid") == _INITIAL_PID_NAMESPACE:
        return True
    # In a container: one with its own IPC namespace has its own /dev/shm as well.
    return os.readlink("/proc/self/ns/ipc") != _INITIAL_IPC_NAMESPACE


def _in_use(uid: int) -> tuple[set[File], set[str]]:
    """Return the files that processes of *uid* have mapped or open, and the base names of the mapped ones.

    By name as well: on some file systems the device in ``maps`` is not the one that stat tells. PermissionError if
    a process that may be a rank of ours doesn't let us look.
    """
    used: set[File] = set()
    names: set[str] = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(FileNotFoundError, ProcessLookupError):
            status = _status(pid)
            if str(uid) not in status["Uid"]:
                continue
            try:
                _add_files(pid, used, names)
            except PermissionError:
                if not _has_other_privileges(status):
                    raise
    return used, names


def _add_files(pid: str, used: set[File], names: set[str]) -> None:
    with open(f"/proc/{pid}/maps", errors="surrogateescape") as file:
        for line in file:
            words = line.rstrip("\n").split(maxsplit=5)
            major, minor = words[3].split(":")
            used.add((os.makedev(int(major, 16), int(minor, 16)), int(words[4])))
            names.add(os.path.basename(words[5]) if len(words) > 5 else "")
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            status = os.stat(f"/proc/{pid}/fd/{fd}")
            used.add((status.st_dev, status.st_ino))


def _status(pid: str) -> dict[str, list[str]]:
    with open(f"/proc/{pid}/status", errors="surrogateescape") as file:
        return {key: value.split() for key, _, value in (line.partition(":") for line in file)}


def _has_other_privileges(status: dict[str, list[str]]) -> bool:
    """Whether a process is one that the system runs for the user (init, ssh-agent, sudo).

    Such a one is no rank of an MPI job.
    """
    own = _status("self")
    more_capable = int(status["CapPrm"][0], 16) & ~int(own["CapPrm"][0], 16)
    return bool(more_capable) or (status["Uid"], status["Gid"]) != (own["Uid"], own["Gid"])
