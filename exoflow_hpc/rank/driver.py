"""What a controller does for its parts (`Effects`, `Commits`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from exoflow_hpc import records
from exoflow_hpc import scheduler_events as ev
from exoflow_hpc.errors import ExoFlowError
from exoflow_hpc.rank import messages as ms

__all__ = ["Driver", "Which"]

#: (task, attempt)
Which = tuple[int, int]


class Driver(Protocol):
    """Seen from a part of the controller. All calls come inside of the loop."""

    def append(
        self,
        record: records.Record,
        durable: Callable[[], None],
        failed: Callable[[BaseException], None] | None = None,
    ) -> None:
        """Journal a record; *durable* or *failed* follows (default: `broken`)."""

    def send(self, rank: int, message: ms.Message) -> None:
        """Send a message to an agent."""

    def tell(self, event: ev.Event) -> None:
        """Give the scheduler an event."""

    def say(self, text: str) -> None:
        """Tell the user."""

    def post(self, call: Callable[[], None]) -> None:
        """Have *call* called as soon as the one under way is over."""

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Have *call* called later."""

    def is_running(self, which: Which, rank: int) -> bool:
        """Whether an attempt is still meant to run on *rank*."""

    def is_there(self, rank: int) -> bool:
        """Whether a rank takes part."""

    def broken(self, error: ExoFlowError) -> None:
        """The epoch can't go on."""

    def continued(self, task: int, attempt: int) -> None:
        """What a task continues with is durable, or what it has returned though it had continued before."""

    def begin_again(self) -> None:
        """The epoch ends, and the next one begins with what the journal says then."""
