"""The list of fault points and the code agree."""

from __future__ import annotations

import re
from pathlib import Path

import hoplite_mpi
from hoplite_mpi import passing
from hoplite_mpi.testing import POINTS

_SOURCES = Path(hoplite_mpi.__file__).parent


def _named_in_the_code() -> set[str]:
    names: set[str] = set()
    for path in _SOURCES.rglob("*.py"):
        if path.parent.name == "testing":
            continue
        for call in re.findall(r"fault\.point\((.*)\)", path.read_text()):
            if call.startswith('f"reduce.'):
                names |= {f"reduce.{part}_started" for part in ("root", "inner", "leaf")}
            else:
                names |= set(re.findall(r'"([\w.]+)"', call))
    for name, table in vars(passing).items():
        if re.fullmatch("_[A-Z_]+", name):
            names |= set(table.values())
    return names


def test_every_point_is_listed_and_every_listed_one_is_there() -> None:
    assert _named_in_the_code() == set(POINTS)


def test_every_point_says_who_and_where() -> None:
    assert all(point.role and point.text for point in POINTS.values())
