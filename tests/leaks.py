"""What the suite must not leave on this machine. Compares with a snapshot, and spares what live processes still use."""

from __future__ import annotations

import fcntl
import os
import signal
import tempfile
import time
from pathlib import Path

__all__ = ["MARK", "find_leaks", "kill_marked", "marked_processes", "snapshot"]

#: environment variable that marks every process of the suite, its grandchildren too
MARK = "EXOFLOW_TEST_SUITE"


def snapshot() -> set[Path]:
    """Return everything on this machine of the kinds that the suite makes."""
    patterns = {
        Path("/dev/shm"): ("hoplite-*", "mpich_shm_*", "sm_segment.*"),
        Path("/run/netns"): ("*",),
        Path(tempfile.gettempdir()): ("hoplite-*", "ompi.*", "prte.*"),
    }
    return {path for parent, globs in patterns.items() for glob in globs for path in parent.glob(glob)}


def find_leaks(before: set[Path], mark: str, patience: float = 5.0) -> list[str]:
    """Return a line for each new process, new file and new namespace without a live user; waits *patience* s."""
    end = time.monotonic() + patience
    while True:
        processes = [f"process {pid}: {_command(pid)}" for pid in marked_processes(mark)]
        new = snapshot() - before
        leaks = processes + [str(path) for path in sorted(new - _in_use(new))]
        if not leaks or time.monotonic() > end:  # what is just ending gets the time for it
            return leaks
        time.sleep(0.1)


def marked_processes(mark: str) -> list[int]:
    """Return the live processes, but for this one, whose environment has the mark."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:  # gone, or another user's
                continue
    return found


def kill_marked(mark: str) -> None:
    """Kill every process of the suite."""
    for pid in marked_processes(mark):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
    except OSError:
        return "(gone)"


def _in_use(paths: set[Path]) -> set[Path]:
    """Return those that a live process has open or mapped, itself or something in it: another run's on this machine."""
    used: set[Path] = {path for path in paths if _is_locked(path / "launcher.lock")}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            names = _files_of(entry)
            used |= {path for path in paths for name in names if name == str(path) or name.startswith(f"{path}/")}
    return used


def _files_of(process: Path) -> list[str]:
    """Return what the process has open or mapped; first open, then mapped, as MPICH goes from the one to the other."""
    names = []
    try:
        for number in os.listdir(process / "fd"):
            try:
                names.append(os.readlink(process / "fd" / number))
            except OSError:  # closed meanwhile
                continue
        names += [line.split(maxsplit=5)[-1] for line in (process / "maps").read_text().splitlines()]
    except OSError:  # gone, or one that does not let us look
        return names
    return names


def _is_locked(path: Path) -> bool:
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return False
