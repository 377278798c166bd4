"""Tests of the progress line."""

from __future__ import annotations

import io

import pytest

from exoflow_hpc.rank.progress import ProgressLine, bytes_text

__all__: list[str] = []


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e6, "2.5 MB"), (3e9, "3.0 GB"), (4e15, "4000.0 TB")],
)
def test_bytes_text(count: float, text: str) -> None:
    assert bytes_text(count) == text


def test_lines_of_a_file() -> None:
    stream = io.StringIO()
    line = ProgressLine("w", terminal=False, stream=stream)
    line.update(total=4, committed=0, started=1, rerun=0)
    line.update(total=4, committed=1, started=2, rerun=0)  # too soon after the one before
    line.add_bytes(2_000_000)
    line.task("fit", 0.5, "epoch 3")
    line.update(total=4, committed=4, started=4, rerun=2)
    line.finish("SUCCESSFUL")
    first, last, end = stream.getvalue().splitlines()
    assert "0/4 tasks committed, 1 started" in first
    assert "4/4 tasks committed, 4 started, 2.0 MB saved" in last
    assert "2 run again, fit 50% epoch 3" in last
    assert end.startswith("[w ")
    assert end.endswith("] SUCCESSFUL")


def test_line_of_a_terminal_is_written_over() -> None:
    stream = io.StringIO()
    line = ProgressLine("w", terminal=True, stream=stream)
    line.update(total=4, committed=0, started=1, rerun=0)
    assert "\n" not in stream.getvalue()
    line.say("lost rank 1")
    assert stream.getvalue().count("\r\033[K") == 1
    assert stream.getvalue().endswith("] lost rank 1\n")


def test_quiet() -> None:
    stream = io.StringIO()
    line = ProgressLine("w", terminal=True, quiet=True, stream=stream)
    line.update(total=4, committed=0, started=1, rerun=0)
    line.say("lost rank 1")
    line.finish("FAILED")
    assert stream.getvalue() == ""
