"""Skips what this machine can't do, and says so."""

from __future__ import annotations

import os
import shutil

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = [tool for tool in ("ip", "tc", "unshare", "nsenter") if shutil.which(tool) is None]
    if os.geteuid() != 0:
        missing.insert(0, "root")
    if missing:
        skip = pytest.mark.skip(reason=f"emulated hosts need {', '.join(missing)}")
        for item in items:
            if item.get_closest_marker("hosts"):
                item.add_marker(skip)
