"""The standard streams of a command, whatever the caller has made of them."""

from __future__ import annotations

import os
import sys

from exoflow_hpc.errors import ExoFlowError

__all__ = ["put", "repair"]


def repair() -> None:
    """Open the null device for each standard stream that is closed, and have stdout take any text."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:  # else the next file that is opened, a journal say, would be taken for it
            _to_null(number)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
    # an output may hold what the terminal's encoding, or any, can't say
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def put(text: str) -> None:
    """Print a result. Nothing happens if whoever read it has gone; ExoFlowError if it can't be written."""
    try:
        print(text, flush=True)
    except OSError as error:
        _to_null(sys.stdout.fileno())  # what is still in its buffer must not fail again at exit
        if not isinstance(error, BrokenPipeError):
            raise ExoFlowError(f"the result can't be written to stdout: {error.strerror}") from None


def _to_null(number: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null == number:
        os.set_inheritable(null, True)
    else:
        os.dup2(null, number)
        os.close(null)
