"""Pickles by value, as cloudpickle makes them, of code that keeps the name of its file.

cloudpickle 3.1.3 and later call every file "<dynamic-code>": then no traceback of a task shows the user where it went wrong.
"""

from __future__ import annotations

import io
import pickle
import types
from collections import ChainMap
from collections.abc import Callable
from typing import Any, ClassVar

import cloudpickle

__all__ = ["PROTOCOL", "Pickler", "dumps"]

#: fixed, so that every Python >= 3.8 reads it and out-of-band buffers stay possible
PROTOCOL = 5


def _reduce_code(code: types.CodeType) -> tuple[Any, ...]:
    _, args, *_ = cloudpickle.Pickler.dispatch_table[types.CodeType](code)
    return _make_code, (args, code.co_filename)


def _make_code(args: tuple[Any, ...], filename: str) -> types.CodeType:
    return types.CodeType(*args).replace(co_filename=filename)


class Pickler(cloudpickle.Pickler):
    """cloudpickle's, but for the names of files."""

    dispatch_table: ClassVar[ChainMap[type, Any]] = ChainMap(
        {types.CodeType: _reduce_code}, cloudpickle.Pickler.dispatch_table
    )


def dumps(value: Any, buffer_callback: Callable[[pickle.PickleBuffer], Any] | None = None) -> bytes:
    """Return the pickle of *value*; whatever its pickling raises, it raises."""
    file = io.BytesIO()
    Pickler(file, protocol=PROTOCOL, buffer_callback=buffer_callback).dump(value)
    return file.getvalue()
