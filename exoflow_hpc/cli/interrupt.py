"""SIGINT and SIGTERM of the command line: the run stops, and what was committed stays."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

__all__ = ["Interrupted", "interruptible"]


class Interrupted(BaseException):
    """A signal asked the run to stop. No `Exception`: nothing on the way may take it for a failure of its own."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into `Interrupted`. For the main thread."""

    def interrupt(number: int, frame: Any) -> None:
        for other in before:  # the first one counts: a second must not disturb what is being put in order
            signal.signal(other, signal.SIG_IGN)
        raise Interrupted(signal.Signals(number).name)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
