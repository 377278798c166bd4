"""Which call of a collective matches which, who takes part in it, and when its objects may go.

The calls with one key are numbered on each rank; equal numbers match. A process that joins begins after the highest number that any
elder had reached when it took in the newcomer's view: each elder sends it its numbers then, and the newcomer tells all members what it
begins with. Until that is known nobody begins a call in a view with the newcomer.

A call's objects go when all have finished it. Everybody tells the lowest member (the *janitor*) how far it is, which tells everybody
what is over; if the janitor changes, everybody tells the new one.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgpack

from hoplite_mpi.errors import GetTimeoutError, HopliteError
from hoplite_mpi.protocol.view import Member, View
from hoplite_mpi.testing import fault
from hoplite_mpi.transport.primitives import Waiter

if TYPE_CHECKING:
    from hoplite_mpi.ids import ObjectID
    from hoplite_mpi.store import ObjectStore

__all__ = ["CHANNEL", "Process", "Round", "Rounds"]

#: the store's channel that rounds use; those of `Mailbox` go from 1 to 100
CHANNEL = 101
#: finished calls that are not urgent, after which the janitor is told
_REPORT_EVERY = 16
#: kinds of messages: an elder's numbers, to a newcomer; what a newcomer begins with; what a rank has finished; what is over for all;
#: what a rank that is about to leave waits for to be over
_TABLE, _BEGINS, _FINISHED, _OVER, _LEAVING = range(5)

Process = tuple[int, int]
Table = dict[str, int]


@dataclass(eq=False)
class Round:
    """One call on this rank."""

    key: str
    number: int
    me: Process
    #: processes that take part as far as this rank knows, itself included, by rank
    processes: list[Process]
    #: rank → its newest process that is gone, as far as this rank has seen
    gone: dict[int, Process]
    #: objects that this rank has to do with
    objects: list[ObjectID] = field(default_factory=list)
    #: an object of it takes shared memory here: the janitor is told at once when it is finished
    urgent: bool = False
    #: it raised here: others may have gone on to objects of which this rank has not heard, and which go on until all have given up
    failed: bool = False
    #: this rank needs nothing of it any more; what a call waits for after it has returned may end later than the next call
    finished: bool = False


class Rounds:
    """The collective calls of one store. Methods may be called by any thread."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._me: Process = store.runtime.me
        #: guards all below: a call is counted under it, and the numbers for a newcomer are read under it
        self._lock = threading.Lock()
        self._waiters: set[Waiter] = set()
        #: key → number of the last call begun here
        self._begun: Table = {}
        #: key → number of the last call that is finished here with all before it
        self._finished: Table = {}
        #: calls finished here since the janitor was told, and their keys
        self._unreported = 0
        self._changed_keys: set[str] = set()
        #: key → number of the last call for whose end somebody waits
        self._urgent: Table = {}
        #: janitor only: process → what it has finished
        self._progress: dict[Process, Table] = {}
        #: key → number of the last call that all have finished
        self._over: Table = {}
        #: key → calls whose objects are still here, oldest first
        self._kept: dict[str, deque[Round]] = {}
        #: newcomer only: elder → its numbers
        self._tables: dict[Process, Table] = {}
        #: process that is no elder → what it began with
        self._begins: dict[Process, Table] = {}
        #: juniors that were sent this rank's numbers
        self._told: set[Process] = set()
        self._gone: dict[int, Process] = {}
        self._view = View(0)
        self._joined = 0
        self._newcomer = False
        #: a founder begins with nothing; a newcomer when it has the numbers of all elders
        self._settled = False
        self._post = store.channel(CHANNEL, self._receive)
        view = store.on_view(self._changed)
        self._changed(view, ())

    # -- calls ---------------------------------------------------------------------------------------------------------------

    def begin(self, key: str, seconds: float | None) -> Round:
        """Count a call and return it; waits for newcomers to say what they begin with. GetTimeoutError."""
        found: list[Round] = []

        def count() -> bool:
            if not found and not self._unknown():
                number = self._begun[key] = self._begun.get(key, 0) + 1
                members = sorted((m.rank, m.incarnation) for m in self._view.members.values())
                processes = [p for p in members if self._begins.get(p, {}).get(key, 0) < number]
                found.append(Round(key, number, self._me, processes, dict(self._gone)))
                self._kept.setdefault(key, deque()).append(found[0])
            return bool(found)

        self._wait(count, seconds)
        return found[0]

    def next(self, key: str, seconds: float | None) -> int:
        """Return the number that the next call will have; waits until a newcomer knows it. GetTimeoutError."""
        self._wait(lambda: self._settled, seconds)
        with self._lock:
            return self._begun.get(key, 0) + 1

    def _wait(self, condition: Callable[[], bool], seconds: float | None) -> None:
        """Wait until *condition()*, which is called under the lock."""
        runtime = self._store.runtime
        runtime.check()

        def done() -> bool:
            with self._lock:
                return condition() or self._store.closed

        waiter = runtime.engine.waiter()
        with self._lock:
            self._waiters.add(waiter)
        try:
            if not runtime.engine.wait(done, waiter.block, seconds):
                raise GetTimeoutError(
                    f"ranks {self._unknown()} have joined and not said where they begin in {seconds:g} s"
                )
        finally:
            with self._lock:
                self._waiters.discard(waiter)
        runtime.check()

    def finish(self, call: Round) -> None:
        """This rank needs nothing of that call any more."""
        key = call.key
        with self._lock:
            call.finished = True
            open_calls = (one.number for one in self._kept.get(key, ()) if not one.finished)
            self._finished[key] = next(open_calls, self._begun[key] + 1) - 1
            self._changed_keys.add(key)
            self._unreported += 1
            urgent = call.urgent or call.failed or call.number <= self._urgent.get(key, 0)
            if not urgent and self._unreported < _REPORT_EVERY:
                return
            report = {changed: self._finished[changed] for changed in self._changed_keys}
            self._unreported, self._changed_keys = 0, set()
            janitor = min(self._view.members)
        self._send(janitor, _FINISHED, report)

    def leave(self, seconds: float) -> None:
        """Wait until all have finished what this rank has, so that they don't miss it when it is gone; at most so long."""
        with self._lock:
            table = {key: calls[-1].number for key, calls in self._kept.items()}
            others = [rank for rank in self._view.members if rank != self._me[0]]
        if not table or not others or self._store.closed:
            return
        for rank in (*others, self._me[0]):
            self._send(rank, _LEAVING, table)
        with contextlib.suppress(HopliteError):  # in time or not: it leaves
            self._wait(lambda: not self._kept, seconds)

    @property
    def kept(self) -> int:
        """Number of calls whose objects are still here."""
        with self._lock:
            return sum(len(calls) for calls in self._kept.values())

    def _unknown(self) -> list[int]:
        """Return the ranks that have joined and not said what they begin with; own rank if it doesn't know itself."""
        if not self._settled:
            return [self._me[0]]
        newcomers = (m for m in self._view.members.values() if self._is_junior(m) or self._is_twin(m))
        return [m.rank for m in newcomers if (m.rank, m.incarnation) not in self._begins]

    def _is_junior(self, member: Member) -> bool:
        return member.joined > self._joined

    def _is_twin(self, member: Member) -> bool:
        """Whether it joined with this process, and neither is a founder."""
        return self._newcomer and member.joined == self._joined and member.rank != self._me[0]

    # -- views and messages; called one at a time, in the order in which they came -----------------------------------------------

    def _changed(self, view: View, _: tuple[Member, ...]) -> None:
        with self._lock:
            if view.number <= self._view.number:
                return
            first = self._view.number == 0
            before = {(m.rank, m.incarnation) for m in self._view.members.values()}
            janitor = min(self._view.members, default=-1)
            self._view = view
            if first:
                self._joined = view.members[self._me[0]].joined
                self._newcomer = any(m.joined < self._joined for m in view.members.values())
                self._settled = not self._newcomer
            for process in before:
                if not view.has(*process):
                    self._gone[process[0]] = max(process, self._gone.get(process[0], process))
                    for table in (self._progress, self._tables, self._begins):
                        table.pop(process, None)
                    self._told.discard(process)
            begins = self._settle()
            report = dict(self._finished) if min(view.members) != janitor else {}
        self._tell_newcomers(begins)
        if report:
            self._send(min(view.members), _FINISHED, report)
        self._clean()
        self._wake()

    def _receive(self, peer: Process, payload: bytes) -> None:
        kind, table = msgpack.unpackb(payload)
        begins: Table | None = None
        with self._lock:
            if kind == _TABLE:
                self._tables[peer] = table
                begins = self._settle()
            elif kind == _BEGINS:
                self._begins[peer] = table
                self._merge(self._progress.setdefault(peer, {}), table)
            elif kind == _FINISHED:
                self._merge(self._progress.setdefault(peer, {}), table)
        self._tell_newcomers(begins)
        if kind == _LEAVING:
            self._hurry(table)
        elif kind == _OVER:
            self._retire(table)
        else:
            self._clean()
        self._wake()

    def _hurry(self, table: Table) -> None:
        """Somebody waits until these calls are over: report them at once."""
        with self._lock:
            self._merge(self._urgent, table)
            report = {key: self._finished[key] for key in table if key in self._finished}
            janitor = min(self._view.members, default=-1)
        if report:
            self._send(janitor, _FINISHED, report)

    @staticmethod
    def _merge(into: Table, table: Table) -> None:
        for key, number in table.items():
            into[key] = max(number, into.get(key, 0))

    def _settle(self) -> Table | None:
        """A newcomer that has the numbers of all elders that live begins behind them; return these if it is so now."""
        elders = [m for m in self._view.members.values() if m.joined < self._joined]
        if self._settled or not self._view.number or any((m.rank, m.incarnation) not in self._tables for m in elders):
            return None
        for table in self._tables.values():
            self._merge(self._begun, table)
        self._merge(self._finished, self._begun)
        self._settled = True
        self._begins[self._me] = dict(self._begun)
        return dict(self._begun)

    def _tell_newcomers(self, begins: Table | None) -> None:
        """Tell all what this rank begins with, if it has just settled; and those younger than this rank its numbers."""
        with self._lock:
            others = [rank for rank in self._view.members if rank != self._me[0] and begins is not None]
            juniors = [m for m in self._view.members.values() if self._is_junior(m)] if self._settled else []
            new = [m for m in juniors if (m.rank, m.incarnation) not in self._told]
            self._told.update((m.rank, m.incarnation) for m in new)
            table = dict(self._begun)
        for rank in others:
            fault.point("collective.begins")
            self._send(rank, _BEGINS, begins or {})
        for member in new:
            fault.point("collective.table")
            self._send(member.rank, _TABLE, table)

    def _send(self, rank: int, kind: int, table: Table) -> None:
        self._post(rank, msgpack.packb((kind, table)))

    def _wake(self) -> None:
        with self._lock:
            waiters = list(self._waiters)
        for waiter in waiters:
            waiter.wake()

    # -- cleaning up -----------------------------------------------------------------------------------------------------------

    def _clean(self) -> None:
        """The janitor tells everybody what all have finished."""
        with self._lock:
            members = [(m.rank, m.incarnation) for m in self._view.members.values()]
            # none yet: who installed the first view of this process earlier than it did has been quick
            if not members or min(members)[0] != self._me[0]:
                return
            over: Table = {}
            for key in set().union(*self._progress.values()):
                least = min(self._progress.get(process, {}).get(key, 0) for process in members)
                if least > self._over.get(key, 0):
                    over[key] = least
            self._over.update(over)
        if over:
            for rank, _ in members:
                self._send(rank, _OVER, over)

    def _retire(self, over: Table) -> None:
        """Forget the objects of calls that all have finished."""
        oids: list[ObjectID] = []
        told: list[ObjectID] = []
        with self._lock:
            self._merge(self._over, over)
            for key, number in over.items():
                calls = self._kept.get(key, deque())
                while calls and calls[0].number <= number:
                    call = calls.popleft()
                    oids += call.objects
                    told += self._tells(call)
                if not calls:
                    self._kept.pop(key, None)
        if oids:
            self._store.retire(oids, told)

    def _tells(self, call: Round) -> list[ObjectID]:
        """Return the objects whose owners this rank tells that they are over: its own, and those of nobody if it is the lowest.

        Of a call that failed a rank tells of all: who failed early does not know what others went on to.
        """
        if call.failed:
            return list(dict.fromkeys(call.objects))
        lowest = next((p for p in call.processes if self._view.has(*p)), None) == self._me
        return [
            oid
            for oid in dict.fromkeys(call.objects)
            if oid.origin == self._me or (lowest if oid.origin is None else not self._view.has(*oid.origin))
        ]
