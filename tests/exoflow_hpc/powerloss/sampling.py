"""Which of the crashes a run of the tests tries: a sample, or all of them."""

from __future__ import annotations

import os
import random
import secrets
from collections.abc import Sequence
from typing import TypeVar

__all__ = ["ALL", "sample"]

T = TypeVar("T")

#: ``make powerloss`` sets it: every call in turn, some minutes, instead of a sample
ALL = os.environ.get("POWERLOSS_ALL", "0") != "0"
_SEED = os.environ.get("POWERLOSS_SEED") or str(secrets.randbelow(10**6))


def sample(cases: Sequence[T], size: int) -> list[T]:
    """Return *size* of *cases*, or all; prints the seed, by which POWERLOSS_SEED has the same ones again."""
    if ALL or len(cases) <= size:
        return list(cases)
    print(f"{size} of {len(cases)} cases; POWERLOSS_SEED={_SEED} takes the same, POWERLOSS_ALL=1 all")
    return sorted(random.Random(_SEED).sample(cases, size))
