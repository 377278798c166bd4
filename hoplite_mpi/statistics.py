"""Counters of a store."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Statistics"]


@dataclass(frozen=True)
class Statistics:
    """What a store has done since it was opened. Bytes are payload, without envelopes."""

    rank: int
    view: int
    members: int
    #: objects that can be had here without asking anybody
    objects: int
    #: bytes of shared memory that this rank has allocated
    memory_used: int
    messages_sent: int
    control_bytes_sent: int
    bytes_sent: int
    bytes_received: int
    transfers: int
    #: transfers that were given up because their sender lived but sent nothing
    stalled: int
    peers_lost: int
    #: copies dropped to make room, since another node has one
    evicted: int
    #: objects written to this node's disk to make room, and read back when they were asked for
    spilled: int
    spilled_bytes: int
    restored: int
    restored_bytes: int
