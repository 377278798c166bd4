"""What a rank did and when: a ring buffer of its last events, for whoever wonders why, for tests, and for Perfetto.

Off by default (`Config.trace`); then it costs one test of `Recorder.on` at each place. `ObjectStore.trace` returns the events. Times of
ranks on one machine are those of one clock; over several machines `TraceEvent.wall` is as good as their clocks agree.

An object's id is the field ``oid``. Names, and what they say beside it:

========================  ===========================================================================================================
put, put.stored           ``nbytes`` ``inline``; the put counts. Before it put.started, if others may receive it meanwhile
copy.evict, copy.moved    may the copy go, to make room: ``granted``; it has gone ``to`` disk, or come back to memory
get, get.delivered        ``how`` it came: received, mapped, inline, or here (it was already)
wait, wait.over           a `wait` or the like for its existence
delete, failed            ``kind`` ``text``: what those who put, get or wait for it are told
location                  given by the directory to rank ``to``: ``sender``, ``complete`` (or partial), ``same_node``, ``mapped``
map                       a copy of rank ``holder`` on this node: whether it was ``found``
transfer.begin            at the receiver: ``peer`` ``offset`` ``end``; of a reduce also ``slot`` ``generation``, else ``version``
transfer.first            its first bytes are valid here
transfer.stalled          the sender lives but sends nothing: another one is looked for
transfer.corrupt          bytes ``at`` that offset have another checksum than where they were made: they are asked for again
transfer.end              ``progress``: valid up to there; ``why``: complete, or what ended it
serve.begin, serve.end    at the sender: ``peer`` ``offset`` ``end``, ``had`` bytes of ``nbytes`` then, ``complete``; ``posted`` chunks
reduce                    asked for here: ``sources``, ``num_objects``
slot.start                ``slot`` ``generation`` ``source`` ``children`` ``root``; slot.child: ``child`` of rank ``peer`` is pulled
slot.first, slot.done     the first chunk of its output, and all of a root's, is there
slot.failed, slot.stop    ``text``, or why a child could not be had; the end of a slot
reduce.final              ``version`` is the one that all get; ``sources``: how many went in
call.begin, call.end      a collective call: ``call`` ``key`` ``number``; ``error`` if it failed
view, peer.lost           ``number`` ``members``; ``peer``
join.begin, join.end      an MPI connection to ``peer``
evicted                   ``text``
========================  ===========================================================================================================
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["Recorder", "TraceEvent", "merge", "to_chrome", "write_chrome"]


@dataclass(frozen=True, slots=True)
class TraceEvent:
    """Something that happened on one rank. ``event["oid"]`` is a field of it."""

    #: seconds of the machine's monotonic clock
    time: float
    #: seconds to add to `time` for those since the epoch
    offset: float
    rank: int
    name: str
    fields: dict[str, Any]

    @property
    def wall(self) -> float:
        """Seconds since the epoch."""
        return self.time + self.offset

    def __getitem__(self, field: str) -> Any:
        return self.fields[field]

    def get(self, field: str, default: Any = None) -> Any:
        """Return a field, or *default* if it has none of that name."""
        return self.fields.get(field, default)


class Recorder:
    """The last events of one rank. Thread-safe."""

    __slots__ = ("_events", "_lock", "_offset", "_rank", "on", "recorded")

    def __init__(self, rank: int = -1, limit: int = 0) -> None:
        #: whether there is anybody to record for; look at it before a call of `event`
        self.on = limit > 0
        #: events so far, those that had to make room included
        self.recorded = 0
        self._rank = rank
        self._events: deque[TraceEvent] = deque(maxlen=limit)
        self._lock = threading.Lock()
        self._offset = time.time() - time.monotonic()

    @property
    def dropped(self) -> int:
        """Events that had to make room for newer ones."""
        return self.recorded - len(self._events)

    def event(self, name: str, **fields: Any) -> None:
        """Record that something happened now."""
        if not self.on:
            return
        with self._lock:  # under it, so that the order of the events is that of their times
            self._events.append(TraceEvent(time.monotonic(), self._offset, self._rank, name, fields))
            self.recorded += 1

    def events(self) -> list[TraceEvent]:
        """Return the events that are there, oldest first."""
        with self._lock:
            return list(self._events)


def merge(traces: Iterable[Iterable[TraceEvent]], one_machine: bool = False) -> list[TraceEvent]:
    """Return the events of several ranks in the order of their times; one_machine: by the clock that they share."""
    events = itertools.chain.from_iterable(traces)
    return sorted(events, key=lambda event: event.time if one_machine else event.wall)


#: events that begin and end something: Perfetto shows a bar
_BEGIN, _END = ".begin", ".end"


def to_chrome(events: Iterable[TraceEvent]) -> list[dict[str, Any]]:
    """Return events in Chrome's trace event format, for Perfetto or ``chrome://tracing``: a process for each rank.

    Times in microseconds since the epoch. What begins and ends is an async slice, since a rank does many things at once.
    """
    found = []
    for event in events:
        fields = {name: _plain(value) for name, value in event.fields.items()}
        kind = event.name.partition(".")[0]
        entry = {"name": event.name, "cat": kind, "ts": event.wall * 1e6, "pid": event.rank, "tid": 0, "args": fields}
        if event.name.endswith((_BEGIN, _END)):
            begins = event.name.endswith(_BEGIN)
            title = [str(fields[one]) for one in ("call", "oid", "peer") if one in fields]
            entry |= {"ph": "b" if begins else "e", "name": " ".join([kind, *title])}
            entry["id"] = "/".join(str(fields.get(one, "")) for one in ("id", "oid", "slot", "peer", "call", "key"))
        else:
            entry |= {"ph": "i", "s": "p"}
        found.append(entry)
    return found


def write_chrome(path: str | os.PathLike[str], events: Iterable[TraceEvent]) -> None:
    """Write events of one rank, or of several, to a file that Perfetto opens: a JSON array, an event on each line."""
    lines = [json.dumps(entry) for entry in to_chrome(events)]
    with open(path, "w", encoding="utf-8") as file:
        file.write("[\n" + ",\n".join(lines) + "\n]\n")


def _plain(value: Any) -> Any:
    """Return what JSON can hold."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(one) for one in value]
    return str(value)
