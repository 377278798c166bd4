"""All settings, and every deadline of the package in one table."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from dataclasses import dataclass
from typing import Any

from hoplite_mpi.protocol.cost import shape_error

__all__ = ["DEFAULT", "Config"]


class _Default:
    """The type of `DEFAULT`: "use `Config.default_timeout`"."""

    def __repr__(self) -> str:
        return "hoplite_mpi.DEFAULT"


DEFAULT = _Default()


def _truth(text: str) -> bool:
    """Return what a yes or no in the environment means; ValueError for anything else."""
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off", ""):
        return False
    raise ValueError(text)


@dataclass(frozen=True)
class Config:
    """Settings of a store. Each can be given in the environment as ``HOPLITE_<FIELD>``, which wins.

    Deadlines, in seconds, each strictly inside the next where one waits for the other::

        stall_timeout < keepalive_timeout < join_timeout < evict_timeout <= default_timeout
    """

    #: objects up to this many bytes live in the directory and come with its reply
    inline_limit: int = 64 * 1024
    #: bytes per message of a transfer; None: by the measured bandwidth, 64 KiB to 1 MiB
    chunk_size: int | None = None
    #: messages of one transfer that are in flight at once
    window: int = 8
    #: bytes of shared memory that this rank may hold; None: as much as /dev/shm has
    memory_limit: int | None = None
    #: where objects that nobody uses go when memory is short: a directory, preferably on a disk of the node; "": the
    #: first of TMPDIR (or /tmp) and /var/tmp that is no memory itself; None: nowhere, it is StoreFullError then
    spill_directory: str | None = ""
    #: bytes of freed arena files kept mapped for the next objects
    recycle_limit: int = 1 << 30
    #: an allreduce or reduce_scatter of this many bytes or more is split into one stripe for each rank
    stripe_threshold: int = 1 << 20
    #: seconds that an allreduce waits for all to come before it begins with those who are there, and without stripes
    stripe_patience: float = 0.01
    #: latency of one hop in seconds, for the reduce's cost model; None: measured, for each class of links
    latency: float | None = None
    #: bytes per second into one rank, for the same; None: measured
    bandwidth: float | None = None
    #: shape of reduces that ask for none, and its degree, see `ObjectStore.reduce`; None: what the cost model says
    reduce_shape: str | None = None
    reduce_degree: int | None = None
    #: keep the last events of each rank, `trace_limit` of them, for `ObjectStore.trace`
    trace: bool = False
    trace_limit: int = 100_000
    #: verify the bytes of objects that come from other ranks against sums made where they were made, and each control message
    #: against one of its sender; the same on all ranks
    checksums: bool = False
    #: seconds without traffic after which the engine stops polling and blocks
    spin_time: float = 0.002
    #: seconds between the polls of a blocked engine (safety net beside the doorbell)
    idle_poll: float = 0.25

    #: whoever needs memory waits this long for leave to drop a copy that another node has, too
    evict_patience: float = 0.25
    #: a transfer without progress for this long is routed around
    stall_timeout: float = 1.0
    #: bytes that come corrupt again and again for this long, from whoever has them, are given up
    corrupt_timeout: float = 30.0
    #: silence on the side channel for this long, after the kernel's keepalive, proves a dead host
    keepalive_timeout: float = 3.0
    #: a silent member is left out so long after its silence is known: where the network is cut, the smaller part has closed by then
    cut_margin: float = 1.2
    #: one accept/connect
    join_timeout: float = 20.0
    #: all ranks of the start have to be there after this long
    start_timeout: float = 60.0
    #: a member that has not answered for this long is put out of the view
    evict_timeout: float = 60.0
    #: close() waits this long for the others
    close_timeout: float = 5.0
    #: what `timeout=DEFAULT` means
    default_timeout: float = 600.0

    def __post_init__(self) -> None:
        for name in ("chunk_size", "window", "inline_limit", "trace_limit"):
            value = getattr(self, name)
            if value is not None and value < (0 if name == "inline_limit" else 1):
                raise ValueError(f"Config.{name} = {getattr(self, name)} is out of range")
        if not (self.latency is None or 0 <= self.latency < math.inf):
            raise ValueError(f"Config.latency = {self.latency} is not a number of seconds")
        if not (self.bandwidth is None or 0 < self.bandwidth < math.inf):
            raise ValueError(f"Config.bandwidth = {self.bandwidth} is not a number of bytes per second")
        if (wrong := shape_error(self.reduce_shape, self.reduce_degree)) is not None:
            raise ValueError(f"Config.reduce_shape, Config.reduce_degree: {wrong}")
        chain = ["stall_timeout", "keepalive_timeout", "join_timeout", "evict_timeout"]
        for inner, outer in itertools.pairwise(chain):
            if not 0 < getattr(self, inner) < getattr(self, outer):
                raise ValueError(f"Config.{inner} has to be above 0 and below {outer}")

    @classmethod
    def from_environment(cls, base: Config | None = None) -> Config:
        """Return *base* (default: the defaults) with what ``HOPLITE_<FIELD>`` says in the environment."""
        base = base or cls()
        changes: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            text = os.environ.get(f"HOPLITE_{field.name.upper()}")
            if text is None:
                continue
            kind = next((one for one in (bool, int, str) if one.__name__ in str(field.type)), float)
            try:
                changes[field.name] = None if text.lower() == "none" else _truth(text) if kind is bool else kind(text)
            except ValueError:
                raise ValueError(
                    f"HOPLITE_{field.name.upper()}={text!r} in the environment is not a {kind.__name__}"
                ) from None
        return dataclasses.replace(base, **changes)

    def deadline(self, timeout: Any) -> float | None:
        """Return seconds for a *timeout* argument: DEFAULT, None (no limit) or a number; below 0 is 0. ValueError, TypeError."""
        if timeout is DEFAULT:
            return self.default_timeout
        if timeout is None:
            return None
        seconds = float(timeout)
        if math.isnan(seconds):
            raise ValueError("a timeout is a number of seconds or None, not NaN")
        return max(0.0, seconds)
