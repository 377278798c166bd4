"""What the links of this rank can do, as plain data: the protocol has no clock, the driver measures and tells it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hoplite_mpi.config import Config
from hoplite_mpi.protocol import cost
from hoplite_mpi.protocol.view import View

__all__ = ["LinkClass", "Links", "ReduceExplanation", "chunk_size", "explain"]

#: what holds until something is measured
_LATENCY, _BANDWIDTH, _CHUNK = 100e-6, 1.0e9, 256 * 1024
#: seconds that a chunk shall take on the wire: many times what handling one costs, and little beside a large object
_CHUNK_TIME = 2e-3
_LEAST_CHUNK, _MOST_CHUNK = 64 * 1024, 1024 * 1024


@dataclass(frozen=True, slots=True)
class LinkClass:
    """The links to the ranks of the same node, or to those of other nodes."""

    #: seconds from a send to its receipt
    latency: float
    #: bytes per second into one rank
    bandwidth: float
    #: where they come from: "assumed" (nothing was measured yet), "measured" or "set" (by `Config`)
    latency_from: str = "assumed"
    bandwidth_from: str = "assumed"

    def __str__(self) -> str:
        return (
            f"L = {self.latency * 1e6:.1f} µs ({self.latency_from}), "
            f"B = {self.bandwidth / 1e6:.1f} MB/s ({self.bandwidth_from})"
        )


@dataclass(frozen=True, slots=True)
class Links:
    """Both classes of links, and the chunk size where one is set."""

    same_node: LinkClass
    other_node: LinkClass
    chunk: int | None = None

    @classmethod
    def of_config(cls, config: Config) -> Links:
        """Return what is known before anything is measured."""
        links = LinkClass(
            _LATENCY if config.latency is None else config.latency,
            _BANDWIDTH if config.bandwidth is None else config.bandwidth,
            "assumed" if config.latency is None else "set",
            "assumed" if config.bandwidth is None else "set",
        )
        return cls(links, links, config.chunk_size)

    def ruling(self, view: View) -> tuple[str, LinkClass]:
        """Return the class that a reduce among these members depends on, with its name: the slower one if there is such a link."""
        if len({member.node for member in view.members.values()}) > 1:
            return "other node", self.other_node
        return "same node", self.same_node

    def chunk_size(self, view: View) -> int:
        """Return the bytes per message of transfers among these members."""
        if self.chunk is not None:
            return self.chunk
        links = self.ruling(view)[1]
        return _CHUNK if links.bandwidth_from == "assumed" else chunk_size(links.bandwidth)


def chunk_size(bandwidth: float) -> int:
    """Return the chunk size for that bandwidth: the power of two nearest to 2 ms on the wire, from 64 KiB to 1 MiB."""
    size = _LEAST_CHUNK
    while size < _MOST_CHUNK and size * 2**0.5 < bandwidth * _CHUNK_TIME:
        size *= 2
    return size


@dataclass(frozen=True)
class ReduceExplanation:
    """What shape a reduce would have now, and why."""

    #: "chain", "star", "tree_of_chains" or "d_ary"
    shape: str
    #: most streams into one node of the tree
    degree: int
    #: from all sources ready to the result at a rank beside the tree
    predicted_seconds: float
    #: shape → predicted seconds of the best tree of that shape
    alternatives: Mapping[str, float]
    #: what was reckoned with: seconds, bytes per second, bytes
    latency: float
    bandwidth: float
    chunk_size: int
    #: what is known of each class of links
    same_node: LinkClass
    other_node: LinkClass
    #: in words
    why: str

    def __str__(self) -> str:
        return self.why


def explain(
    n: int,
    nbytes: int,
    links: Links,
    view: View,
    config: Config,
    shape: str | None = None,
    degree: int | None = None,
    fixed_order: bool = False,
) -> ReduceExplanation:
    """Say what a reduce of *n* sources of *nbytes* would be among these members. ValueError as `cost.choose`."""
    name, used = links.ruling(view)
    chunk = links.chunk_size(view)
    asked = shape is not None
    if nbytes <= config.inline_limit:
        choice = cost.choose(n, nbytes, used.latency, used.bandwidth, chunk, "star")
        reason = f"objects of up to {config.inline_limit} bytes are in the directory, whose rank adds them up"
    elif fixed_order and not asked:
        choice = cost.fixed_shape(n, nbytes)
        reason = "a fixed order needs a shape that depends on nothing measured"
    else:
        choice = cost.choose(n, nbytes, used.latency, used.bandwidth, chunk, shape, degree)
        reason = "it was asked for" if asked else "it has the least predicted time"
    others = ", ".join(f"{other} {seconds * 1e3:.3g} ms" for other, seconds in choice.alternatives.items())
    why = (
        f"{n} x {nbytes} bytes: {choice.shape} of degree {choice.degree}, since {reason}. Predicted: {others}; with {name} links "
        f"and chunks of {chunk} bytes. Same node: {links.same_node}. Other node: {links.other_node}."
    )
    return ReduceExplanation(
        choice.shape,
        choice.degree,
        choice.predicted_seconds,
        choice.alternatives,
        used.latency,
        used.bandwidth,
        chunk,
        links.same_node,
        links.other_node,
        why,
    )
