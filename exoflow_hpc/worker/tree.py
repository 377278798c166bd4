"""The processes that a task starts: found, counted and ended, also those that leave the worker's process group.

A process group is easily left (`setsid`), a mark in the environment is easily cleared, and a cgroup needs rights that a job
rarely has. A *subreaper* needs none and can't be left: whatever loses its parent below it becomes its child. Forkserver and
workers are subreapers, so that all that a task has started is below its worker while that lives, and a child of the
forkserver afterwards.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Container, Iterator

__all__ = ["become_subreaper", "descendants", "end_children", "has_children"]

_PR_SET_CHILD_SUBREAPER = 36
#: seconds for killed processes to be gone; one that a dead file system holds back is given up
_LIMIT = 5.0


def become_subreaper() -> None:
    """Adopt what loses its parent below this process. Kernels before 3.4 refuse, without effect."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def has_children() -> bool:
    """Whether this process has a child, dead ones that are not reaped included. One system call."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def end_children(keep: Container[int] = (), limit: float = _LIMIT) -> bool:
    """Kill and reap all children of this process but *keep*, and what they have started. Return whether any was alive.

    What they have started becomes a child when its parent is dead, so it goes in a later round. Gives up after *limit*
    seconds.
    """
    deadline, pause, any_alive = time.monotonic() + limit, 0.0005, False
    while has_children():
        mine = [pid for pid in _children(os.getpid()) if pid not in keep]
        if not mine:
            break
        for pid in mine:
            # it is not reaped, so the number is its own
            any_alive = any_alive or _state(pid) not in "ZX"
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        if time.monotonic() > deadline:
            break
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
    return any_alive


def descendants(pid: int) -> list[int]:
    """Return the pids of all that is below process *pid*, without itself. What starts or ends meanwhile may be missed."""
    found: list[int] = []
    seen, waiting = {pid}, [pid]
    while waiting:
        for child in _children(waiting.pop()):
            if child not in seen:
                seen.add(child)
                found.append(child)
                waiting.append(child)
    return found


def _children(pid: int) -> list[int]:
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(ProcessLookupError):
                with open(f"/proc/{pid}/task/{thread}/children") as file:
                    found.extend(map(int, file.read().split()))
    except (FileNotFoundError, ProcessLookupError):  # the process is gone, or the kernel was built without that file
        if os.path.exists(f"/proc/{pid}"):
            return [child for child, parent in _all_parents() if parent == pid]
    return found


def _all_parents() -> Iterator[tuple[int, int]]:
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, IndexError):
                yield int(entry), int(_stat(int(entry))[1])


def _state(pid: int) -> str:
    try:
        return _stat(pid)[0]
    except (OSError, IndexError):
        return "X"


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the name, which may hold anything: state, parent, ..."""
    with open(f"/proc/{pid}/stat", errors="replace") as file:
        return file.read().rpartition(")")[2].split()
