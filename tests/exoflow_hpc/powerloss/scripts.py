"""Scripts that change a storage and say in the log what they were told is durable."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.exoflow_hpc.durability import ROOT

from .preload import Power

__all__ = ["run_script"]

#: `note` says what must be true from here on, whatever happens
_PREAMBLE = """
import ctypes, sys
from pathlib import Path
disk = Path(sys.argv[1])
def note(*words):
    ctypes.CDLL(None).powerloss_note(" ".join(map(str, words)).encode())
"""


def run_script(
    power: Power, code: str, *, call: int = 0, mode: str = "power", expected: int | None = 0
) -> subprocess.CompletedProcess[str]:
    """Run *code* on the disk; AssertionError if it doesn't end with the code *expected* (None: any)."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HOPLITE_", "EXOFLOW_"))}
    environment.update(power.environment("other", call, mode), PYTHONPATH=str(ROOT))
    command = [sys.executable, "-c", _PREAMBLE + code, str(power.root)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert expected is None or done.returncode == expected, f"ended with {done.returncode}\n{done.stdout}{done.stderr}"
    return done
