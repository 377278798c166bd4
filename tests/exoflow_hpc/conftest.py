"""A disk, and the power of what runs on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from .powerloss.preload import Power, build, compiler

__all__: list[str] = []


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the preloaded library."""
    if compiler() is None:
        pytest.skip("needs a C compiler (cc) for the preloaded library")
    return build(tmp_path_factory.mktemp("powerloss"))


@pytest.fixture
def power(library: Path, tmp_path: Path) -> Power:
    """Return the power of an empty disk."""
    (tmp_path / "disk").mkdir()
    return Power(library, tmp_path / "disk", tmp_path)
