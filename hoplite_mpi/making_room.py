"""Spilling, as the store of one rank does it: what may simply go is dropped, and the directory is told of the rest."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from hoplite_mpi.errors import HopliteError
from hoplite_mpi.ids import ObjectID
from hoplite_mpi.memory import Spill
from hoplite_mpi.protocol import events as ev

if TYPE_CHECKING:
    from hoplite_mpi.runtime import Runtime

__all__ = ["RoomMaker"]


class _Question:
    def __init__(self) -> None:
        self.answered = threading.Event()
        self.granted = False


class RoomMaker:
    """Asks the protocol what is not the last copy. Called from threads that may wait, without the engine's lock."""

    def __init__(self, runtime: Runtime, spill: Spill) -> None:
        self._runtime = runtime
        self._questions: dict[tuple[ObjectID, int], _Question] = {}
        #: not before then is anything asked: the last question was lost, and who needs room has waited long enough
        self._ask_again = 0.0
        spill.give_up = self._give_up
        spill.on_moved = self._moved
        #: copies that were dropped, since another node has one
        self.evicted = 0

    def answer(self, what: ev.Evicted) -> None:
        """Take the protocol's answer; under the engine's lock."""
        question = self._questions.get((what.oid, what.version))
        self.evicted += what.granted
        if question is not None:
            question.granted = what.granted
            question.answered.set()

    def _give_up(self, key: tuple[ObjectID, int]) -> bool:
        """Return whether the copy of this node could go, and has gone."""
        runtime, question = self._runtime, _Question()

        def ask() -> None:
            self._questions[key] = question
            runtime.handle(ev.EvictRequested(*key))

        def forget() -> None:
            if self._questions.get(key) is question:
                del self._questions[key]

        if runtime.closed is not None or time.monotonic() < self._ask_again:
            return False
        try:
            runtime.engine.run(ask)
            # a change of view loses the question, and an owner that is stopped does not answer
            if not question.answered.wait(runtime.config.evict_patience):
                self._ask_again = time.monotonic() + runtime.config.stall_timeout
            runtime.engine.run(forget)
        except HopliteError:  # closed meanwhile
            return False
        return question.granted

    def _moved(self, key: tuple[ObjectID, int], spilled: bool) -> None:
        if self._runtime.closed is None:
            self._runtime.engine.run(lambda: self._runtime.handle(ev.ObjectSpilled(*key, spilled)))
