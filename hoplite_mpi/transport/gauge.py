"""Latency and bandwidth of this rank's links, by class: same node, other node.

When the first link of a class has come up, one link of it is probed, as soon as nothing else is under way: a few round trips of 64
bytes, and a burst of 1 MiB. Each rank probes another neighbour, so that a start of many ranks is not a storm on one of them. From then
on what really arrives counts: the bytes of all transfers of a class together, over windows in which there was always one under way.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from hoplite_mpi.protocol.links import LinkClass, Links
from hoplite_mpi.transport.engine import Engine
from hoplite_mpi.transport.fabric import Link
from hoplite_mpi.transport.sidechannel import PeerKey
from hoplite_mpi.transport.streams import PROBE, REFUSE, Stream
from hoplite_mpi.transport.transfer import Transfers

__all__ = ["Gauge"]

_PINGS, _PING_BYTES = 5, 64
_BURST_BYTES, _BURST_CHUNK = 1 << 20, 128 * 1024
#: seconds between a link's coming up (or an attempt that found traffic) and a probe
_DELAY = 0.05
#: attempts to find a moment without traffic; afterwards the next transfer that ends is one
_ATTEMPTS = 40
#: seconds after which a probe is repeated, doubled each time up to the second: the first one may have met the start of many ranks. It
#: waits for a transfer, so an idle rank does nothing.
_FIRST_AGE, _LAST_AGE = 1.0, 30.0
#: bytes of traffic that make a sample: more than what the buffers on the way hold
_WINDOW = 4 << 20
#: change of a value that is worth telling
_NEWS = 0.1


@dataclass(eq=False)
class _Class:
    """What is known of one class of links."""

    links: list[Link] = field(default_factory=list)
    #: of the latest probes; what disturbs one only makes it longer, so the least counts
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=5))
    bursts: deque[float] = field(default_factory=lambda: deque(maxlen=5))
    #: bytes per second of the latest windows
    rates: deque[float] = field(default_factory=lambda: deque(maxlen=16))
    probed: float = float("-inf")
    age: float = _FIRST_AGE / 2
    #: a probe is planned or under way
    busy: bool = False
    #: transfers under way, when the window began (None: at the next chunk), and its bytes
    transfers: int = 0
    began: float | None = None
    nbytes: int = 0

    @property
    def bandwidth(self) -> float | None:
        """The upper quartile of what was seen: transfers that wait for their source are slower than the link, none is quicker."""
        if self.rates:
            return sorted(self.rates)[len(self.rates) * 3 // 4]
        return max(self.bursts, default=None)


class Gauge:
    """Measures. Called under the engine's lock."""

    def __init__(
        self,
        engine: Engine,
        transfers: Transfers,
        rank: int,
        on_same_node: Callable[[PeerKey], bool],
        on_change: Callable[[Links], None],
    ) -> None:
        self._engine = engine
        self._transfers = transfers
        self._rank = rank
        self._on_same_node = on_same_node
        self._on_change = on_change
        config = engine.config
        #: what is known now
        self.links = Links.of_config(config)
        self._same, self._other = _Class(), _Class()
        #: a peer's class stays when it has left the view
        self._class_of: dict[Link, _Class] = {}
        #: nothing is left to measure where the user has set it all
        self._enabled = None in (config.latency, config.bandwidth)
        self._stream = Stream(engine, PROBE, memoryview(bytes(_BURST_BYTES)), _BURST_BYTES)
        self._stopped = False
        transfers.gauge = self

    def find(self) -> object:
        """Return what a peer that probes is served."""
        return REFUSE if self._stopped else self._stream

    def stop(self) -> None:
        """Probe no more, and let nobody."""
        self._stopped = True

    @property
    def idle(self) -> bool:
        """Whether no probe is under way, of this rank or at it."""
        return not self._transfers.probes

    # -- told by the fabric and the transfers ------------------------------------------------------------------------------

    def up(self, link: Link) -> None:
        """A link has come up."""
        one = self._of(link)
        one.links.append(link)
        if not one.latencies:
            self._plan(one)

    def began(self, link: Link) -> None:
        """A transfer begins."""
        one = self._of(link)
        if one.transfers == 0:
            one.began = None
        one.transfers += 1

    def received(self, link: Link, nbytes: int) -> None:
        """A chunk of a transfer is there."""
        one, now = self._of(link), time.monotonic()
        if one.began is None:  # this chunk may have been under way for long
            one.began, one.nbytes = now, 0
            return
        one.nbytes += nbytes
        if one.nbytes >= _WINDOW:
            if now > one.began:
                one.rates.append(one.nbytes / (now - one.began))
                self._tell()
            one.began, one.nbytes = now, 0

    def ended(self, link: Link) -> None:
        """A transfer has ended."""
        one = self._of(link)
        one.transfers -= 1
        if time.monotonic() > one.probed + one.age:
            self._plan(one)

    def _of(self, link: Link) -> _Class:
        one = self._class_of.get(link)
        if one is None:
            one = self._class_of[link] = self._same if self._on_same_node(link.peer) else self._other
        return one

    # -- probing -----------------------------------------------------------------------------------------------------------

    def _plan(self, one: _Class, attempts: int = _ATTEMPTS) -> None:
        if self._enabled and not (self._stopped or one.busy):
            one.busy = True
            self._engine.after(_DELAY, lambda: self._attempt(one, attempts))

    def _attempt(self, one: _Class, attempts: int) -> None:
        one.busy = False
        one.links = [link for link in one.links if not link.down]
        if self._stopped or not one.links:
            return
        if self._transfers.busy:
            if attempts:
                self._plan(one, attempts - 1)
            return
        one.busy, one.probed, one.age = True, time.monotonic(), min(2 * one.age, _LAST_AGE)
        link = min(one.links, key=lambda link: (link.peer[0] <= self._rank, link.peer))
        self._ping(one, link, [])

    def _ping(self, one: _Class, link: Link, trips: list[float]) -> None:
        began = time.monotonic()

        def ended(reason: str | None, tainted: bool) -> None:
            if reason is not None or self._stopped:
                one.busy = False
                return
            trips.append(time.monotonic() - began)
            if len(trips) < _PINGS:
                self._ping(one, link, trips)
                return
            one.latencies.append(min(trips) / 2)
            if not one.rates:
                self._burst(one, link, min(trips))
            else:
                one.busy = False
            self._tell()

        self._pull(link, _PING_BYTES, ended)

    def _burst(self, one: _Class, link: Link, round_trip: float) -> None:
        began = time.monotonic()

        def ended(reason: str | None, tainted: bool) -> None:
            one.busy = False
            if reason is None:
                elapsed = time.monotonic() - began
                one.bursts.append(_BURST_BYTES / (elapsed - min(round_trip, elapsed / 2)))
                self._tell()

        self._pull(link, _BURST_BYTES, ended)

    def _pull(self, link: Link, nbytes: int, ended: Callable[[str | None, bool], None]) -> None:
        buffer = memoryview(bytearray(nbytes))
        self._transfers.pull(
            link, PROBE, 0, nbytes, _BURST_CHUNK, lambda start, stop: buffer[start:stop], lambda progress: None, ended
        )

    # -- results -----------------------------------------------------------------------------------------------------------

    def _tell(self) -> None:
        old = self.links
        new = replace(
            old,
            same_node=self._estimate(old.same_node, self._same),
            other_node=self._estimate(old.other_node, self._other),
        )
        if new != old:
            self.links = new
            self._on_change(new)

    def _estimate(self, old: LinkClass, one: _Class) -> LinkClass:
        new = old
        if old.latency_from != "set" and one.latencies:
            latency = min(one.latencies)
            if old.latency_from == "assumed" or abs(latency - old.latency) > _NEWS * old.latency:
                new = replace(new, latency=latency, latency_from="measured")
        if old.bandwidth_from != "set" and one.bandwidth is not None:
            change = abs(one.bandwidth - old.bandwidth)
            if old.bandwidth_from == "assumed" or change > _NEWS * old.bandwidth:
                new = replace(new, bandwidth=one.bandwidth, bandwidth_from="measured")
        return new
