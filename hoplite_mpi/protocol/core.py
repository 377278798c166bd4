"""The object protocol of one rank: sans-IO, driven by a store, by tests, or by a simulator."""

from __future__ import annotations

from hoplite_mpi.config import Config
from hoplite_mpi.protocol import events as ev
from hoplite_mpi.protocol import messages as ms
from hoplite_mpi.protocol.client import Client
from hoplite_mpi.protocol.directory import Directory
from hoplite_mpi.protocol.events import Event, Instruction
from hoplite_mpi.protocol.participant import Participant
from hoplite_mpi.protocol.port import Port
from hoplite_mpi.protocol.view import View

__all__ = ["Protocol"]

#: what an owner gets; it waits for the last report
_FOR_OWNER = (
    ms.Announce,
    ms.Get,
    ms.Cancel,
    ms.Completed,
    ms.Forget,
    ms.Evict,
    ms.Spilled,
    ms.Watch,
    ms.Unwatch,
    ms.Delete,
    ms.Retire,
    ms.LocationsQuery,
    ms.ReduceRequest,
    ms.SourceWatch,
    ms.Source,
    ms.SourceGone,
    ms.RootDone,
    ms.SlotLost,
    ms.ChildLost,
)
_FOR_PARTICIPANT = (ms.SlotStart, ms.SlotChild, ms.SlotStop)


class Protocol:
    """The object protocol of one rank.

    Not thread-safe: one thread calls `handle`. Events before the first `ViewInstalled` are allowed; what they ask for
    is asked of the owners once there is a view.
    """

    directory_class: type[Directory] = Directory

    def __init__(self, rank: int, config: Config | None = None) -> None:
        self._port = Port(rank, config or Config())
        self.participant = Participant(self._port)
        self.client = Client(self._port, self.participant)
        self.directory = self.directory_class(self._port)
        #: messages of views that are not installed here yet, in the order they came
        self._early: list[ev.MessageReceived] = []
        #: messages for the owner that wait for the last report
        self._waiting: list[ev.MessageReceived] = []
        #: results that wait for it, too: made final before, they would not be in this rank's own report
        self._results: list[ev.InlineReduced] = []

    @property
    def view(self) -> View:
        """The view that holds; number 0 before the first."""
        return self._port.view

    @property
    def ready(self) -> bool:
        """Whether every member has reported to this rank in this view."""
        return self.directory.ready

    def handle(self, event: Event) -> list[Instruction]:
        """Take in one event and return what is to be done, in this order."""
        port = self._port
        if isinstance(event, ev.ViewInstalled):
            self._install(event.view)
        elif isinstance(event, ev.MessageReceived):
            self._receive(event)
        elif isinstance(event, ev.LinksMeasured):
            port.links = event.links
        elif isinstance(event, ev.InlineReduced):
            self._results.append(event)
            self._release()
        elif isinstance(event, (ev.SlotDone, ev.SlotFailed, ev.ChildFailed)):
            self.participant.handle_event(event)
            if isinstance(event, ev.SlotDone):
                self.client.root_done(event.rid, event.generation)
        else:
            self.client.handle_event(event)
        while port.loopback:
            self._receive(ev.MessageReceived(port.rank, port.loopback.popleft()))
        instructions, port.instructions = port.instructions, []
        return instructions

    def _install(self, view: View) -> None:
        port = self._port
        if view.number <= port.view.number:
            return
        port.view = view
        port.loopback.clear()
        self._waiting.clear()
        self.directory.install()
        for dst, report in self.client.install().items():
            port.send(dst, report)
        early, self._early = self._early, []
        for event in early:
            self._receive(event)

    def _receive(self, event: ev.MessageReceived) -> None:
        message = event.message
        if message.view != self._port.number:
            # an older one is covered by the sender's report; a newer one waits until the view is here
            if message.view > self._port.number:
                self._early.append(event)
            return
        if isinstance(message, ms.Report):
            self.directory.report(event.src, message)
            self._release()
        elif isinstance(message, _FOR_OWNER):
            if self.directory.ready:
                self.directory.handle(event.src, message)
            else:
                self._waiting.append(event)
        elif isinstance(message, _FOR_PARTICIPANT):
            self._participate(message)
        else:
            self.client.handle(message)

    def _release(self) -> None:
        if not self.directory.ready:
            return
        waiting, self._waiting = self._waiting, []
        for event in waiting:
            self.directory.handle(event.src, event.message)
        results, self._results = self._results, []
        for result in results:
            self.directory.handle_event(result)

    def _participate(self, message: ms.Message) -> None:
        client, participant = self.client, self.participant
        if isinstance(message, ms.SlotStart):
            if participant.start(message, client.holds(message.source)) and message.is_root:
                client.root_started(message.rid, message.generation, message.meta)
        elif isinstance(message, ms.SlotChild):
            participant.child(message)
        elif isinstance(message, ms.SlotStop):
            participant.stop(message)
            client.root_stopped(message.rid, message.generation)
