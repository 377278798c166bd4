"""Checksums of outputs: they never change, and notice what changes."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest

from exoflow_hpc import checksums, serialize
from exoflow_hpc.checksums import LEAF, TREE

ARRAY = np.arange(3 * LEAF // 8 + 1000, dtype=np.uint64)


def checksum(value: object) -> str:
    plan = serialize.pack(value)
    return serialize.checksum(plan.meta, plan.to_bytes())


def test_small_outputs_have_the_checksum_that_they_always_had() -> None:
    array = np.zeros(LEAF, np.uint8)
    meta = serialize.pack(array).meta
    old = hashlib.blake2b(serialize.msgpack.packb(meta.to_wire()) + bytes(LEAF), digest_size=16).hexdigest()
    assert serialize.checksum(meta, array.data) == old


def test_large_outputs_of_older_versions_are_checked_as_they_were_made() -> None:
    meta, data = serialize.pack(ARRAY).meta, ARRAY.tobytes()
    old = hashlib.blake2b(serialize.msgpack.packb(meta.to_wire()) + data, digest_size=16).hexdigest()
    assert serialize.checksum(meta, data, like=old) == old
    assert serialize.checksum(meta, data, like=checksum(ARRAY)) == checksum(ARRAY) != old


def test_definition() -> None:
    """As the module says it, word for word: what is stored must be readable for ever."""

    def h(level: bytes, data: bytes) -> bytes:
        return hashlib.blake2b(data, digest_size=16, person=b"exoflow " + level).digest()

    keys = np.frombuffer(hashlib.shake_128(b"exoflow_hpc keys of leaves").digest(2 * LEAF), "<u8").tolist()
    data = ARRAY.tobytes() + b"rest"
    parts = [(0, 100), (128, len(data) - 128)]
    digests = b""
    for offset, nbytes in parts:
        leaves = b""
        for start in range(offset, offset + nbytes, LEAF):
            leaf = data[start : min(start + LEAF, offset + nbytes)]
            if len(leaf) <= 4096:
                leaves += h(b"leaf", leaf)
                continue
            words = np.frombuffer(leaf, "<u8", len(leaf) // 8).tolist()
            low = sum((keys[i] | 1) * word for i, word in enumerate(words)) % 2**64
            high = sum((keys[LEAF // 8 + i] | 1) * (word >> 32) for i, word in enumerate(words)) % 2**64
            leaves += h(b"sums", struct.pack("<QQQ", len(leaf), low, high) + leaf[len(words) * 8 :])
        digests += h(b"part", struct.pack("<Q", nbytes) + leaves)
    whole = h(b"output", struct.pack("<Q", 4) + b"meta" + digests)
    found = checksums.tree(b"meta", memoryview(data), parts)
    assert found == TREE + whole.hex() == "tree-c6ed8a1c0c66c25c69f24ff04a32117c"


def test_every_bit_of_a_word_and_every_place_counts() -> None:
    whole = checksum(ARRAY)
    assert whole.startswith(TREE)
    seen = {whole}
    for place in (0, 1, LEAF // 8 - 1, LEAF // 8, len(ARRAY) - 1):
        for bit in range(64):
            other = ARRAY.copy()
            other[place] ^= np.uint64(1 << bit)
            seen.add(checksum(other))
    assert len(seen) == 1 + 5 * 64


@pytest.mark.parametrize(
    "change",
    [
        lambda a: -a,
        lambda a: a[::-1].copy(),
        lambda a: np.roll(a, 1),
        lambda a: np.where(np.arange(len(a)) % 2, a, -a),
        lambda a: np.where(np.arange(len(a)) // 512 == 3, 0.0, a),
        lambda a: np.concatenate([a[LEAF // 8 :], a[: LEAF // 8]]),
        lambda a: a.astype(">f8"),
        lambda a: a.reshape(2, -1),
        lambda a: a[:-1],
        lambda a: a + 0.0 * np.where(np.arange(len(a)) == 7, np.nan, 0.0),
    ],
)
def test_what_programs_do_to_arrays_is_noticed(change: object) -> None:
    array = np.random.default_rng(1).standard_normal(2 * LEAF // 8)
    assert checksum(change(array)) != checksum(array)  # type: ignore[operator]


def test_containers_are_hashed_by_their_parts() -> None:
    def state(**changes: object) -> dict[str, object]:
        return {"a": np.zeros(LEAF), "b": np.ones(LEAF // 4), "step": 1, **changes}

    whole = checksum(state())
    assert whole == checksum(state())
    assert whole.startswith(TREE)
    others = [state(step=2), state(b=np.zeros(LEAF // 4)), state(a=np.ones(LEAF)), {**state(), "c": 1}]
    assert len({whole, *map(checksum, others)}) == 5
