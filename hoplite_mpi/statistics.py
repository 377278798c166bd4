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
    #: puts that were accepted, and gets that were given their object, those of collectives included
    puts: int
    gets: int
    #: objects that a get found on this node, in another process's memory, and that one had to receive from another rank
    objects_mapped: int
    objects_received: int
    #: transfers that this rank began to receive: completed, failed (whatever ended them before), or under way
    transfers: int
    transfers_completed: int
    transfers_failed: int
    #: those of them that went on behind what an earlier one had brought
    transfers_resumed: int
    #: transfers that were given up because their sender lived but sent nothing
    stalled: int
    #: chunks that came with a wrong checksum, and were fetched again
    chunks_corrupt: int
    #: reduces begun with this rank as coordinator; one that begins anew counts again
    reduces: int
    #: reduce slots started on this rank, and those of them that had been started here before
    slots: int
    slots_restarted: int
    #: MPI connections made by accept and connect
    joins: int
    #: views installed
    views: int
    peers_lost: int
    #: copies dropped to make room, since another node has one
    evicted: int
    #: objects written to this node's disk to make room, and read back when they were asked for
    spilled: int
    spilled_bytes: int
    restored: int
    restored_bytes: int
    #: events that the trace has no room for any more
    trace_dropped: int
