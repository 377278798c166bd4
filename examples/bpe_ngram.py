"""Learn a byte-pair vocabulary of the Python standard library, and how well n-grams of its tokens predict unseen files.

    python -m exoflow_hpc run examples/bpe_ngram.py [--input shards=16 --input merges=255 --input rounds=8 ...]

Everything that is added up over shards is an array of integers, and nothing is counted across the border of two files,
so the result is the same on any number of ranks and shards and after any failure. Floats appear in `evaluate` only.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

import exoflow_hpc as ef

__all__ = ["workflow"]

Array = np.ndarray[Any, np.dtype[Any]]
#: what `list_files` knows of one file: path below the root, bytes, BLAKE2b of the contents
File = tuple[str, int, str]

#: token that stands before the first and after each file; 0 to 255 are the bytes
EOF = 256
#: id of the first merged pair
FIRST_MERGE = 257
#: trigrams are counted after this many pairs of tokens, the most frequent ones; after all others bigrams are
CONTEXTS = 512
#: a pair that is seen less often is not merged
MIN_COUNT = 2
#: directories whose files are not part of the text: packages that someone installed, and caches
EXCLUDED = frozenset({"site-packages", "dist-packages", "__pycache__"})


def workflow(
    shards: int = 16,
    merges: int = 255,
    rounds: int = 8,
    limit_files: int | None = None,
    root: str | None = None,
    out: str = "bpe_ngram.h5",
) -> Any:
    """Return the DAG.

    shards: parts that the text is cut into (the result doesn't depend on it); merges: pairs of the vocabulary, learned
    in so many *rounds*; limit_files: use that many files at most; root: directory of *.py files, default: the running
    interpreter's standard library; out: HDF5 file to write.
    """
    shards, merges, rounds = int(shards), int(merges), int(rounds)
    if shards < 1 or rounds < 1 or not 1 <= merges <= 4096:
        raise ValueError(f"shards={shards} and rounds={rounds} have to be 1 or more, merges={merges} 1 to 4096")
    # absolute, so that a rank with another working directory, or a resume from one, means the same files
    tree = os.path.abspath(root or sysconfig.get_path("stdlib"))
    target = os.path.abspath(out)
    size = FIRST_MERGE + merges

    parts = max(1, shards // 8)
    files = list_files.options(name="list").bind(tree, None if limit_files is None else int(limit_files))
    text = [read_shard.options(name=f"read.{i}").bind(tree, files, "train", i, shards) for i in range(shards)]
    held = [read_shard.options(name=f"read.held.{i}").bind(tree, files, "held_out", i, parts) for i in range(parts)]

    tokens, vocabulary = text, np.zeros((0, 3), np.int32)
    for r in range(rounds):
        # "skip": these counts are wanted only until the vocabulary learned from them is committed
        pairs = ef.reduce(
            [count_pairs.options(name=f"pairs.{r}.{i}", checkpoint="skip").bind(t, size) for i, t in enumerate(tokens)],
            name=f"sum.pairs.{r}",
            checkpoint="skip",
        )
        quota = merges * (r + 1) // rounds - merges * r // rounds
        vocabulary = learn.options(name=f"learn.{r}").bind(pairs, vocabulary, quota, r)
        tokens = [merge.options(name=f"merge.{r}.{i}").bind(t, vocabulary, r, size) for i, t in enumerate(tokens)]
    bigrams = ef.reduce(
        [count_pairs.options(name=f"bigrams.{i}").bind(t, size) for i, t in enumerate(tokens)], name="sum.bigrams"
    )
    contexts = choose_contexts.options(name="contexts").bind(bigrams)
    trigrams = ef.reduce(
        [count_trigrams.options(name=f"trigrams.{i}").bind(t, contexts, size) for i, t in enumerate(tokens)],
        name="sum.trigrams",
    )

    unseen = [encode.options(name=f"encode.held.{i}").bind(t, vocabulary, rounds, size) for i, t in enumerate(held)]
    heard = ef.reduce(
        [count_trigrams.options(name=f"trigrams.held.{i}").bind(t, contexts, size) for i, t in enumerate(unseen)],
        name="sum.trigrams.held",
    )
    metrics = evaluate.options(name="evaluate").bind(files, vocabulary, contexts, bigrams, trigrams, heard)
    return write_result.options(name="write").bind(target, metrics, vocabulary, contexts, bigrams, trigrams)


# --- the text ---------------------------------------------------------------------------------------------------------


@ef.task(checkpoint="sync")
def list_files(root: str, limit_files: int | None) -> dict[str, list[File]]:
    """Return the files of the tree, each part sorted by path: {"train": [...], "held_out": [...]}.

    A tenth of the files, those whose paths have the lowest hashes, is held out. Files that aren't UTF-8 (the library
    has a few, for its tests) or can't be read are left out. The digests make the tree a fixed input: see `read_shard`.
    """
    if not os.path.isdir(root):
        raise NotADirectoryError(f"root={root!r} is no directory: give one that has *.py files in it")
    found: list[File] = []
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = sorted(d for d in subdirectories if d not in EXCLUDED and not d.startswith("."))
        for name in sorted(n for n in names if n.endswith(".py")):
            path = os.path.join(directory, name)
            try:
                data = Path(path).read_bytes()
                data.decode("utf-8")
                relative = os.path.relpath(path, root)
                relative.encode("utf-8")
            except (OSError, UnicodeError):
                continue
            found.append((relative, len(data), hashlib.blake2b(data, digest_size=16).hexdigest()))
    found.sort(key=lambda file: hashlib.blake2b(file[0].encode(), digest_size=16).digest())
    found = found[:limit_files]
    if len(found) < 2:
        raise ValueError(f"{len(found)} usable *.py files below {root!r}: give a directory with at least 2")
    held = max(1, len(found) // 10)
    return {"train": sorted(found[held:]), "held_out": sorted(found[:held])}


def shard_of(files: list[File], index: int, count: int) -> list[File]:
    """Return part *index* of *count*: neighbours in the list, all parts of about the same bytes."""
    total = max(1, sum(size for _, size, _ in files))
    part, start = [], 0
    for file in files:
        if start * count // total == index:
            part.append(file)
        # an empty file at the end would otherwise begin part `count`, which nobody reads
        start = min(start + file[1], total - 1)
    return part


@ef.task(checkpoint="skip")
def read_shard(root: str, files: dict[str, list[File]], part: str, index: int, count: int) -> Array:
    """Return the bytes of a shard as tokens, uint16 of shape (bytes + files + 1,), `EOF` first and after each file.

    Not checkpointed, since the files can be read again: RuntimeError if one has changed since `list_files` saw it.
    """
    pieces = [np.array([EOF], np.uint16)]
    for path, _, digest in shard_of(files[part], index, count):
        data = Path(root, path).read_bytes()
        if hashlib.blake2b(data, digest_size=16).hexdigest() != digest:
            raise RuntimeError(f"{path} below {root} has changed since this workflow listed it: run it under a new id")
        pieces += [np.frombuffer(data, np.uint8).astype(np.uint16), np.array([EOF], np.uint16)]
    return np.concatenate(pieces)


# --- the vocabulary ---------------------------------------------------------------------------------------------------
# int32 of shape (n, 3): merge i makes token FIRST_MERGE + i of the pair (left, right) in round number `round`.


@ef.task(checkpoint="async")
def count_pairs(tokens: Array, size: int) -> Array:
    """Return how often each token follows each other one: int64 of shape (size, size)."""
    return np.bincount(pair_codes(tokens, size), minlength=size * size).reshape(size, size).astype(np.int64, copy=False)


def pair_codes(tokens: Array, size: int) -> Array:
    """Return ``left * size + right`` of each pair of neighbours: int32 of shape (len(tokens) - 1,)."""
    codes = tokens[:-1].astype(np.int32)
    codes *= size
    codes += tokens[1:]
    return codes


@ef.task(checkpoint="sync")
def learn(pairs: Array, vocabulary: Array, quota: int, number: int) -> Array:
    """Return the vocabulary with up to *quota* merges more: the most frequent pairs, the lower code first among equals.

    All merges of a round are applied at once, so a pair is passed over if it would compete for a token with one already
    chosen (its left is the right of that one, or the other way round): its count would not be what is left of it.
    """
    counts = pairs.copy()
    counts[EOF, :] = counts[:, EOF] = 0
    flat, size = counts.ravel(), len(counts)
    lefts: set[int] = set()
    rights: set[int] = set()
    rows: list[tuple[int, int, int]] = []
    for code in np.argsort(-flat, kind="stable").tolist():
        if len(rows) == quota or flat[code] < MIN_COUNT:
            break
        left, right = divmod(code, size)
        if left not in rights and right not in lefts:
            lefts.add(left)
            rights.add(right)
            rows.append((left, right, number))
    return np.concatenate([vocabulary, np.array(rows, np.int32).reshape(-1, 3)])


@ef.task(checkpoint="skip")
def merge(tokens: Array, vocabulary: Array, number: int, size: int) -> Array:
    """Return the tokens, uint16, with the pairs of round *number* merged from left to right."""
    table = np.zeros(size * size, np.uint16)
    rows = np.flatnonzero(vocabulary[:, 2] == number)
    table[vocabulary[rows, 0] * size + vocabulary[rows, 1]] = FIRST_MERGE + rows
    made = table[pair_codes(tokens, size)]
    hits = np.flatnonzero(made)
    # Hits next to each other overlap: from left to right, that takes the first, third, ... of each run of them.
    first = np.ones(len(hits), bool)
    first[1:] = np.diff(hits) != 1
    run_start = np.maximum.accumulate(np.where(first, hits, 0))
    hits = hits[(hits - run_start) % 2 == 0]
    merged = tokens.copy()
    merged[hits] = made[hits]
    keep = np.ones(len(tokens), bool)
    keep[hits + 1] = False
    return merged[keep]


@ef.task(checkpoint="skip")
def encode(tokens: Array, vocabulary: Array, rounds: int, size: int) -> Array:
    """Return the tokens of a text in bytes, uint16: the merges of all rounds, one round after the other."""
    for number in range(rounds):
        tokens = merge(tokens, vocabulary, number, size)
    return tokens


def token_bytes(vocabulary: Array) -> list[bytes]:
    """Return what each token stands for; `EOF` for nothing."""
    words = [bytes([b]) for b in range(256)] + [b""]
    for left, right, _ in vocabulary.tolist():
        words.append(words[left] + words[right])
    return words


# --- the model --------------------------------------------------------------------------------------------------------


@ef.task(checkpoint="sync")
def choose_contexts(bigrams: Array) -> Array:
    """Return the codes of the most frequent pairs, int32 of shape (up to CONTEXTS,); none with `EOF` second."""
    counts = bigrams.copy()
    counts[:, EOF] = 0
    order = np.argsort(-counts.ravel(), kind="stable")[:CONTEXTS]
    return order[counts.ravel()[order] > 0].astype(np.int32)


@ef.task(checkpoint="async")
def count_trigrams(tokens: Array, contexts: Array, size: int) -> Array:
    """Return int64 of shape (CONTEXTS + size, size): each token but the first is counted once.

    Row c: it follows the pair ``contexts[c]``; row CONTEXTS + t: it follows token t, and the pair is none of them.
    After `EOF` what came before doesn't matter, so that the counts don't depend on which files are neighbours.
    """
    row_of = np.tile(np.arange(CONTEXTS, CONTEXTS + size, dtype=np.int32), size)
    row_of[contexts] = np.arange(len(contexts), dtype=np.int32)
    pairs = np.full(len(tokens) - 1, CONTEXTS + EOF, np.int32)
    pairs[1:] = row_of[pair_codes(tokens[:-1], size)]
    codes = pairs * np.int32(size) + tokens[1:]
    shape = (CONTEXTS + size, size)
    return np.bincount(codes, minlength=shape[0] * shape[1]).reshape(shape).astype(np.int64, copy=False)


def probabilities(bigrams: Array, trigrams: Array, contexts: Array) -> tuple[Array, Array]:
    """Return P(next token | row of `count_trigrams`), float64 of that shape, and the unigram model's P(token).

    Bigrams: interpolated Kneser-Ney (with continuation counts below). Trigrams: absolute discounting on top of that.
    Every row and the unigram model add up to 1, and nothing has probability 0.
    """
    size = len(bigrams)
    unigram = bigrams.sum(axis=0)
    follows = (bigrams > 0).sum(axis=0)
    lowest = np.broadcast_to((follows + 1) / (follows.sum() + size), (size, size))
    bigram = discounted(bigrams, lowest)
    after = np.concatenate([contexts, np.zeros(CONTEXTS - len(contexts), np.int32)]) % size
    trigram = discounted(trigrams[:CONTEXTS], bigram[after])
    return np.concatenate([trigram, bigram]), (unigram + 1) / (unigram.sum() + size)


def discounted(counts: Array, lower: Array) -> Array:
    """Return the rows' relative counts less a discount that goes to the *lower* order's model; float64, same shape."""
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    discount = once / (once + 2 * twice) if once else 0.5
    total = counts.sum(axis=1, keepdims=True)
    kinds = (counts > 0).sum(axis=1, keepdims=True)
    share = np.where(total > 0, discount * kinds / np.maximum(total, 1), 1.0)
    return np.maximum(counts - discount, 0.0) / np.maximum(total, 1) + share * lower


@ef.task(checkpoint="sync")
def evaluate(
    files: dict[str, list[File]], vocabulary: Array, contexts: Array, bigrams: Array, trigrams: Array, heard: Array
) -> dict[str, Any]:
    """Return the metrics of the held-out files, whose counts are *heard*.

    The only place with floats: from integers, in one order, with exactly rounded sums.
    """
    model, unigram = probabilities(bigrams, trigrams, contexts)

    def bits(counts: Array, p: Array) -> float:
        seen = counts > 0
        return math.fsum((-counts[seen] * np.log2(p[seen])).tolist())

    tokens, train_tokens = int(heard.sum()), int(bigrams.sum())
    held_bytes = sum(size for _, size, _ in files["held_out"])
    train_bytes = sum(size for _, size, _ in files["train"])
    loss, unigram_loss = bits(heard, model), bits(heard.sum(axis=0), unigram)
    digest = hashlib.blake2b(digest_size=16)
    for array in (vocabulary, contexts, bigrams, trigrams, heard):
        digest.update(json.dumps([array.dtype.str, array.shape]).encode() + np.ascontiguousarray(array).tobytes())
    return {
        "files": len(files["train"]) + len(files["held_out"]),
        "held_out_files": len(files["held_out"]),
        "bytes": train_bytes + held_bytes,
        "merges": len(vocabulary),
        "tokens": train_tokens + tokens,
        "bytes_per_token": round((train_bytes + held_bytes) / (train_tokens + tokens), 4),
        "perplexity": round(2.0 ** (loss / tokens), 4),
        "unigram_perplexity": round(2.0 ** (unigram_loss / tokens), 4),
        "bits_per_byte": round(loss / max(1, held_bytes), 4),
        "unigram_bits_per_byte": round(unigram_loss / max(1, held_bytes), 4),
        "checksum": digest.hexdigest(),
    }


@ef.task(checkpoint="sync")
def write_result(
    out: str, metrics: dict[str, Any], vocabulary: Array, contexts: Array, bigrams: Array, trigrams: Array
) -> dict[str, Any]:
    """Write vocabulary, counts and metrics to the HDF5 file *out*, whole or not at all, and return the metrics.

    Run twice, even at the same time, it leaves the same file: so it may be started again after any crash.
    """
    import h5py  # here, since only the rank that writes needs it

    words = token_bytes(vocabulary)
    temporary = f"{out}.{os.getpid()}.tmp"
    try:
        with h5py.File(temporary, "w") as file:
            file.attrs.update(metrics)
            file["vocabulary/merges"] = vocabulary
            file["vocabulary/bytes"] = np.frombuffer(b"".join(words), np.uint8)
            file["vocabulary/offsets"] = np.cumsum([0] + [len(word) for word in words])
            file["counts/contexts"] = contexts
            file["counts/bigrams"] = bigrams
            file["counts/trigrams"] = trigrams
        with open(temporary, "rb") as done:
            os.fsync(done.fileno())
        os.replace(temporary, out)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    directory = os.open(os.path.dirname(out), os.O_RDONLY)
    try:
        os.fsync(directory)  # the new name is durable before the task is committed
    finally:
        os.close(directory)
    return {**metrics, "out": out}
