"""Progress of a run on the terminal: one line that is written over, or a line now and then where there is no terminal."""

from __future__ import annotations

import sys
import time
from typing import TextIO

__all__ = ["ProgressLine", "bytes_text"]

#: seconds between two lines
_PERIOD_TERMINAL, _PERIOD_FILE = 0.1, 2.0


def bytes_text(count: float) -> str:
    """Return a number of bytes for people: ``"1.5 MB"``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


class ProgressLine:
    """Says how far a workflow is, on stderr. *quiet*: says nothing at all."""

    def __init__(self, workflow_id: str, *, terminal: bool, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._id = workflow_id
        self._terminal = terminal
        self._quiet = quiet
        self._stream = stream or sys.stderr
        self._began = time.monotonic()
        self._next = 0.0
        self._counts = (0, 0, 0, 0)
        self._shown: tuple[int, ...] = ()
        self._bytes = 0
        self._task = ""
        self._open_line = False

    def say(self, text: str) -> None:
        """Write a line that stays."""
        if not self._quiet:
            self._clear()
            print(f"{self._prefix()} {text}", file=self._stream, flush=True)

    @property
    def is_due(self) -> bool:
        """Whether counts that are given now would be shown."""
        return time.monotonic() >= self._next

    def update(self, *, total: int, committed: int, started: int, rerun: int) -> None:
        """Take new counts and show them, but not too often."""
        self._counts = (committed, total, started, rerun)
        now = time.monotonic()
        if now >= self._next and self._counts != self._shown:
            self._next = now + (_PERIOD_TERMINAL if self._terminal else _PERIOD_FILE)
            self._show()

    def add_bytes(self, count: int) -> None:
        """Count bytes that were committed."""
        self._bytes += count

    def task(self, name: str, fraction: float, text: str) -> None:
        """Take what a running task says of itself."""
        self._task = f"{name} {fraction:.0%}{' ' + text if text else ''}"

    def finish(self, status: str) -> None:
        """Show the last counts."""
        self._show()
        self.say(status)

    def _prefix(self) -> str:
        return f"[{self._id} {time.monotonic() - self._began:6.1f} s]"

    def _show(self) -> None:
        if self._quiet:
            return
        self._shown = self._counts
        committed, total, started, rerun = self._counts
        rate = self._bytes / max(1e-9, time.monotonic() - self._began)
        text = f"{committed}/{total} tasks committed, {started} started, {bytes_text(self._bytes)} saved ({bytes_text(rate)}/s)"
        if rerun:
            text += f", {rerun} run again"
        if self._task:
            text += f", {self._task}"
        self._clear()
        print(f"{self._prefix()} {text}", end="" if self._terminal else "\n", file=self._stream, flush=True)
        self._open_line = self._terminal

    def _clear(self) -> None:
        if self._open_line:
            print("\r\033[K", end="", file=self._stream)
            self._open_line = False
