"""From outputs in memory to records of the journal, and back: what is committed, on its way, void or damaged (R1, R5, R11, R12)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from exoflow_hpc import records, serialize
from exoflow_hpc import scheduler_events as ev
from exoflow_hpc.history import Facts
from exoflow_hpc.rank import messages as ms
from exoflow_hpc.rank.driver import Driver
from exoflow_hpc.rank.effects import Effects
from exoflow_hpc.rank.failure import Failure
from exoflow_hpc.rank.outputs import Output
from exoflow_hpc.rank.seen import Seen
from exoflow_hpc.rank.writes import Writes
from exoflow_hpc.spec import WorkflowSpec
from exoflow_hpc.succession import Lineage, plain
from hoplite_mpi.testing import fault

__all__ = ["Commits"]

_LOST = "it was computed from an output that is lost and may come out another one"


class Commits:
    """The commits of one workflow, as the journal has them and this epoch changes them.

    outputs: those in memory, the controller's; committed: told the bytes of each output that has become durable.
    """

    def __init__(
        self,
        spec: WorkflowSpec,
        facts: Facts[int],
        outputs: Mapping[int, Output],
        effects: Effects,
        driver: Driver,
        epoch: int,
        lineage: Lineage,
        committed: Callable[[int], None],
    ) -> None:
        self._spec = spec
        self._epoch = epoch
        self._lineage = lineage
        self._outputs = outputs
        self._effects = effects
        self._driver = driver
        self._told = committed
        #: task → what the journal says of its output
        self.committed = facts.committed
        self.seen = Seen(spec, facts)
        #: what is known of the time that checkpoints take
        self.writes = Writes()
        #: task → attempt whose record of its commit was appended, durable or not, and was not voided since
        self._appended = {task: record.attempt for task, record in facts.committed.items()}
        #: task → latest attempt of it that is void: what still comes of it is dropped
        self._void_up_to: dict[int, int] = {}
        #: committed tasks whose output was found damaged
        self._damaged: set[int] = set()
        #: task → (attempt, rank) of a write that was asked for and not answered
        self._writing: dict[int, tuple[int, int]] = {}

    # -- commits

    def begin(self, task: int, attempt: int, rank: int) -> None:
        """Commit an output that is in memory: at once if it is small, else *rank* writes it first."""
        output = self._outputs[task]
        if output.data is None:
            self._writing[task] = (attempt, rank)
            self.writes.began(task)
            self._driver.send(rank, ms.Write(self._epoch, task, attempt))
            return
        checksum = output.checksum or serialize.checksum(output.meta, output.data)
        self._commit(task, attempt, records.Inline(output.data), checksum, output.meta.nbytes, output.meta.to_wire())

    def written(self, message: ms.Written) -> None:
        """An output is durable in a file that no record names."""
        if self._writing.get(message.task, (-1, -1))[0] == message.attempt:
            del self._writing[message.task]
            self.writes.ended(message.task, message.nbytes)
        place = records.InCheckpoint(message.file, message.entry)
        self._commit(message.task, message.attempt, place, message.checksum, message.nbytes, message.meta)

    def write_failed(self, message: ms.WriteFailed) -> bool:
        """An output could not be written; return whether its bytes are lost."""
        if self._writing.get(message.task, (-1, -1))[0] != message.attempt:
            return False
        del self._writing[message.task]
        if message.lost:
            return True
        self._driver.say(f"task {self._spec.tasks[message.task].name} could not be saved: {message.text}")
        self._driver.tell(ev.CommitFailed(message.task, message.attempt, Failure("commit", message.text)))
        return False

    def rank_lost(self, rank: int) -> None:
        """What it was writing is written by another one."""
        for task, (attempt, writer) in list(self._writing.items()):
            if writer == rank:
                del self._writing[task]
                self._driver.tell(ev.CommitFailed(task, attempt, "the rank that wrote it was lost"))

    def _commit(
        self, task: int, attempt: int, place: records.Location, checksum: str, nbytes: int, meta: list[Any]
    ) -> None:
        if attempt <= self._void_up_to.get(task, -1) or self.deviates(task, checksum):
            return
        name, life = self._spec.tasks[task].name, self._effects.incarnation(task)
        consumed = self.seen.by(task, self.committed)
        stand = plain(self._lineage.of(task, attempt), self._spec.tasks)
        record = records.TaskCommitted(name, attempt, life, place, checksum, nbytes, meta, consumed, stand)
        self._appended.setdefault(task, attempt)

        def durable() -> None:
            fault.point("controller.committed")
            if self._appended.get(task) != attempt:
                return  # it was voided meanwhile
            self.committed[task] = record
            self.seen.committed(task)
            self._effects.committed(task, record)
            self._told(nbytes)
            self._driver.tell(ev.TaskCommitted(task, attempt))

        def failed(error: BaseException) -> None:
            self._driver.tell(ev.CommitFailed(task, attempt, error, retryable=False))

        self._driver.append(record, durable, failed)

    def kept(self, task: int) -> list[Any]:
        """Return where an output is for good, or what it is: what a rollback of a task that takes it will be given."""
        record = self.committed.get(task)
        if record is not None:
            return [record.location.to_wire(), record.meta, record.checksum]
        output = self._outputs[task]
        assert output.data is not None, "a large input was committed before"
        checksum = output.checksum or serialize.checksum(output.meta, output.data)
        return [records.Inline(output.data).to_wire(), output.meta.to_wire(), checksum]

    # -- outputs that don't count any more

    def void(self, what: ev.Void) -> None:
        """Have outputs of a task up to an attempt count as absent (R5): its record is taken back, if there is one."""
        task = what.task
        self._writing.pop(task, None)
        self._void_up_to[task] = what.attempt
        attempt = self._appended.pop(task, None)
        known = self.committed.pop(task, None)
        if known is not None:
            self.seen.voided(task, known.checksum)

        def durable() -> None:
            fault.point("controller.voided")
            self._driver.tell(ev.Voided(task))

        if attempt is None:
            self._driver.post(durable)
        else:
            record = records.TaskVoided(self._spec.tasks[task].name, attempt, _LOST, lost=True)
            self._driver.append(record, durable)

    def damaged(self, message: ms.Corrupt) -> None:
        """A committed output is not what was written (R11): the epoch ends with the record of that, until when it stands."""
        record = self.committed.get(message.task)
        if record is None or record.attempt != message.attempt or message.task in self._damaged:
            return
        self._damaged.add(message.task)
        name = self._spec.tasks[message.task].name
        self._driver.say(f"{message.text}; task {name} runs again")
        self._driver.append(records.TaskVoided(name, message.attempt, message.text), self._driver.begin_again)

    def deviates(self, task: int, checksum: str) -> bool:
        """Whether a task that is taken to be deterministic gave another output than one that was seen: then the run begins again (R12)."""
        before = self.seen.deviation(task, checksum)
        if before is None:
            return False
        name = self._spec.tasks[task].name
        text = (
            f"task {name} is taken to be deterministic, but gave another output than before (checksum {checksum}, not {before}): "
            "declare it deterministic=False"
        )
        self._driver.say(f"{text}; what was computed from the first one runs again")

        def durable() -> None:
            fault.point("controller.deviated")
            self._driver.begin_again()

        self._driver.append(records.TaskDeviated(name, text), durable)
        return True
