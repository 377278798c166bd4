"""Checksums of outputs: BLAKE2b for small ones, a tree with a faster hash at its leaves for large ones.

BLAKE2b runs at about 1 GB/s in one thread, which is less than a disk writes. So an output of more than `LEAF` bytes is
cut into its parts (an array is one part; a container's are its header, pickle and buffers), and each part into leaves of
`LEAF` bytes, several threads at a time::

    leaf = H(its length, sum of a[i] * word[i], sum of b[i] * (word[i] >> 32), the bytes after the last word)
    part = H(its length, its leaves)        checksum = "tree-" + H(meta, its parts)

H is BLAKE2b with 16 bytes of digest and another personalisation on each level; a leaf of up to 4 KiB is H of its bytes.
Words are 64 bits, little-endian, the sums modulo 2**64. This is multilinear hashing (Carter and Wegman 1981; Lemire and
Kaser 2014) with fixed odd keys a and b: a change within one word is always noticed, and any other change goes unnoticed with
a probability of 2**-64 or less, at the very worst (nothing but highest bits are flipped) 2**-33 for each leaf. It is no
protection against somebody who means to forge data: whoever can write the files can write the journal as well.

What lies between the parts of a container is always zero and takes no part. The digests of the leaves also tell whether a
part is the same as an earlier one.
"""

from __future__ import annotations

import functools
import hashlib
import os
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import numpy as np

__all__ = ["CONTINUED", "LEAF", "THREADS", "TREE", "Tree", "linear", "tree"]

#: bytes of a leaf, and of the largest output whose checksum is made in one go
LEAF = 1 << 19
#: what the checksum of a large output begins with; those without it were made in one go, as older versions did for all
TREE = "tree-"
#: what tells the output of a task that continues begins with; then comes the fingerprint of what it continues with
CONTINUED = "continued-"
#: that compute one checksum
THREADS = min(4, len(os.sched_getaffinity(0)))
#: bytes that are computed at a time
_BATCH = 8 << 20
#: bytes of the largest leaf that is hashed by BLAKE2b itself
_SMALL = 4096
_WORD = np.dtype("<u8")


def _digest(level: bytes, *data: bytes | memoryview) -> bytes:
    digest = hashlib.blake2b(digest_size=16, person=b"exoflow " + level)
    for part in data:
        digest.update(part)
    return digest.digest()


def are_comparable(one: str, other: str) -> bool:
    """Whether equal outputs have equal checksums: both are of one form. Older versions used one form for all sizes."""
    if one.startswith(CONTINUED) or other.startswith(CONTINUED):
        return True
    return one.startswith(TREE) == other.startswith(TREE)


def linear(meta: bytes, view: memoryview) -> str:
    """Return the checksum of a small output. Lets other threads run meanwhile."""
    digest = hashlib.blake2b(meta, digest_size=16)
    digest.update(view)
    return digest.hexdigest()


def tree(meta: bytes, view: memoryview, parts: Sequence[tuple[int, int]]) -> str:
    """Return the checksum of a large output with these parts, (offset, bytes) each; uses several threads."""
    with ThreadPoolExecutor(THREADS) as pool:
        return Tree(meta, view, parts, pool).result()


class Tree:
    """The checksum of one output while it is computed by *pool*. *view* may not change until the result is there."""

    def __init__(self, meta: bytes, view: memoryview, parts: Sequence[tuple[int, int]], pool: Executor) -> None:
        self._meta = meta
        self._lengths = [nbytes for _, nbytes in parts]
        #: (batch, place in it) of each leaf, by part
        self._places: list[list[tuple[int, int]]] = []
        self._batches: list[Future[list[bytes]]] = []
        batch: list[tuple[int, int]] = []
        pending = 0
        for offset, nbytes in parts:
            places = []
            for start in range(offset, offset + nbytes, LEAF):
                end = min(start + LEAF, offset + nbytes)
                places.append((len(self._batches), len(batch)))
                batch.append((start, end))
                pending += end - start
                if pending >= _BATCH:
                    self._batches.append(pool.submit(_leaves, view, batch))
                    batch, pending = [], 0
            self._places.append(places)
        if batch:
            self._batches.append(pool.submit(_leaves, view, batch))

    def leaves(self, part: int) -> Iterator[bytes]:
        """Give the digests of a part's leaves, in order, each as soon as it is there; blocks."""
        for batch, place in self._places[part]:
            yield self._batches[batch].result()[place]

    def result(self) -> str:
        """Return the checksum; blocks."""
        parts = [
            _digest(b"part", struct.pack("<Q", nbytes), *self.leaves(index))
            for index, nbytes in enumerate(self._lengths)
        ]
        return TREE + _digest(b"output", struct.pack("<Q", len(self._meta)), self._meta, *parts).hex()


def _leaves(view: memoryview, ranges: list[tuple[int, int]]) -> list[bytes]:
    scratch = np.empty(LEAF // 8, _WORD)
    return [_leaf(view[start:end], scratch) for start, end in ranges]


def _leaf(view: memoryview, scratch: np.ndarray[Any, Any]) -> bytes:
    if len(view) <= _SMALL:
        return _digest(b"leaf", view)
    first, second = _keys()
    count = len(view) // 8
    words = np.frombuffer(view, _WORD, count)
    low = np.dot(words, first[:count])  # these let other threads run
    high = np.dot(np.right_shift(words, 32, out=scratch[:count]), second[:count])
    return _digest(b"sums", struct.pack("<QQQ", len(view), int(low), int(high)), view[count * 8 :])


@functools.cache
def _keys() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the keys: the same for ever, as checksums are compared with those of other runs."""
    keys = np.frombuffer(hashlib.shake_128(b"exoflow_hpc keys of leaves").digest(2 * LEAF), _WORD) | np.uint64(1)
    return keys[: LEAF // 8], keys[LEAF // 8 :]
