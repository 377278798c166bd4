"""The cost model: the paper's formulas as limits, a simulated pipeline as oracle, and what is chosen."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hoplite_mpi.protocol.cost import (
    SHAPES,
    chain_seconds,
    choose,
    d_ary_seconds,
    fixed_shape,
    star_seconds,
    tree_of_chains_seconds,
)
from hoplite_mpi.protocol.trees import Tree, chain, d_ary, star, tree_of_chains

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
L, B = 100e-6, 1e9


def simulated(tree: Tree, chunks: int, chunk: int) -> float:
    """Send chunk by chunk, one message at a time into each slot, children in turn; the last hop is to a getter."""

    def finish(slot: int) -> list[float]:
        # Time at which each chunk is complete at this slot.
        ready = [0.0] * chunks
        streams = [finish(child) for child in tree.children[slot]]
        free = 0.0
        for i in range(chunks):
            for stream in streams:
                free = max(free, stream[i] + L) + chunk / B
                ready[i] = free
        return ready

    free = 0.0
    for time in finish(tree.root):
        free = max(free, time + L) + chunk / B
    return free


def test_the_papers_formulas_are_the_limit_of_small_chunks() -> None:
    n, nbytes = 16, 32 * MIB
    assert chain_seconds(n, nbytes, L, B) == pytest.approx(n * L + nbytes / B)
    # The paper's T(n) has all n send to the getter; here one of them is the root, and there is a hop more.
    assert star_seconds(n, nbytes, L, B) == pytest.approx(2 * L + (n - 1) * nbytes / B)
    # Three levels of four children hold 64 slots and more, and one hop leads to the getter.
    assert d_ary_seconds(64, 4, nbytes, L, B) == pytest.approx(L * (math.log(64, 4) + 1) + 4 * nbytes / B)
    assert d_ary_seconds(n, 1, nbytes, L, B) == chain_seconds(n, nbytes, L, B)
    # A complete binary tree of 2^4 - 1 nodes has three hops, and one to the getter: log2 of 16.
    assert tree_of_chains_seconds(4, 0, nbytes, L, B) == pytest.approx(L * math.log2(16) + 2 * nbytes / B)


@pytest.mark.parametrize("chunks", [1, 2, 7, 40])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 15, 16, 33])
def test_predictions_match_a_simulated_pipeline(n: int, chunks: int) -> None:
    chunk = 64 * KIB
    nbytes = chunks * chunk
    assert chain_seconds(n, nbytes, L, B, chunk) == pytest.approx(simulated(tree_of_chains(n, n), chunks, chunk))
    assert star_seconds(n, nbytes, L, B, chunk) == pytest.approx(simulated(star(n), chunks, chunk))
    for d in range(1, n):
        seen = simulated(d_ary(n, d), chunks, chunk)
        # The lowest level may be nearly empty; and streams from unequal subtrees take turns a little better than the model says.
        assert 0.5 * d_ary_seconds(n, d, nbytes, L, B, chunk) <= seen * (1 + 1e-9)
        assert seen <= 1.05 * d_ary_seconds(n, d, nbytes, L, B, chunk)
    for depth in range(1, (n + 1).bit_length() if n >= 3 else 1):
        k = -(-(n + 1) // 2**depth) - 1
        seen = simulated(tree_of_chains(n, k), chunks, chunk)
        # Streams from unequal subtrees take turns a little better than the model says.
        assert 0.7 * tree_of_chains_seconds(depth, k, nbytes, L, B, chunk) <= seen * (1 + 1e-9)
        assert seen <= 1.05 * tree_of_chains_seconds(depth, k, nbytes, L, B, chunk)


def test_one_and_two_sources_are_a_chain() -> None:
    for n in (1, 2):
        choice = choose(n, MIB, L, B, 256 * KIB)
        assert (choice.shape, choice.degree, len(choice.tree)) == ("chain", n - 1, n)
        assert set(choice.alternatives) == {"chain", "star"}


def test_large_objects_take_a_chain_and_small_ones_a_tree() -> None:
    assert choose(16, GIB, L, B, 256 * KIB).shape == "chain"
    small = choose(64, 100 * KIB, L, B, 256 * KIB)
    assert (small.shape, small.degree, small.tree) == ("d_ary", 4, d_ary(64, 4))
    assert small.tree.height == 3


def test_the_star_is_taken_where_the_latency_is_all() -> None:
    few = choose(5, 1000, L, B, 256 * KIB)
    assert (few.shape, few.degree, few.tree) == ("star", 4, star(5))
    assert choose(100, 0, L, B).shape == "star"
    assert choose(5, 1000, L, 1e6, 256 * KIB).shape != "star"


def test_every_shape_is_the_choice_for_some_reduce() -> None:
    taken = {choose(n, nbytes, L, B, 256 * KIB).shape for n in (2, 5, 16, 64) for nbytes in (KIB, 128 * KIB, MIB, GIB)}
    assert taken == set(SHAPES)


def test_without_latency_the_chain_is_best_and_with_nothing_else_the_tree() -> None:
    assert choose(100, MIB, 0.0, B).shape == "chain"
    assert choose(100, MIB, L, math.inf).shape == "star"


def test_a_tie_between_trees_takes_the_fewest_levels() -> None:
    # Depths 1 and 2 need two hops each for five sources.
    assert choose(5, 0, L, B, shape="tree_of_chains").tree == tree_of_chains(5, 2)
    # All degrees of five sources are of one height with nothing to send but the star's.
    assert choose(5, 0, L, B, shape="d_ary").tree == d_ary(5, 4)


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(0, 1 << 34), st.sampled_from(SHAPES), st.integers(1, 300))
def test_a_shape_can_be_asked_for(n: int, nbytes: int, shape: str, degree: int) -> None:
    choice = choose(n, nbytes, L, B, 256 * KIB, shape)
    assert choice.shape == shape
    assert choice.predicted_seconds == pytest.approx(choice.alternatives[shape], rel=1e-8)
    expected = {"chain": chain(n), "star": star(n)}
    assert choice.tree == expected.get(shape, choice.tree)
    given_degree = choose(n, nbytes, L, B, 256 * KIB, "d_ary", degree)
    assert given_degree.tree == d_ary(n, degree)
    assert given_degree.predicted_seconds == d_ary_seconds(n, degree, nbytes, L, B, 256 * KIB)


def test_the_best_degree_is_the_best_of_all() -> None:
    for n in (3, 7, 30, 64, 200):
        for nbytes in (0, 1000, 100 * KIB, MIB):
            least = min(d_ary_seconds(n, d, nbytes, L, B, 256 * KIB) for d in range(2, n))
            assert choose(n, nbytes, L, B, 256 * KIB, "d_ary").predicted_seconds == pytest.approx(least)


def test_a_fixed_shape_is_that_of_the_constants() -> None:
    # Another tree would be other bits for the same sum: these may not change with a measurement, nor from version to version.
    assert [(c.shape, c.degree) for c in map(fixed_shape, (2, 3, 16, 16, 64), (MIB, KIB, KIB, GIB, 100 * KIB))] == [
        ("chain", 1),
        ("star", 2),
        ("star", 15),
        ("chain", 1),
        ("d_ary", 4),
    ]
    assert fixed_shape(16, GIB, "d_ary", 3).tree == d_ary(16, 3)


@pytest.mark.parametrize("bad", [("ring", None), ("chain", 2), (None, 2), ("d_ary", 0), ("tree_of_chains", 2)])
def test_what_is_no_shape_is_refused(bad: tuple[str | None, int | None]) -> None:
    with pytest.raises(ValueError, match="shape"):
        choose(4, MIB, L, B, 0, *bad)


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(0, 1 << 34), st.floats(0, 1), st.floats(1e3, 1e12), st.integers(0, 1 << 24))
def test_the_choice_is_the_best_of_the_eligible(
    n: int, nbytes: int, latency: float, bandwidth: float, chunk: int
) -> None:
    choice = choose(n, nbytes, latency, bandwidth, chunk)
    assert len(choice.tree) == n
    assert choice.degree == choice.tree.fan_in
    assert choice.predicted_seconds == pytest.approx(choice.alternatives[choice.shape], rel=1e-8)
    assert choice.predicted_seconds == pytest.approx(min(choice.alternatives.values()), rel=1e-8)
    assert 0 <= choice.predicted_seconds < math.inf
    for depth in range(1, (n + 1).bit_length() if n >= 3 else 1):
        k = -(-(n + 1) // 2**depth) - 1
        other = tree_of_chains_seconds(depth, k, nbytes, latency, bandwidth, chunk)
        assert choice.predicted_seconds <= other * (1 + 1e-8)


@pytest.mark.parametrize(
    "bad", [(0, 1, L, B, 0), (1, -1, L, B, 0), (1, 1, -L, B, 0), (1, 1, L, 0, 0), (1, 1, L, B, -1)]
)
def test_nonsense_is_refused(bad: tuple[int, int, float, float, int]) -> None:
    with pytest.raises(ValueError, match="no reduce has"):
        choose(*bad)
    with pytest.raises(ValueError, match="no reduce has"):
        choose(1, 1, math.nan, B)
