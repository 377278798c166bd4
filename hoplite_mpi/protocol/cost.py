"""What a reduce will cost in each shape, and so which shape to take.

n sources of S bytes; L: seconds from a send to its receipt; B: bytes per second into or out of one rank. A tree is
pipelined: a slot passes on each chunk of C bytes as soon as it has it from all its children. All sources are taken
to be ready at once, and the clock stops when a getter beside the tree has the result (so a chain of n is n hops).

A slot with d children takes in d streams at once over one link, and goes on when it has the chunk of each: a hop into
it costs L + d·C/B for the first chunk, and d·S/B has to pass in all. Over the longest way, with d the largest number of
children::

    T = Σ over hops (L + d_hop·C/B) + d·(S - C)/B

chain            n·(L + C/B) + (S - C)/B                              the paper's T(1) = nL + S/B          for C → 0
d-ary tree       h·(L + dC/B) + L + C/B + d·(S - C)/B                 its T(d) = L·log_d n + d·S/B         for C → 0
star             2L + nC/B + (n - 1)·(S - C)/B                        its T(n) = L + n·S/B, but see below
tree of chains   depth·(L + 2C/B) + k·(L + C/B) + 2·(S - C)/B         T(2), with more hops, for C → 0

A d-ary tree of n slots has the height h ≈ log_d n - 1, and one hop more leads to the getter. The star is the d-ary tree
of height 1. The paper's star is another one: there all n send to a process that has no source of its own and is the
getter too; here the root is one of the sources, which takes in n - 1 streams.

The binary part of a tree of chains has *depth* levels, so depth - 1 hops within it and one into its lowest node; a chain
of k has k - 1 hops within it; and one hop leads to the getter. In hops it lies between T(2) at k = 0 and T(1) at k = n;
once it branches it pays 2S/B. So k > 0 is taken only where it costs no hop more, and there it is better: when
sources arrive one after the other, the last one has fewer levels above it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hoplite_mpi.protocol.trees import Tree, chain, d_ary, star, tree_of_chains

__all__ = [
    "SHAPES",
    "Choice",
    "chain_seconds",
    "choose",
    "d_ary_seconds",
    "fixed_shape",
    "shape_error",
    "star_seconds",
    "tree_of_chains_seconds",
]

#: all shapes; of those with equal cost the first is taken
SHAPES = ("chain", "star", "tree_of_chains", "d_ary")

#: seconds that differ by no more than rounding are equal
_TIE = 1 + 1e-9

#: what the shape of a reduce with a fixed order is chosen with: every rank of every run has to come to the same tree
_FIXED_LATENCY, _FIXED_BANDWIDTH, _FIXED_CHUNK = 100e-6, 1.0e9, 256 * 1024


@dataclass(frozen=True)
class Choice:
    """The shape to take for a reduce, and why."""

    #: one of `SHAPES`
    shape: str
    #: most streams into one slot
    degree: int
    #: slots 0 … n-1, one for each source
    tree: Tree
    #: from all sources ready to the result at a getter
    predicted_seconds: float
    #: shape → predicted seconds of the best of that shape, the chosen one included; trees need n ≥ 3
    alternatives: Mapping[str, float]


@dataclass(frozen=True)
class _Candidate:
    shape: str
    seconds: float
    build: Callable[[], Tree]


def chain_seconds(n: int, nbytes: int, latency: float, bandwidth: float, chunk: int = 0) -> float:
    """Return the predicted seconds of a chain over *n* sources of *nbytes*; seconds, bytes per second, bytes."""
    chunk = min(chunk, nbytes)
    return n * (latency + chunk / bandwidth) + (nbytes - chunk) / bandwidth


def d_ary_seconds(n: int, d: int, nbytes: int, latency: float, bandwidth: float, chunk: int = 0) -> float:
    """Return the predicted seconds of a complete tree over *n* sources with up to *d* children for each slot."""
    chunk = min(chunk, nbytes)
    streams = max(1, min(d, n - 1))
    hops = _height(n, d) * (latency + streams * chunk / bandwidth) + latency + chunk / bandwidth
    return hops + streams * (nbytes - chunk) / bandwidth


def star_seconds(n: int, nbytes: int, latency: float, bandwidth: float, chunk: int = 0) -> float:
    """Return the predicted seconds when n-1 sources send to the remaining one, which adds them and sends to the getter."""
    return d_ary_seconds(n, max(1, n - 1), nbytes, latency, bandwidth, chunk)


def tree_of_chains_seconds(depth: int, k: int, nbytes: int, latency: float, bandwidth: float, chunk: int = 0) -> float:
    """Return the predicted seconds of *depth* ≥ 1 binary levels over chains of at most *k* slots."""
    chunk = min(chunk, nbytes)
    binary_hops = depth if k > 0 else depth - 1
    single_hops = max(k - 1, 0) + 1  # those within a chain, and the one to the getter
    first_chunk = binary_hops * (latency + 2 * chunk / bandwidth) + single_hops * (latency + chunk / bandwidth)
    return first_chunk + 2 * (nbytes - chunk) / bandwidth


def shape_error(shape: str | None, degree: int | None) -> str | None:
    """Return why no reduce can be asked for in this shape, None if one can; None as shape or degree: what the model says."""
    if shape is not None and shape not in SHAPES:
        return f"no reduce has the shape {shape!r}; there are {', '.join(SHAPES)}"
    if degree is not None and (shape != "d_ary" or degree < 1):
        return f"degree={degree} with shape={shape!r}: only 'd_ary' takes a degree, of 1 or more"
    return None


def choose(
    n: int,
    nbytes: int,
    latency: float,
    bandwidth: float,
    chunk: int = 0,
    shape: str | None = None,
    degree: int | None = None,
) -> Choice:
    """Return the shape with the least predicted time for *n* sources of *nbytes* each (paper, section on reduce).

    latency in seconds, bandwidth in bytes per second, chunk: bytes per message; shape, degree: the best of this shape, which with
    n < 3 is the chain whatever its name. On a tie the first of `SHAPES` is taken, and the tree with the fewest levels.
    ValueError for n < 1, a negative size or latency, no bandwidth, or for a `shape_error`.
    """
    if n < 1 or nbytes < 0 or chunk < 0 or not latency >= 0 or not bandwidth > 0:
        raise ValueError(
            f"no reduce has n={n}, nbytes={nbytes}, latency={latency}, bandwidth={bandwidth}, chunk={chunk}"
        )
    if (wrong := shape_error(shape, degree)) is not None:
        raise ValueError(wrong)
    links = (nbytes, latency, bandwidth, chunk)
    found = [
        _Candidate("chain", chain_seconds(n, *links), lambda: chain(n)),
        _Candidate("star", star_seconds(n, *links), lambda: star(n)),
    ]
    if n >= 3:  # with fewer no slot has two children: it is the chain
        for depth in range(1, (n + 1).bit_length()):
            k = -(-(n + 1) // 2**depth) - 1
            seconds = tree_of_chains_seconds(depth, k, *links)
            found.append(_Candidate("tree_of_chains", seconds, lambda k=k: tree_of_chains(n, k)))  # type: ignore[misc]
    elif shape == "tree_of_chains":
        found.append(_Candidate(shape, chain_seconds(n, *links), lambda: chain(n)))
    if n >= 3 or shape == "d_ary":
        for d in [degree] if degree is not None else _degrees(n):
            found.append(_Candidate("d_ary", d_ary_seconds(n, d, *links), lambda d=d: d_ary(n, d)))  # type: ignore[misc]
    alternatives = {name: min(c.seconds for c in found if c.shape == name) for name in {c.shape: None for c in found}}
    eligible = [c for c in found if shape in (None, c.shape)]
    least = min(c.seconds for c in eligible)
    best = next(c for c in eligible if c.seconds <= least * _TIE)
    tree = best.build()
    return Choice(best.shape, tree.fan_in, tree, best.seconds, alternatives)


def fixed_shape(n: int, nbytes: int, shape: str | None = None, degree: int | None = None) -> Choice:
    """Return the shape of a reduce with a fixed order: it depends on nothing but the arguments, so that the bits don't either.

    ValueError as `choose`.
    """
    return choose(n, nbytes, _FIXED_LATENCY, _FIXED_BANDWIDTH, _FIXED_CHUNK, shape, degree)


def _height(n: int, d: int) -> int:
    """Return the levels below the root of a complete tree of *n* slots with *d* children each."""
    if d == 1:
        return n - 1
    height, level, room = 0, 1, 1
    while room < n:
        height, level = height + 1, level * d
        room += level
    return height


def _degrees(n: int) -> list[int]:
    """Return the degrees worth a look: for each height the smallest with which *n* slots fit, the fewest levels first."""
    found: list[int] = []
    height = 1
    while not found or found[-1] > 2:
        low, high = 2, max(2, n - 1)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if _height(n, middle) <= height else (middle + 1, high)
        if low not in found:
            found.append(low)
        height += 1
    return found
