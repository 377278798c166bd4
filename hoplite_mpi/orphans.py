"""What members of this node that are gone have left on it: objects go on being served, or are freed."""

from __future__ import annotations

from collections.abc import Callable

from hoplite_mpi.ids import ObjectID
from hoplite_mpi.memory import Arena, Memory, ObjectInfo
from hoplite_mpi.objects import Objects
from hoplite_mpi.protocol import events as ev
from hoplite_mpi.protocol.view import View
from hoplite_mpi.transport.engine import Engine

__all__ = ["Orphans"]


class Orphans:
    """Takes over what the dead have left. Called under the engine's lock."""

    def __init__(
        self, engine: Engine, arena: Arena, memory: Memory, objects: Objects, handle: Callable[[ev.Event], None]
    ) -> None:
        self._engine = engine
        self._arena = arena
        self._memory = memory
        self._objects = objects
        self._handle = handle
        self._view = View(0)

    def adopt(self, view: View, rank: int, node: str) -> None:
        """Go on serving what members that are not in *view* left: the lowest rank of the node does, unless another has a copy."""
        self._view = view
        lowest = rank == min(m.rank for m in view.members.values() if m.node == node)
        for found in self._memory.objects():
            if view.has(found.rank, found.incarnation):
                continue
            if self._objects.holds(found.oid, found.version):
                self._arena.adopt(found.oid, found.version)
            elif lowest:
                self._adopt(found)

    def _adopt(self, found: ObjectInfo) -> None:
        if found.version:
            # Whether a reduced object is final is not known from its bytes: it stays if another rank of the node has a copy. By then that
            # one will have installed this view, and taken it over, or be out.
            patience = self._engine.config.evict_timeout
            self._engine.after(patience, lambda: self._remove(found.oid, found.version))
        elif self._objects.has(found.oid):
            return  # it is being received here
        elif found.provisional:  # its put has not returned, and other bytes may have won its id
            self._memory.delete(found.oid)
        else:
            self._arena.adopt(found.oid)
            self._objects.stored(found.oid, found.meta)
            self._handle(ev.AdoptObject(found.oid, found.meta, found.digest))

    def _remove(self, oid: ObjectID, version: int) -> None:
        """Free a reduced object that nobody on this node has taken over."""
        if self._objects.holds(oid, version):
            return
        for found in self._memory.objects():
            if (found.oid, found.version) == (oid, version) and not self._view.has(found.rank, found.incarnation):
                self._memory.delete(oid, version)
