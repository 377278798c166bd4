"""Helpers of the durability tests: processes that die at a named point, and a disk that is full."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

__all__ = ["ROOT", "full_disk_only", "run_python", "run_until_killed"]

ROOT = Path(__file__).parents[2]


def run_python(code: str, *args: object, fault: str = "", timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run *code* in a new interpreter in a process of its own; sys.argv[1:] are *args*."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HOPLITE_FAULT": fault}
    for name in ("HOPLITE_RANK", "HOPLITE_INCARNATION"):
        env.pop(name, None)
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)


def run_until_killed(code: str, *args: object, fault: str) -> str:
    """Run *code*, which has to be killed at the fault point, and return what it had printed."""
    done = run_python(code, *args, fault=fault)
    assert done.returncode == -signal.SIGKILL, (
        f"{fault} didn't kill: rc {done.returncode}\n{done.stdout}\n{done.stderr}"
    )
    return done.stdout


def _can_mount() -> bool:
    return (
        os.geteuid() == 0
        and subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0
    )


full_disk_only = pytest.mark.skipif(
    not _can_mount(), reason="needs root and unshare -m for a small file system of its own"
)


def run_on_small_disk(code: str, where: Path, size: str, *args: object) -> subprocess.CompletedProcess[str]:
    """Run *code* with a tmpfs of *size* mounted at *where*, for it alone."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HOPLITE_FAULT": ""}
    script = f'mount -t tmpfs -o size={size} tmpfs "{where}" && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", script, "sh", sys.executable, "-c", code, str(where), *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
