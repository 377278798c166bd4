"""Memory of a task: a limit that the kernel keeps, what is used, and who goes first when the machine has none left.

Two limits, since neither is enough. ``RLIMIT_DATA`` is at once and exact: an allocation that would pass it is a
`MemoryError` in the task, before any page is touched. But it holds for each process by itself. (``RLIMIT_AS`` would also
count what is only mapped: shared-memory inputs of any size, what GPU libraries reserve.) So the pool also looks at the
memory of all of the task's processes every moment, and kills the worker whose task is above its limit.
"""

from __future__ import annotations

import contextlib
import errno
import resource
from collections.abc import Iterator

from .tree import descendants

__all__ = ["Used", "describe_size", "is_shortage", "limited", "mark_for_oom", "private_memory", "used_by_tree"]

_KIB = 1024


class Used:
    """What the current task of this process has allocated since its begin."""

    def __init__(self) -> None:
        self._base = _fields("self", "status", "VmData:")

    @property
    def allocated(self) -> int:
        """Bytes more than at the begin."""
        return max(0, _fields("self", "status", "VmData:") - self._base)

    @property
    def base(self) -> int:
        """Bytes at the begin, which the limit comes on top of."""
        return self._base


@contextlib.contextmanager
def limited(used: Used | None, limit: int | None) -> Iterator[None]:
    """Let this process, and what it starts, allocate no more than *limit* bytes above *used* inside of the block."""
    if limit is None or used is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = used.base + limit
    for known in (soft, hard):
        if known != resource.RLIM_INFINITY:
            wanted = min(wanted, known)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):  # the task has lowered the hard limit
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def is_shortage(error: BaseException) -> bool:
    """Whether *error* is how Python says that the kernel refused memory: for an object, a mapping, a thread's stack."""
    if isinstance(error, RuntimeError):
        return error.args == ("can't start new thread",)
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)


def mark_for_oom() -> None:
    """Have the kernel take this process, and what it starts, first when memory is short: not the rank."""
    # raising it needs no rights, but a container may have /proc read-only
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def private_memory() -> int:
    """Return the bytes of memory of this process that belong to no file: what a task can fill."""
    return _private("self")


def used_by_tree(pid: int, above: int) -> int:
    """Return the bytes of private memory of a process and all below it; exact only where that is more than *above*.

    Pages that a fork shares with its parent are in the sum for each of them; where that sum is too large they are counted
    once, which takes long for large processes.
    """
    tree = [pid, *descendants(pid)]
    total = sum(map(_private, tree))
    if total <= above or len(tree) == 1:
        return total
    return sum(_fields(one, "smaps_rollup", "Pss_Anon:", "SwapPss:") for one in tree) or total


def describe_size(nbytes: int) -> str:
    """Return "1.5 GiB", "12 MiB", ..."""
    size, unit = float(nbytes), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.4g} {unit}"


def _private(pid: int | str) -> int:
    return _fields(pid, "status", "RssAnon:", "VmSwap:")


def _fields(pid: int | str, file: str, *names: str) -> int:
    """Return the sum of fields, in bytes, of a file in /proc/PID; 0 if the process is gone."""
    try:
        with open(f"/proc/{pid}/{file}") as lines:
            return sum(int(line.split()[1]) * _KIB for line in lines if line.startswith(names))
    except OSError:
        return 0
