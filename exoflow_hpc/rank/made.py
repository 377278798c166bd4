"""What a rank has made in a run, as far as it remembers: for a controller that takes over from one that is lost (E16)."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["Made", "MadeOutputs"]

#: bytes of small outputs that are remembered at most; what was forgotten is made again after a loss of the controller
_LARGEST = 16 << 20
#: bytes that an entry counts for beside those of the output
_OVERHEAD = 256


@dataclass(frozen=True, slots=True)
class Made:
    """An output that this rank has made. data: the bytes of a small one, else it is an object of the store."""

    #: name of the task
    task: str
    attempt: int
    meta: list[Any]
    nbytes: int
    data: bytes | None
    #: as in `messages.Run`
    stand: list[Any] | None

    @property
    def cost(self) -> int:
        """What remembering it costs, in bytes."""
        return _OVERHEAD + len(self.data or b"") + 64 * len(self.stand or ())


class MadeOutputs:
    """The latest outputs, as many as there is room for. Every operation but `keep` is O(1)."""

    def __init__(self, largest: int = _LARGEST) -> None:
        self._largest = largest
        self._size = 0
        #: (task, attempt) → output, the oldest first
        self._outputs: dict[tuple[str, int], Made] = {}

    def add(self, made: Made) -> None:
        """Remember an output."""
        self._outputs[made.task, made.attempt] = made
        self._size += made.cost
        while self._size > self._largest and len(self._outputs) > 1:
            self._size -= self._outputs.pop(next(iter(self._outputs))).cost

    def keep(self, which: Collection[tuple[str, int]]) -> None:
        """Forget all but those."""
        self._outputs = {key: made for key, made in self._outputs.items() if key in which}
        self._size = sum(made.cost for made in self._outputs.values())

    def clear(self) -> None:
        """Forget all."""
        self._outputs.clear()
        self._size = 0

    def all(self) -> Iterable[Made]:
        """Return what is remembered, the oldest first."""
        return self._outputs.values()
