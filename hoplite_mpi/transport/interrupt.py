"""Ctrl-C and the engine."""

from __future__ import annotations

import signal
import threading
from types import FrameType

__all__ = ["InterruptGuard"]


class InterruptGuard:
    """Keeps Ctrl-C out of the engine while the main thread drives it: a KeyboardInterrupt in the middle of a step would tear its state."""

    def __init__(self) -> None:
        #: the main thread drives the engine now
        self.driving = False
        self.pending = False
        main = threading.current_thread() is threading.main_thread()
        self._installed = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._installed:
            signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.driving:
            self.pending = True
        else:
            signal.default_int_handler(number, frame)

    def leave(self) -> None:
        """End driving; raises the KeyboardInterrupt that came meanwhile."""
        self.driving = False
        if self.pending:
            self.pending = False
            raise KeyboardInterrupt

    def remove(self) -> None:
        """Give the signal back, if it still is ours to give."""
        if self._installed and threading.current_thread() is threading.main_thread():
            self._installed = False
            if signal.getsignal(signal.SIGINT) == self._handle:
                signal.signal(signal.SIGINT, signal.default_int_handler)
