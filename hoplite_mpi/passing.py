"""Which fault point a rank passes when it sends or gets a message, or carries out an instruction; see `hoplite_mpi.testing.POINTS`.

Here, and not where the messages are made, since the protocol does nothing but compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hoplite_mpi.protocol import events as ev
from hoplite_mpi.protocol import membership_messages as mm
from hoplite_mpi.protocol import messages as ms
from hoplite_mpi.testing import fault

__all__ = ["arriving", "doing", "leaving", "membership_arriving", "membership_leaving", "membership_left"]

_Table = Mapping[type[Any], str]

_LEAVING: _Table = {
    ms.Delete: "delete.asked",
    ms.Evict: "evict.asked",
    ms.Evicted: "evict.granted",
    ms.Deleted: "delete.told",
    ms.Location: "directory.answer",
    ms.Inline: "directory.answer",
    ms.Report: "rebuild.report",
    ms.Completed: "transfer.completed",
    ms.SlotStart: "reduce.slot_given",
    ms.SlotChild: "reduce.child_given",
    ms.Final: "reduce.final_told",
}
_ARRIVING: _Table = {
    ms.Announce: "directory.announced",
    ms.Get: "directory.asked",
    ms.Report: "rebuild.reported",
    ms.Deleted: "delete.heard",
    ms.Evicted: "evict.heard",
    ms.ReduceRequest: "reduce.requested",
    ms.Source: "reduce.source",
    ms.RootDone: "reduce.before_final",
    ms.Final: "reduce.final_heard",
}
_MEMBERSHIP_LEAVING: _Table = {
    mm.Propose: "membership.propose",
    mm.Decided: "membership.tell",
    mm.Prepare: "membership.prepare",
    mm.Promise: "membership.promise",
    mm.Accepted: "membership.accept",
}
_MEMBERSHIP_LEFT: _Table = {mm.Join: "join.hello"}
_MEMBERSHIP_ARRIVING: _Table = {
    mm.Join: "membership.join_heard",
    mm.Accepted: "membership.vote",
    mm.Promise: "membership.promised",
}


def _pass(table: _Table, what: object) -> None:
    if fault.is_on() and (name := table.get(type(what))) is not None:
        fault.point(name)


def leaving(message: ms.Message) -> None:
    """A message of the object protocol is about to be sent."""
    _pass(_LEAVING, message)


def arriving(message: ms.Message) -> None:
    """A message of the object protocol has come."""
    _pass(_ARRIVING, message)


def membership_leaving(message: mm.Message) -> None:
    """A message of the membership is about to be sent."""
    _pass(_MEMBERSHIP_LEAVING, message)


def membership_left(message: mm.Message) -> None:
    """A message of the membership has been sent."""
    _pass(_MEMBERSHIP_LEFT, message)


def membership_arriving(message: mm.Message) -> None:
    """A message of the membership has come."""
    _pass(_MEMBERSHIP_ARRIVING, message)


def doing(what: ev.Instruction | ev.Event) -> None:
    """An instruction is about to be carried out, or an event to be told to the protocol."""
    if not fault.is_on():
        return
    if isinstance(what, ev.StartSlot):
        part = "root" if what.is_root else "inner" if what.num_children else "leaf"
        fault.point(f"reduce.{part}_started")
    elif isinstance(what, ev.SlotDone):
        fault.point("reduce.root_done")
