"""What the protocol knows of the links, and what follows from it for a reduce."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from hoplite_mpi.config import Config
from hoplite_mpi.ids import ObjectID
from hoplite_mpi.protocol import events as ev
from hoplite_mpi.protocol.cost import SHAPES, fixed_shape
from hoplite_mpi.protocol.links import LinkClass, Links, chunk_size, explain
from hoplite_mpi.protocol.view import Member, View

from .world import World

KIB, MIB = 1 << 10, 1 << 20
SLOW, FAST = LinkClass(1e-3, 1e8, "measured", "measured"), LinkClass(1e-6, 1e10, "measured", "measured")


def view_of(*nodes: str) -> View:
    return View(1, {rank: Member(rank, 0, node, ("h", 1)) for rank, node in enumerate(nodes)})


def test_the_links_between_nodes_rule_where_there_are_any() -> None:
    links = Links(FAST, SLOW)
    assert links.ruling(view_of("a", "a", "a")) == ("same node", FAST)
    assert links.ruling(view_of("a", "a", "b")) == ("other node", SLOW)
    assert links.ruling(View(0)) == ("same node", FAST)


def test_what_is_set_is_not_measured() -> None:
    links = Links.of_config(Config(latency=2e-6, chunk_size=1000))
    assert (links.same_node.latency, links.same_node.latency_from, links.same_node.bandwidth_from) == (
        2e-6,
        "set",
        "assumed",
    )
    assert links.same_node == links.other_node
    assert links.chunk_size(view_of("a", "b")) == 1000
    assert Links.of_config(Config(bandwidth=5.0)).other_node.bandwidth == 5.0


def test_chunks_take_about_as_long_on_any_wire() -> None:
    sizes = {bandwidth: chunk_size(bandwidth) for bandwidth in (1e6, 1e8, 119e6, 1e9, 1e11)}
    assert sizes == {1e6: 64 * KIB, 1e8: 256 * KIB, 119e6: 256 * KIB, 1e9: MIB, 1e11: MIB}
    assert Links(FAST, SLOW).chunk_size(view_of("a", "b")) == 256 * KIB
    assert Links.of_config(Config()).chunk_size(view_of("a", "b")) == 256 * KIB


def test_an_explanation_says_what_was_reckoned_with() -> None:
    links, view = Links(FAST, SLOW), view_of("a", "b", "c")
    found = explain(3, 100 * MIB, links, view, Config())
    assert (found.shape, found.degree, found.chunk_size) == ("chain", 1, 256 * KIB)
    assert (found.latency, found.bandwidth, found.same_node, found.other_node) == (1e-3, 1e8, FAST, SLOW)
    assert set(found.alternatives) == set(SHAPES)
    assert found.predicted_seconds == found.alternatives["chain"] == min(found.alternatives.values())
    for word in ("chain", "least predicted", "other node", "1000.0 µs (measured)", "100.0 MB/s (measured)", "star"):
        assert word in str(found)


def test_an_explanation_knows_small_objects_and_what_was_asked_for() -> None:
    links, view = Links(FAST, SLOW), view_of("a", "b")
    small = explain(8, 64 * KIB, links, view, Config())
    assert small.shape == "star"
    assert "directory" in small.why
    asked = explain(8, 100 * MIB, links, view, Config(), "d_ary", 3)
    assert (asked.shape, asked.degree) == ("d_ary", 3)
    assert "asked for" in asked.why
    assert asked.predicted_seconds > min(asked.alternatives.values())


def test_a_fixed_order_is_explained_by_nothing_measured() -> None:
    view = view_of("a", "b")
    found = [
        explain(16, MIB, Links(one, one, chunk), view, Config(), fixed_order=True)
        for one in (SLOW, FAST)
        for chunk in (None, 1)
    ]
    assert {(one.shape, one.degree) for one in found} == {(fixed_shape(16, MIB).shape, fixed_shape(16, MIB).degree)}


@pytest.mark.parametrize(
    ("links", "children"),
    [(LinkClass(0.0, 1e3, "measured", "measured"), [0, 1, 1, 1, 1, 1]), (LinkClass(1.0, 1e9), [0, 5, 0, 0, 0, 0])],
)
def test_a_reduce_takes_the_shape_that_was_measured_to_be_best(links: LinkClass, children: list[int]) -> None:
    world = World(random.Random(1), 7, 7)
    world.settle()
    rid = next(oid for i in range(1000) if world.view.owner(bytes(oid := ObjectID.from_name(f"sum {i}"))) == 0)
    sources = tuple(ObjectID.from_name(f"source {rank}") for rank in range(6))
    # one-byte chunks, so that only latency or only bandwidth counts
    world.handle(world.nodes[0], ev.LinksMeasured(Links(replace(FAST), links, 1)))
    world.reduce(6, ev.ReduceRequested(rid, sources, "sum"))
    for rank in range(6):
        world.put(rank, sources[rank], 1 << rank)
    world.settle()
    assert {start.slot: start.num_children for _, start in world.slot_starts} == dict(enumerate(children))
