"""Reductions in rotated stripes, which use all links evenly: a chain for each rank, rooted there, over its part of the array.

2(n-1)/n · S/B for an allreduce of S bytes over n ranks with links of B bytes per second: the bound. All stripes have to be of the same
ranks; if one of them dies in the middle, the whole is reduced once more, in one tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hoplite_mpi.collectives.call import Call, Op
from hoplite_mpi.collectives.rounds import Process
from hoplite_mpi.errors import GetTimeoutError
from hoplite_mpi.ids import ObjectID

__all__ = ["agree", "all_of", "own_of"]

#: with fewer ranks one chain is as good
_MIN_RANKS = 3

_STRIPED, _WHOLE = b"striped", b"whole"


def agree(call: Call, patient: bool) -> list[Process] | None:
    """Return who takes part, the same on all ranks, if the array is to be reduced in stripes; None: in one tree.

    patient: wait for all, however long they take, since the order of the additions may not depend on it.
    """
    roll = call.roll_call()
    if not patient:
        left = call.left()
        try:
            roll.result(call.config.stripe_patience if left is None else min(left, call.config.stripe_patience))
            choice = _STRIPED
        except GetTimeoutError:
            choice = _WHOLE
        if call.decide("mode", choice) == _WHOLE:
            return None
    present = call.present(roll)
    return present if len(present) >= _MIN_RANKS else None


def all_of(call: Call, present: Sequence[Process], flat: np.ndarray[Any, Any], op: Op, out: Any) -> Any:
    """Return the reduction of all arrays, one-dimensional; None if not all stripes are of all who are present. Fills *out*."""
    blocks = np.array_split(flat, len(present))
    rids = _begin(call, present, blocks, op)
    futures = [call.begin_result(rid) for rid in rids]
    found = [call.wait(future) for future in futures]
    if not _complete(call, present, rids):
        return None
    target = np.empty_like(flat) if out is None else out.reshape(-1)
    start = 0
    for block in found:
        target[start : start + block.size] = block
        start += block.size
    if out is not None and not np.shares_memory(target, out):  # reshape had to copy
        np.copyto(out, target.reshape(out.shape))
    return target


def own_of(call: Call, present: Sequence[Process], array: np.ndarray[Any, Any], op: Op) -> Any:
    """Return this rank's block, along the first axis, of the reduction of all arrays; None as in `all_of`."""
    rids = _begin(call, present, np.array_split(array, len(present)), op)
    block = call.wait(call.begin_result(rids[list(present).index(call.me)]))
    return block if _complete(call, present, rids) else None


def _begin(call: Call, present: Sequence[Process], blocks: Sequence[Any], op: Op) -> list[ObjectID]:
    """Put this rank's blocks and ask for the reduction of each, rooted at the rank of its number."""
    rids = []
    for number, block in enumerate(blocks):
        call.put(f"block {number}", block)
        order = [*present[number + 1 :], *present[: number + 1]]
        rids.append(call.reduce(f"stripe {number}", f"block {number}", op, True, "chain", order))
    return rids


def _complete(call: Call, present: Sequence[Process], rids: Sequence[ObjectID]) -> bool:
    """Whether all stripes are of all who were present: each stripe's version is the only one, so all ranks find the same."""
    return all(call.sources(rid) == list(present) for rid in rids)
