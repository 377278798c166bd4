"""Compiles libraries that are preloaded into processes, to stand between them and a directory."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

__all__ = ["build", "compiler", "preloaded"]

_HERE = Path(__file__).parent


def compiler() -> str | None:
    """Return a C compiler, None if there is none."""
    return shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc")


def build(library: Path, sources: Iterable[Path]) -> Path:
    """Compile *sources*, with paths.c, into *library* and return it."""
    command = [compiler() or "cc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([*command, "-I", _HERE, "-o", library, _HERE / "paths.c", *sources, "-ldl"], check=True, timeout=60)
    return library


def preloaded(library: Path) -> str:
    """Return the value of LD_PRELOAD with *library* in it."""
    return " ".join(filter(None, [str(library), os.environ.get("LD_PRELOAD", "")]))
