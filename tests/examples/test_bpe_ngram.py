"""The example's functions against naive references, and what its result may and may not depend on."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

__all__: list[str] = []

SIZE = 257 + 12
#: few different bytes, so that pairs repeat and runs overlap
files_of_bytes = st.lists(st.binary(max_size=40).map(lambda b: bytes(x % 4 for x in b)), min_size=1, max_size=5)


def to_tokens(texts: list[bytes]) -> np.ndarray[Any, Any]:
    return np.array([256] + [t for text in texts for t in [*text, 256]], np.uint16)


def naive_pairs(tokens: list[int]) -> Counter[tuple[int, int]]:
    return Counter(itertools.pairwise(tokens))


def naive_merge(tokens: list[int], rules: dict[tuple[int, int], int]) -> list[int]:
    out, i = [], 0
    while i < len(tokens):
        made = rules.get((tokens[i], tokens[i + 1])) if i + 1 < len(tokens) else None
        out.append(tokens[i] if made is None else made)
        i += 1 if made is None else 2
    return out


def naive_learn(tokens: list[int], rounds: int, quota: int) -> tuple[list[tuple[int, int, int]], list[int]]:
    """Return the vocabulary's rows and the encoded tokens."""
    rows: list[tuple[int, int, int]] = []
    for number in range(rounds):
        counts = naive_pairs(tokens)
        chosen: list[tuple[int, int]] = []
        for pair in sorted(counts, key=lambda p: (-counts[p], p)):
            clash = any(pair[0] == right or pair[1] == left for left, right in chosen)
            if len(chosen) < quota and counts[pair] >= 2 and 256 not in pair and not clash:
                chosen.append(pair)
        rules = {pair: 257 + len(rows) + i for i, pair in enumerate(chosen)}
        rows += [(left, right, number) for left, right in chosen]
        tokens = naive_merge(tokens, rules)
    return rows, tokens


def learn(example: Any, tokens: np.ndarray[Any, Any], rounds: int, quota: int) -> np.ndarray[Any, Any]:
    vocabulary = np.zeros((0, 3), np.int32)
    for number in range(rounds):
        vocabulary = example.learn(example.count_pairs(tokens, SIZE), vocabulary, quota, number)
        tokens = example.merge(tokens, vocabulary, number, SIZE)
    return vocabulary


@given(files_of_bytes)
def test_count_pairs_naive(example: Any, texts: list[bytes]) -> None:
    tokens = to_tokens(texts)
    counts = example.count_pairs(tokens, SIZE)
    assert counts.dtype == np.int64
    assert counts.shape == (SIZE, SIZE)
    assert {(int(a), int(b)): int(counts[a, b]) for a, b in np.argwhere(counts)} == naive_pairs(tokens.tolist())


@given(files_of_bytes, st.integers(1, 4), st.integers(1, 3))
def test_learn_and_encode_naive(example: Any, texts: list[bytes], rounds: int, quota: int) -> None:
    tokens = to_tokens(texts)
    rows, encoded = naive_learn(tokens.tolist(), rounds, quota)
    vocabulary = learn(example, tokens, rounds, quota)
    assert [tuple(row) for row in vocabulary.tolist()] == rows
    assert example.encode(tokens, vocabulary, rounds, SIZE).tolist() == encoded


@given(files_of_bytes, files_of_bytes, st.integers(1, 4), st.integers(1, 3))
def test_decode_gives_the_text_back(
    example: Any, learned_from: list[bytes], texts: list[bytes], rounds: int, quota: int
) -> None:
    vocabulary = learn(example, to_tokens(learned_from), rounds, quota)
    encoded = example.encode(to_tokens(texts), vocabulary, rounds, SIZE).tolist()
    words = example.token_bytes(vocabulary)
    ends = [i for i, token in enumerate(encoded) if token == 256]
    decoded = [b"".join(words[t] for t in encoded[a:b]) for a, b in itertools.pairwise(ends)]
    assert decoded == texts


def test_merge_of_runs(example: Any) -> None:
    """Pairs that overlap are taken from the left: aaaaa is (aa)(aa)a."""
    vocabulary = np.array([[7, 7, 0]], np.int32)
    tokens = np.array([256, 7, 7, 7, 7, 7, 256, 7, 7, 7, 256], np.uint16)
    assert example.merge(tokens, vocabulary, 0, SIZE).tolist() == [256, 257, 257, 7, 256, 257, 7, 256]


def test_inputs_are_not_changed(example: Any) -> None:
    """Objects are immutable: each function has to work on read-only arrays."""
    tokens = to_tokens([b"abababab", b"aab"])
    counts = example.count_pairs(tokens, SIZE)
    for array in (tokens, counts):
        array.setflags(write=False)
    vocabulary = example.learn(counts, np.zeros((0, 3), np.int32), 2, 0)
    vocabulary.setflags(write=False)
    assert len(example.merge(tokens, vocabulary, 0, SIZE)) < len(tokens)
    contexts = example.choose_contexts(counts)
    contexts.setflags(write=False)
    trigrams = example.count_trigrams(tokens, contexts, SIZE)
    trigrams.setflags(write=False)
    example.probabilities(counts, trigrams, contexts)


@given(files_of_bytes, st.integers(0, 6))
def test_count_trigrams_naive(example: Any, texts: list[bytes], known: int) -> None:
    tokens = to_tokens(texts)
    contexts = example.choose_contexts(example.count_pairs(tokens, SIZE))[:known]
    rows = {tuple(divmod(int(code), SIZE)): i for i, code in enumerate(contexts)}
    expected: Counter[tuple[int, int]] = Counter()
    for text in texts:
        history = [256, *text, 256]
        for i in range(1, len(history)):
            row = rows.get((history[i - 2], history[i - 1])) if i >= 2 else None
            expected[example.CONTEXTS + history[i - 1] if row is None else row, history[i]] += 1
    counts = example.count_trigrams(tokens, contexts, SIZE)
    assert {(int(a), int(b)): int(counts[a, b]) for a, b in np.argwhere(counts)} == expected


@settings(max_examples=20)
@given(files_of_bytes, st.integers(0, 6))
def test_probabilities_add_up(example: Any, texts: list[bytes], known: int) -> None:
    tokens = to_tokens(texts)
    bigrams = example.count_pairs(tokens, SIZE)
    contexts = example.choose_contexts(bigrams)[:known]
    model, unigram = example.probabilities(bigrams, example.count_trigrams(tokens, contexts, SIZE), contexts)
    assert model.shape == (example.CONTEXTS + SIZE, SIZE)
    assert model.min() > 0
    assert unigram.min() > 0
    np.testing.assert_allclose(model.sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(unigram.sum(), 1, rtol=1e-12)


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 12))
def test_shards_are_a_partition(example: Any, sizes: list[int], count: int) -> None:
    files = [(f"{i:02}.py", size, "") for i, size in enumerate(sizes)]
    parts = [example.shard_of(files, i, count) for i in range(count)]
    assert [file for part in parts for file in part] == files
    share = sum(sizes) / count
    assert all(sum(size for _, size, _ in part) <= share + 50 + 1 for part in parts)


@pytest.mark.timeout(120)
def test_result_is_independent_of_shards(example: Any, tmp_path: Path) -> None:
    out = str(tmp_path / "out.h5")
    results = [example.workflow(shards=n, limit_files=40, rounds=4, out=out) for n in (1, 3, 16, 50)]
    assert all(result == results[0] for result in results)
    assert results[0]["files"] == 40
    assert results[0]["held_out_files"] == 4
    assert results[0]["merges"] == 255


@pytest.mark.timeout(120)
def test_result_is_independent_of_the_hash_seed(tmp_path: Path) -> None:
    """Sets and dicts of strings come in another order in each process; the result doesn't."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import conftest; example = conftest.load_eager();"
        "print(example.workflow(shards=2, rounds=2, limit_files=20, out=sys.argv[2])['checksum'])"
    )
    checksums = {
        subprocess.run(
            [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path / "out.h5")],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True, capture_output=True, text=True, timeout=60,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(checksums) == 1
    assert len(checksums.pop().strip()) == 32


@pytest.mark.timeout(120)
def test_result_on_the_standard_library(example: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    result = example.workflow(limit_files=60, out=str(out))
    assert result["perplexity"] < 0.5 * result["unigram_perplexity"]
    assert result["bits_per_byte"] < 0.85 * result["unigram_bits_per_byte"] < 0.85 * 8
    assert result["bytes_per_token"] > 1.8
    with h5py.File(out) as file:
        assert file.attrs["checksum"] == result["checksum"]
        assert file.attrs["perplexity"] == result["perplexity"]
        offsets = file["vocabulary/offsets"][:]
        text = file["vocabulary/bytes"][:].tobytes()
        words = [text[a:b] for a, b in itertools.pairwise(offsets)]
        assert words == example.token_bytes(file["vocabulary/merges"][:])
        assert b"self." in words
        # each token is counted once, whatever the order of the model
        assert file["counts/bigrams"][:].sum() == file["counts/trigrams"][:].sum() < result["tokens"]
    assert os.listdir(tmp_path) == ["out.h5"]


def test_limit_and_exclusions(example: Any, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in ("b.py", "a/c.py", "a/d.py", "site-packages/no.py", "__pycache__/no.py", ".venv/no.py", "readme.txt"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(f"# {name}\n")
    (tree / "latin1.py").write_bytes(b"# \xe9\n")
    (tree / "gone.py").symlink_to("nowhere.py")
    files = example.list_files(str(tree), None)
    assert sorted(name for part in files.values() for name, _, _ in part) == ["a/c.py", "a/d.py", "b.py"]
    assert len(files["held_out"]) == 1
    assert files["train"] == sorted(files["train"])
    assert sum(map(len, example.list_files(str(tree), 2).values())) == 2


def test_changed_file_is_an_error(example: Any, tmp_path: Path) -> None:
    """A shard that is read again after a crash is never silently another one."""
    for name in "abc":
        (tmp_path / f"{name}.py").write_text(name)
    files = example.list_files(str(tmp_path), None)
    before = example.read_shard(str(tmp_path), files, "train", 0, 1)
    assert before.tolist().count(256) == 3
    (tmp_path / files["train"][0][0]).write_text("!")
    with pytest.raises(RuntimeError, match="has changed since"):
        example.read_shard(str(tmp_path), files, "train", 0, 1)


@pytest.mark.parametrize("inputs", [{"shards": 0}, {"rounds": 0}, {"merges": 0}, {"merges": 5000}])
def test_bad_inputs(example: Any, inputs: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="have to be 1 or more"):
        example.workflow(**inputs)


def test_no_files(example: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 usable"):
        example.list_files(str(tmp_path), None)
    with pytest.raises(NotADirectoryError, match="nowhere"):
        example.list_files(str(tmp_path / "nowhere"), None)


def test_write_result_is_atomic(example: Any, tmp_path: Path) -> None:
    """A write that fails leaves the older file as it was, and nothing else."""
    out = tmp_path / "out.h5"
    out.write_bytes(b"older")
    array = np.zeros((2, 3), np.int32)
    with pytest.raises(TypeError):
        example.write_result(str(out), {"not for HDF5": object()}, array, array, array, array)
    assert out.read_bytes() == b"older"
    assert os.listdir(tmp_path) == ["out.h5"]
    for _ in range(2):
        example.write_result(str(out), {"perplexity": 2.5}, array, array, array, array)
        with h5py.File(out) as file:
            assert file.attrs["perplexity"] == 2.5
    assert os.listdir(tmp_path) == ["out.h5"]
