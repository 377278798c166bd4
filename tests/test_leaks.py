"""The check for leaks has to find what it looks for."""

from __future__ import annotations

import importlib.util
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("leaks", Path(__file__).with_name("leaks.py"))
assert _spec is not None
assert _spec.loader is not None
leaks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(leaks)


def test_a_process_left_behind_is_found_and_can_be_killed() -> None:
    mark = secrets.token_hex(8)
    child = subprocess.Popen(
        [sys.executable, "-c", "print('up', flush=True); input()"],
        env={**os.environ, leaks.MARK: mark},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    with child:
        assert child.stdout is not None
        child.stdout.readline()
        assert any(f"process {child.pid}:" in line for line in leaks.find_leaks(leaks.snapshot(), mark, patience=0))
        leaks.kill_marked(mark)
        assert child.wait(timeout=10) == -9
    assert leaks.find_leaks(leaks.snapshot(), mark, patience=0) == []


def test_a_segment_is_a_leak_only_when_nobody_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(f"/dev/shm/mpich_shm_test{secrets.token_hex(4)}")
    monkeypatch.setattr(leaks, "snapshot", lambda: {path})
    try:
        with open(path, "w"):
            assert leaks.find_leaks(set(), "none", patience=0) == []
        assert leaks.find_leaks(set(), "none", patience=0) == [str(path)]
        assert leaks.find_leaks({path}, "none", patience=0) == []
    finally:
        path.unlink()
