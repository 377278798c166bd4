"""Shapes of reduce trees. Slots are numbered so that arrivals, taken in order, can stream at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Tree", "chain", "d_ary", "in_order", "star", "tree_of_chains"]


@dataclass(frozen=True, slots=True)
class Tree:
    """A rooted tree over the slots 0 … n-1, numbered by generalised in-order traversal.

    A node comes after its first subtree and before its others (the originals' in-order rule, for any number of
    children). So when arrivals take the slots 0, 1, 2, … the first subtree of each node is there before the node
    is, and from the second arrival on there is always somebody to stream to.
    """

    #: parent of each slot; None for the root and for no other
    parent: tuple[int | None, ...]
    #: children of each slot in the order of their subtrees' slots
    children: tuple[tuple[int, ...], ...]
    #: the slot that ends up with the result
    root: int

    def __len__(self) -> int:
        return len(self.parent)

    def ancestors(self, slot: int) -> tuple[int, ...]:
        """Return the slots above *slot*, its parent first and the root last; IndexError for no such slot."""
        if not 0 <= slot < len(self.parent):
            raise IndexError(f"slot {slot} of a tree of {len(self.parent)}")
        found: list[int] = []
        above = self.parent[slot]
        while above is not None:
            found.append(above)
            above = self.parent[above]
        return tuple(found)

    @property
    def height(self) -> int:
        """Hops from the deepest slot to the root."""
        deepest = 0
        level = [self.root]
        while below := [child for slot in level for child in self.children[slot]]:
            deepest += 1
            level = below
        return deepest

    @property
    def fan_in(self) -> int:
        """Most streams that one slot receives."""
        return max(len(below) for below in self.children)


def in_order(children: Sequence[Sequence[int]], root: int) -> Tree:
    """Return the tree with these children (node → its children), renumbered by generalised in-order traversal.

    ValueError if the nodes aren't one tree below *root*.
    """
    slot_of: dict[int, int] = {}
    seen = {root}
    # A stack and no recursion: a chain over a thousand sources is a thousand levels deep.
    stack = [(root, False)]
    while stack:
        node, first_done = stack.pop()
        below = children[node]
        if not first_done:
            if not seen.isdisjoint(below) or len(set(below)) != len(below):
                raise ValueError(f"node {node} has a child that is elsewhere in the tree already: {list(below)}")
            seen.update(below)
            stack.append((node, True))
            if below:
                stack.append((below[0], False))
            continue
        slot_of[node] = len(slot_of)
        stack.extend((child, False) for child in reversed(below[1:]))
    if len(slot_of) != len(children):
        raise ValueError(f"only {len(slot_of)} of {len(children)} nodes can be reached from the root")
    parent: list[int | None] = [None] * len(children)
    renumbered: list[tuple[int, ...]] = [()] * len(children)
    for node, slot in slot_of.items():
        renumbered[slot] = tuple(slot_of[child] for child in children[node])
        for child in renumbered[slot]:
            parent[child] = slot
    return Tree(tuple(parent), tuple(renumbered), slot_of[root])


def chain(n: int) -> Tree:
    """Return the chain 0 → 1 → … → n-1 (root)."""
    _check_size(n)
    return Tree((*range(1, n), None), ((), *((slot,) for slot in range(n - 1))), n - 1)


def star(n: int) -> Tree:
    """Return the tree in which n-1 slots send to the root, which is slot 1 (slot 0 if alone)."""
    _check_size(n)
    return in_order([range(1, n), *([()] * (n - 1))], 0)


def d_ary(n: int, d: int) -> Tree:
    """Return the complete tree of *n* slots with *d* children each, its lowest level filled from the left (Hoplite, SIGCOMM 2021).

    d = 1 is the chain, d = n-1 the star. ValueError for n < 1 or d < 1.
    """
    _check_size(n)
    if d < 1:
        raise ValueError(f"a tree with {d} children for each slot")
    return in_order([range(d * node + 1, min(d * node + d + 1, n)) for node in range(n)], 0)


def tree_of_chains(n: int, k: int) -> Tree:
    """Return a complete binary tree whose leaves are chains of about *k* slots, n slots in all (Hoplite's code, A4).

    The binary part has 2^depth - 1 nodes for depth = min(⌈log2((n+1)/(k+1))⌉, ⌊log2(n+1)⌋), and below it hang
    2^depth chains with lengths that differ by at most one, the longer ones first (some may be empty). With
    depth 0 it is one chain.
    """
    _check_size(n)
    if k < 0:
        raise ValueError(f"chains of {k} slots")
    # Integers and no logarithms, which round: the smallest depth with 2^depth · (k+1) ≥ n+1 ...
    depth = (-(-(n + 1) // (k + 1)) - 1).bit_length()
    # ... of those that leave the binary part no larger than n.
    depth = min(depth, (n + 1).bit_length() - 1)
    if depth == 0:
        return chain(n)
    inner = 2**depth - 1
    shortest, longer = divmod(n - inner, 2**depth)
    # The binary part as a heap: node i has the children 2i+1 and 2i+2, and those from `inner` on are the chains.
    children: list[list[int]] = [[] for _ in range(n)]
    for node in range((inner - 1) // 2):
        children[node] = [2 * node + 1, 2 * node + 2]
    used = inner
    for index in range(2**depth):
        above = (inner + index - 1) // 2
        for _ in range(shortest + (index < longer)):
            children[above].append(used)
            above = used
            used += 1
    return in_order(children, 0)


def _check_size(n: int) -> None:
    if n < 1:
        raise ValueError(f"a reduce tree needs a slot or more, not {n}")
