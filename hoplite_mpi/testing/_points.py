"""The fault points of `hoplite_mpi`, and what a process is at each of them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

__all__ = ["POINTS", "Point"]


class Point(NamedTuple):
    """Where a process can be made to fail."""

    #: what the process is to the others there
    role: str
    text: str


_HOLDER = "holder short of memory"
_PUTTER, _GETTER, _SENDER, _MIDDLE = "putter", "receiver", "sender", "middle of a chain"
_OWNER, _DELETER = "owner of the directory entry", "deleter"
_COORDINATOR, _ROOT, _INNER, _LEAF = "reduce coordinator", "reduce root", "reduce inner slot", "reduce leaf"
_CHIEF, _HEIR, _MEMBER, _JOINER = "membership coordinator", "its successor", "member", "joiner"
_ACCEPTER, _CONNECTER, _COLLECTIVE = "accepter", "connecter", "member in a collective"

#: name → role and place; a message's point is passed just before it is sent, or when it has come and is not yet handled
POINTS: Mapping[str, Point] = MappingProxyType(
    {
        "put.sealed": Point(_PUTTER, "the bytes are in the arena, nobody has been told"),
        "put.announced": Point(_PUTTER, "the owner is told and has not confirmed"),
        "put.piece": Point(_PUTTER, "others may receive what is copied so far, and the rest is not"),
        "put.copied": Point(_PUTTER, "all is copied and accepted, and nobody on the node can map it yet"),
        "spill.written": Point(_HOLDER, "an object is on the disk under another name, to make room"),
        "spill.renamed": Point(_HOLDER, "an object is both on the disk and in memory"),
        "spill.unnamed": Point(
            _HOLDER, "an object is on the disk, and its file in memory has lost its name and is still there"
        ),
        "spill.vacated": Point(_HOLDER, "an object is on the disk alone, and nobody knows"),
        "evict.asked": Point(_HOLDER, "about to ask whether its copy can go"),
        "evict.granted": Point(_OWNER, "about to say that the copies of a node can go"),
        "evict.heard": Point(_HOLDER, "its copy can go, and has not gone"),
        "arena.before_rename": Point(_PUTTER, "a file is complete and has not its name yet"),
        "arena.after_rename": Point(_PUTTER, "a file has its name, and the process does not know it yet"),
        "delete.asked": Point(_DELETER, "the deleter is about to tell the owner"),
        "delete.renamed": Point(_DELETER, "a file of the arena has lost its name and is still there"),
        "delete.told": Point(_OWNER, "the owner is about to tell a rank that an object is deleted"),
        "delete.heard": Point(_MEMBER, "a rank has been told that an object is deleted"),
        "directory.announced": Point(_OWNER, "an announcement has come"),
        "directory.asked": Point(_OWNER, "a request for an object has come"),
        "directory.answer": Point(_OWNER, "about to answer, with a location or the bytes"),
        "rebuild.report": Point(_MEMBER, "about to send one of its reports in a new view"),
        "rebuild.reported": Point(_OWNER, "the next of the reports has come"),
        "rebuild.first_answer": Point(_OWNER, "about to say the first thing since it has rebuilt its shard"),
        "transfer.pulled": Point(_GETTER, "the sender has been asked for the bytes"),
        "transfer.chunk_sent": Point(_SENDER, "about to send a chunk"),
        "transfer.chunk_relayed": Point(_MIDDLE, "about to send a chunk of what has not arrived here to its end"),
        "transfer.chunk_received": Point(_GETTER, "a chunk has come"),
        "transfer.completed": Point(_GETTER, "all has come, and the owner has not been told"),
        "transfer.stop": Point(_GETTER, "the sender has been told to stop"),
        "transfer.stopped": Point(_SENDER, "about to say how much was under way when it stopped"),
        "transfer.drained": Point(_GETTER, "all that was under way of a stopped transfer has come"),
        "reduce.requested": Point(_COORDINATOR, "a reduce is asked for"),
        "reduce.source": Point(_COORDINATOR, "a source is there"),
        "reduce.slot_given": Point(_COORDINATOR, "about to give a slot to a rank"),
        "reduce.child_given": Point(_COORDINATOR, "about to tell a slot of its child"),
        "reduce.root_done": Point(_ROOT, "the root has the whole result, and nobody knows"),
        "reduce.before_final": Point(_COORDINATOR, "the root is done, and the result is not final"),
        "reduce.final_told": Point(_COORDINATOR, "about to tell a rank that the result is final"),
        "reduce.after_final": Point(_COORDINATOR, "the result is final, and all are told"),
        "reduce.final_heard": Point(_MEMBER, "it is told that a result is final"),
        "reduce.root_started": Point(_ROOT, "the root's slot begins"),
        "reduce.inner_started": Point(_INNER, "an inner slot begins"),
        "reduce.leaf_started": Point(_LEAF, "a slot without children begins"),
        "reduce.chunk": Point(_INNER, "a slot, the root's too, is about to combine a chunk"),
        "membership.join_heard": Point(_CHIEF, "somebody asks to be let in"),
        "membership.propose": Point(_CHIEF, "about to propose a view to a member"),
        "membership.vote": Point(_CHIEF, "a member has accepted the view"),
        "membership.tell": Point(_CHIEF, "the view is decided, and the next one is about to be told"),
        "membership.prepare": Point(_HEIR, "about to ask a member to follow it"),
        "membership.promised": Point(_HEIR, "a member follows it"),
        "membership.promise": Point(_MEMBER, "about to promise a successor to follow it"),
        "membership.accept": Point(_MEMBER, "about to accept a proposed view"),
        "membership.install": Point(_MEMBER, "a view is decided, and not in force here"),
        "membership.installed": Point(_MEMBER, "a view is in force here"),
        "join.hello": Point(_JOINER, "it has asked to be let in"),
        "join.let_in": Point(_JOINER, "it knows that it is let in, and has done nothing yet"),
        "join.in": Point(_JOINER, "its first view is in force"),
        "join.before_accept": Point(_ACCEPTER, "about to accept"),
        "join.in_accept": Point(_ACCEPTER, "in accept"),
        "join.accepted": Point(_ACCEPTER, "accept has come back"),
        "join.before_connect": Point(_CONNECTER, "about to connect"),
        "join.in_connect": Point(_CONNECTER, "in connect"),
        "join.connected": Point(_CONNECTER, "connect has come back"),
        "collective.put": Point(_COLLECTIVE, "its part is put"),
        "collective.wait": Point(_COLLECTIVE, "about to wait for the others' part or the result"),
        "collective.finished": Point(_COLLECTIVE, "it has its result"),
        "collective.table": Point(_COLLECTIVE, "about to tell a newcomer the numbers of its calls"),
        "collective.begins": Point(_JOINER, "about to tell a member what it begins with"),
    }
)
