"""Shapes of reduce trees: the originals' golden vectors, and what holds for every shape."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hoplite_mpi.protocol.trees import Tree, chain, d_ary, in_order, star, tree_of_chains


def assert_sound(tree: Tree, n: int) -> None:
    """One root, no cycle, every slot below the root, children and parents agree."""
    assert len(tree) == len(tree.parent) == len(tree.children) == n
    assert [slot for slot in range(n) if tree.parent[slot] is None] == [tree.root]
    for slot, below in enumerate(tree.children):
        assert all(tree.parent[child] == slot for child in below)
    reached, level, levels = {tree.root}, [tree.root], 0
    while level := [child for slot in level for child in tree.children[slot]]:
        assert reached.isdisjoint(level)
        reached.update(level)
        levels += 1
    assert reached == set(range(n))
    assert tree.height == levels


def subtree(tree: Tree, slot: int) -> set[int]:
    found, todo = set(), [slot]
    while todo:
        found.add(todo[0])
        todo = [*todo[1:], *tree.children[todo[0]]]
    return found


def assert_in_order(tree: Tree) -> None:
    """Each node's first subtree comes before it, the others after it, one after the other."""
    for slot, below in enumerate(tree.children):
        parts = [subtree(tree, child) for child in below]
        parts.insert(1, {slot})
        if below:
            assert [sorted(part) for part in parts] == [list(range(min(part), max(part) + 1)) for part in parts]
            assert all(max(a) + 1 == min(b) for a, b in itertools.pairwise(parts))


@pytest.mark.parametrize(
    ("n", "k", "tree_nodes", "root", "height"),
    [
        (5, 0, 3, 3, 2),
        (17, 0, 15, 9, 4),
        (17, 1, 15, 9, 4),
        (17, 4, 3, 9, 5),
        (17, 8, 1, 8, 8),
        (17, 34, 0, 16, 16),
        (61, 2, 31, 31, 5),
        (128, 8, 15, 64, 11),
    ],
)
def test_golden_vectors_of_the_original(n: int, k: int, tree_nodes: int, root: int, height: int) -> None:
    tree = tree_of_chains(n, k)
    assert (tree.root, tree.height) == (root, height)
    chains = _chains(tree)
    assert n - sum(chains) == tree_nodes
    if tree_nodes:
        assert len(chains) == min(tree_nodes + 1, n - tree_nodes)
        assert max(chains) - min(chains) <= 1
        assert chains == sorted(chains, reverse=True)


def _chains(tree: Tree) -> list[int]:
    """Return the lengths of the chains, in slot order: they begin where no slot has two children any more."""
    two = [slot for slot in range(len(tree)) if len(tree.children[slot]) == 2]
    if not two:
        return [len(tree)]
    deepest = max(len(tree.ancestors(slot)) for slot in two)
    binary = [slot for slot in range(len(tree)) if len(tree.ancestors(slot)) <= deepest]
    tops = [child for slot in sorted(binary) for child in tree.children[slot] if child not in binary]
    return [len(subtree(tree, top)) for top in sorted(tops)]


def test_parents_of_the_smallest_golden_tree() -> None:
    tree = tree_of_chains(5, 0)
    assert tree.parent == (1, 3, 1, None, 3)
    assert tree.children == ((), (0, 2), (), (1, 4), ())
    assert tree.ancestors(0) == (1, 3)
    assert tree.ancestors(3) == ()


def test_golden_chain_lengths() -> None:
    assert _chains(tree_of_chains(17, 4)) == [4, 4, 3, 3]


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(0, 320))
def test_tree_of_chains_is_a_binary_tree_in_order(n: int, k: int) -> None:
    tree = tree_of_chains(n, k)
    assert_sound(tree, n)
    assert_in_order(tree)
    assert tree.fan_in <= 2
    if k >= n:
        assert tree == chain(n)


@settings(deadline=None)
@given(st.integers(1, 200))
def test_chain_and_star(n: int) -> None:
    for tree in (chain(n), star(n)):
        assert_sound(tree, n)
        assert_in_order(tree)
    assert chain(n).root == chain(n).height == n - 1
    assert star(n).height == min(1, n - 1)
    assert star(n).root == min(1, n - 1)
    assert star(n).fan_in == n - 1


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 320))
def test_d_ary_is_complete_and_in_order(n: int, d: int) -> None:
    tree = d_ary(n, d)
    assert_sound(tree, n)
    assert_in_order(tree)
    # All levels but the lowest are full, and on the one above it no more than one slot has some of its children only.
    levels = [[tree.root]]
    while below := [child for slot in levels[-1] for child in tree.children[slot]]:
        levels.append(below)
    assert all(len(tree.children[slot]) == d for level in levels[:-2] for slot in level)
    assert sum(0 < len(tree.children[slot]) < d for level in levels[-2:] for slot in level) <= 1


@settings(deadline=None)
@given(st.integers(1, 100))
def test_d_ary_ends_in_the_chain_and_the_star(n: int) -> None:
    assert d_ary(n, 1) == chain(n)
    assert d_ary(n, max(1, n - 1)) == star(n)
    assert d_ary(2**6 - 1, 2) == tree_of_chains(2**6 - 1, 0)


def test_a_ternary_tree_of_thirteen() -> None:
    tree = d_ary(13, 3)
    assert tree.root == 4
    assert tree.children[4] == (1, 6, 10)
    assert [tree.children[slot] for slot in (1, 6, 10)] == [(0, 2, 3), (5, 7, 8), (9, 11, 12)]


@settings(deadline=None)
@given(st.integers(2, 60), st.integers(1, 70), st.integers(2, 60))
def test_from_the_second_arrival_on_somebody_streams(n: int, k: int, arrived: int) -> None:
    for tree in (chain(n), star(n), tree_of_chains(n, k), d_ary(n, k)):
        here = range(min(arrived, n))
        assert any(tree.parent[slot] in here for slot in here)


@settings(deadline=None)
@given(st.lists(st.integers(0, 10**6), max_size=40))
def test_in_order_numbers_any_tree(picks: list[int]) -> None:
    children: list[list[int]] = [[] for _ in range(len(picks) + 1)]
    for node, pick in enumerate(picks, start=1):
        children[pick % node].append(node)
    tree = in_order(children, 0)
    assert_sound(tree, len(children))
    assert_in_order(tree)
    assert sorted(map(len, tree.children)) == sorted(map(len, children))


def test_a_chain_of_thousands_needs_no_recursion() -> None:
    n = 5000
    assert in_order([*([i + 1] for i in range(n - 1)), []], 0) == chain(n)


@pytest.mark.parametrize("children", [[[1], [0]], [[1, 1], []], [[1], [], []], [[1, 2], [2], []]])
def test_what_is_not_a_tree_is_refused(children: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="node"):
        in_order(children, 0)


def test_sizes_out_of_range_are_refused() -> None:
    for make in (chain, star, lambda n: tree_of_chains(n, 1), lambda n: d_ary(n, 2)):
        with pytest.raises(ValueError, match="a slot or more"):
            make(0)
    with pytest.raises(ValueError, match="chains of -1"):
        tree_of_chains(4, -1)
    with pytest.raises(ValueError, match="0 children"):
        d_ary(4, 0)
    with pytest.raises(IndexError, match="slot 4"):
        chain(4).ancestors(4)
