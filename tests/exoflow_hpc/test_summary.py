"""What is printed of an output."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from exoflow_hpc import summary

__all__: list[str] = []


class Unprintable:
    def __repr__(self) -> str:
        raise ValueError("no")


def endless() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ({"a": np.float64(1.5), "b": (1, 2)}, {"a": 1.5, "b": [1, 2]}),
        (np.arange(3), "array([0, 1, 2])"),
        (float("nan"), "nan"),
        ([float("inf")], "[inf]"),
        (endless(), "[[...]]"),
        (Unprintable(), "<Unprintable: repr() of it raised ValueError>"),
    ],
)
def test_what_json_cannot_hold_is_given_as_its_repr(value: Any, wanted: Any) -> None:
    assert json.loads(json.dumps(summary.jsonable(value), allow_nan=False)) == wanted


def test_a_long_repr_is_cut_in_the_middle() -> None:
    text = summary.jsonable(b"x" * 1_000_000)
    assert len(text) < 2 * summary.MAX_REPR
    assert text.startswith("b'xxx")
    assert text.endswith("xxx'")
