"""A disk, and the power of what runs on it; a storage that is far away."""

from __future__ import annotations

from pathlib import Path

import pytest

from .farstorage import preload as far
from .powerloss import preload as powerloss
from .powerloss.preload import Power
from .preloading.build import build, compiler

__all__: list[str] = []


def _build(directory: Path, name: str, sources: list[Path]) -> Path:
    if compiler() is None:
        pytest.skip("needs a C compiler (cc) for the preloaded library")
    return build(directory / name, sources)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the preloaded library that takes the power away."""
    return _build(tmp_path_factory.mktemp("powerloss"), "powerloss.so", powerloss.SOURCES)


@pytest.fixture
def power(library: Path, tmp_path: Path) -> Power:
    """Return the power of an empty disk."""
    (tmp_path / "disk").mkdir()
    return Power(library, tmp_path / "disk", tmp_path)


@pytest.fixture(scope="session")
def far_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the preloaded library that makes a directory a far storage."""
    return _build(tmp_path_factory.mktemp("farstorage"), "farstorage.so", far.SOURCES)
