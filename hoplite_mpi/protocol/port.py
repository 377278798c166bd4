"""What the machines of one rank share: the view, and the way out."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from hoplite_mpi.config import Config
from hoplite_mpi.ids import ObjectID
from hoplite_mpi.protocol.events import Instruction, Send
from hoplite_mpi.protocol.links import Links
from hoplite_mpi.protocol.view import View

if TYPE_CHECKING:
    from hoplite_mpi.protocol.messages import Message

__all__ = ["Port"]


class Port:
    """Collects instructions.

    Keeps messages to oneself back for `Protocol`, so that a rank treats itself like any other.
    """

    def __init__(self, rank: int, config: Config) -> None:
        self.rank = rank
        self.config = config
        #: what is known of the links; the driver tells of better values
        self.links = Links.of_config(config)
        #: number 0 and empty before the first view
        self.view = View(0)
        self.instructions: list[Instruction] = []
        #: messages of this rank to itself, in order
        self.loopback: deque[Message] = deque()
        self._counter = 0

    @property
    def number(self) -> int:
        """Number of the view: every message gets it."""
        return self.view.number

    def owner(self, oid: ObjectID) -> int:
        """Return the rank that owns the shard of *oid* in this view."""
        return self.view.owner(bytes(oid))

    def send(self, dst: int, message: Message) -> None:
        """Send to a rank, this one included."""
        if dst == self.rank:
            self.loopback.append(message)
        else:
            self.instructions.append(Send(dst, message))

    def emit(self, instruction: Instruction) -> None:
        """Hand an instruction to the driver."""
        self.instructions.append(instruction)

    def generation(self) -> int:
        """Return a number above all that any owner gave in an older view: the view's number above 32 bits of a counter.

        Two ranks may give the same one in the same view, but never for the same id, which has one owner.
        """
        self._counter += 1
        return self.view.number << 32 | self._counter
