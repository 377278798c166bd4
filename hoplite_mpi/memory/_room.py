"""How much shared memory can be taken without waking the kernel's OOM killer.

A tmpfs may be mounted larger than the memory there is (some are as large as all of it), and its pages count for the
memory limit of a batch job: then its own limit comes too late, and the process, or a neighbour, is killed instead
of told.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

__all__ = ["room"]

#: bytes left to everybody else on the machine
_MARGIN = 64 << 20
_UNLIMITED = 1 << 60


def room(directory: str) -> tuple[int, str]:
    """Return the bytes that can be taken, and what sets the limit."""
    return min([_file_system(directory), _machine(), *_control_groups()])


def _file_system(directory: str) -> tuple[int, str]:
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize if status.f_blocks else _UNLIMITED
    return free, f"free in the file system of {directory}"


def _machine() -> tuple[int, str]:
    fields = _table("/proc/meminfo")
    available = (fields["MemAvailable:"] + fields["SwapFree:"]) * 1024
    return max(0, available - _MARGIN), "available in this machine's memory"


def _control_groups(root: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> Iterator[tuple[int, str]]:
    """Yield what each memory limit above this process leaves; reclaimable cache counts as free."""
    with open(own) as file:
        entries = [line.rstrip("\n").split(":", 2) for line in file]
    for _, controllers, path in entries:
        if controllers == "":
            base, limit, usage = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit, usage = f"{root}/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        while True:
            group = base + path.rstrip("/")
            try:
                most = _number(f"{group}/{limit}")
                if most < _UNLIMITED:
                    cache = _table(f"{group}/memory.stat").get("inactive_file", 0)
                    free = most - _number(f"{group}/{usage}") + cache - _MARGIN // 4
                    yield max(0, free), f"left by the memory limit of control group {path}"
            except (FileNotFoundError, PermissionError):
                pass  # the root group has no limit; in a container the path is not ours to see
            if path in ("", "/"):
                break
            path = os.path.dirname(path)


def _number(path: str) -> int:
    with open(path) as file:
        text = file.read().strip()
    return _UNLIMITED if text == "max" else int(text)


def _table(path: str) -> dict[str, int]:
    with open(path) as file:
        return {words[0]: int(words[1]) for words in map(str.split, file) if len(words) > 1 and words[1].isdigit()}
