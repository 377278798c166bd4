"""What a reduce will cost in each shape, and so which shape to take.

n sources of S bytes; L: seconds from a send to its receipt; B: bytes per second into or out of one rank. A tree is
pipelined: a slot passes on each chunk of C bytes as soon as it has it from all its children. All sources are taken
to be ready at once, and the clock stops when a getter beside the tree has the result (so a chain of n is n hops).

A slot with d children takes in d streams over one link: a hop into it costs L + d·C/B for the first chunk, and d·S/B
has to pass in all. Over the longest way, with d the largest number of children::

    T = Σ over hops (L + d_hop·C/B) + d·(S - C)/B

chain            n·(L + C/B) + (S - C)/B                              the paper's T(1) = nL + S/B      for C → 0
tree of chains   depth·(L + 2C/B) + k·(L + C/B) + 2·(S - C)/B         its T(2) = L·log2 n + 2S/B       for C → 0, k = 0
star             L + n·S/B                                            its T(n); all n send to the owner of the result

For the tree: its binary part has *depth* levels, so depth - 1 hops within it and one into its lowest node; a chain of k
has k - 1 hops within it; and one hop leads to the getter. In hops it lies between the paper's T(2) at k = 0 and T(1) at
k = n; once it branches it pays 2S/B. So k > 0 is taken only where it costs no hop more, and there it is better: when
sources arrive one after the other, the last one has fewer levels above it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hoplite_mpi.protocol.trees import Tree, chain, tree_of_chains

__all__ = ["Choice", "chain_seconds", "choose", "star_seconds", "tree_of_chains_seconds"]


@dataclass(frozen=True)
class Choice:
    """The shape to take for a reduce, and why."""

    #: "chain" or "tree_of_chains"
    shape: str
    #: most streams into one slot
    degree: int
    #: slots 0 … n-1, one for each source
    tree: Tree
    #: from all sources ready to the result at a getter
    predicted_seconds: float
    #: shape → predicted seconds, the chosen one included; a tree of chains needs n ≥ 3; the star is for
    #: comparison only: it is what the directory does with inline objects
    alternatives: Mapping[str, float]


def chain_seconds(n: int, nbytes: int, latency: float, bandwidth: float, chunk: int = 0) -> float:
    """Return the predicted seconds of a chain over *n* sources of *nbytes*; seconds, bytes per second, bytes."""
    chunk = min(chunk, nbytes)
    return n * (latency + chunk / bandwidth) + (nbytes - chunk) / bandwidth


def tree_of_chains_seconds(depth: int, k: int, nbytes: int, latency: float, bandwidth: float, chunk: int = 0) -> float:
    """Return the predicted seconds of *depth* ≥ 1 binary levels over chains of at most *k* slots."""
    chunk = min(chunk, nbytes)
    binary_hops = depth if k > 0 else depth - 1
    single_hops = max(k - 1, 0) + 1  # those within a chain, and the one to the getter
    first_chunk = binary_hops * (latency + 2 * chunk / bandwidth) + single_hops * (latency + chunk / bandwidth)
    return first_chunk + 2 * (nbytes - chunk) / bandwidth


def star_seconds(n: int, nbytes: int, latency: float, bandwidth: float) -> float:
    """Return the predicted seconds when all *n* send their *nbytes* to one rank that adds them."""
    return latency + n * nbytes / bandwidth


def choose(n: int, nbytes: int, latency: float, bandwidth: float, chunk: int = 0) -> Choice:
    """Return the shape with the least predicted time for *n* sources of *nbytes* each (paper, section on reduce).

    latency in seconds, bandwidth in bytes per second, chunk: bytes per message. On a tie the chain is taken, then
    the tree with the fewest levels. ValueError for n < 1, a negative size or latency, or no bandwidth.
    """
    if n < 1 or nbytes < 0 or chunk < 0 or not latency >= 0 or not bandwidth > 0:
        raise ValueError(
            f"no reduce has n={n}, nbytes={nbytes}, latency={latency}, bandwidth={bandwidth}, chunk={chunk}"
        )
    best = chain_seconds(n, nbytes, latency, bandwidth, chunk)
    alternatives = {"chain": best, "star": star_seconds(n, nbytes, latency, bandwidth)}
    best_k: int | None = None
    if n >= 3:  # with fewer no slot has two children: it is the chain
        trees: list[tuple[int, float]] = []
        for depth in range(1, (n + 1).bit_length()):
            k = -(-(n + 1) // 2**depth) - 1
            trees.append((k, tree_of_chains_seconds(depth, k, nbytes, latency, bandwidth, chunk)))
        k, seconds = min(trees, key=lambda item: item[1])
        alternatives["tree_of_chains"] = seconds
        if seconds < best:
            best, best_k = seconds, k
    if best_k is None:
        return Choice("chain", min(1, n - 1), chain(n), best, alternatives)
    tree = tree_of_chains(n, best_k)
    return Choice("tree_of_chains", tree.fan_in, tree, best, alternatives)
