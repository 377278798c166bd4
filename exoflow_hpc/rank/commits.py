"""From outputs in memory to records of the journal, and back: what is committed, on its way, void or damaged (R1, R5, R11, R12)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exoflow_hpc import records, serialize
from exoflow_hpc import scheduler_events as ev
from exoflow_hpc.history import Facts
from exoflow_hpc.rank import messages as ms
from exoflow_hpc.rank.driver import Driver
from exoflow_hpc.rank.effects import Effects
from exoflow_hpc.rank.failure import Failure
from exoflow_hpc.rank.outputs import NOTHING, Output
from exoflow_hpc.rank.references import Key, References, Which
from exoflow_hpc.rank.seen import Seen
from exoflow_hpc.rank.writes import Writes
from exoflow_hpc.spec import WorkflowSpec
from exoflow_hpc.succession import Lineage, plain
from hoplite_mpi.testing import fault

__all__ = ["Commits"]


#: location, checksum, nbytes and meta of an output
_Durable = tuple[records.Location, str, int, list[Any]]


@dataclass(eq=False)
class _Pending:
    """The commit of an output that refers to something: its record waits for the bytes of all of that (R1)."""

    #: all that it refers to
    keys: tuple[Key, ...]
    #: those of them that are being written
    waiting: set[Key]
    #: the output itself, once it is durable
    output: _Durable | None = None
    #: its record was made
    over: bool = False


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
        references: References,
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
        self._references = references
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
        #: the same for objects that outputs refer to → rank
        self._writing_puts: dict[Key, int] = {}
        #: outputs with references whose commits were begun
        self._pending: dict[Which, _Pending] = {}
        #: `Output.continued` of those whose commits were begun and are not durable
        self._continuing: dict[Which, str] = {}

    # -- commits

    def begin(self, task: int, attempt: int, rank: int) -> None:
        """Commit an output that is in memory: *rank* writes it first, unless it is small, and so is all that it refers to."""
        output = self._outputs[task]
        if output.continued:
            self._continuing[task, attempt] = output.continued
        keys = self._references.all_of((task, attempt))
        if keys:
            self._begin_puts(task, attempt, rank, keys)
        if output.data is None:
            self._writing[task] = (attempt, rank)
            self.writes.began(task)
            self._driver.send(rank, ms.Write(self._epoch, task, attempt))
            return
        checksum = serialize.checksum(output.meta, output.data) if not output.checksum else output.checksum
        place, meta = records.Inline(output.data), output.meta.to_wire()
        self._is_durable(task, attempt, (place, checksum, output.meta.nbytes, meta))

    def _begin_puts(self, task: int, attempt: int, rank: int, keys: tuple[Key, ...]) -> None:
        """Have written what no file has; all at once, so that it can go into one file with the output."""
        where = self._references.to_write(keys)
        self._pending[task, attempt] = _Pending(keys, set(where))
        for key, home in where.items():
            if key not in self._writing_puts and home >= 0:  # else it is lost, and this output is about to be
                self._writing_puts[key] = writer = home if self._driver.is_there(home) else rank
                self._driver.send(writer, ms.Write(self._epoch, *key))

    def written(self, message: ms.Written) -> None:
        """An output, or an object that was put, is durable in a file that no record names."""
        place = records.InCheckpoint(message.file, message.entry)
        if message.index >= 0:
            self._put_written(message, place)
            return
        if self._writing.get(message.task, (-1, -1))[0] == message.attempt:
            del self._writing[message.task]
            self.writes.ended(message.task, message.nbytes)
        self._is_durable(message.task, message.attempt, (place, message.checksum, message.nbytes, message.meta))

    def _put_written(self, message: ms.Written, place: records.InCheckpoint) -> None:
        key = (message.task, message.attempt, message.index)
        self._writing_puts.pop(key, None)
        name = self._spec.tasks[message.task].name
        if not self._references.written(key, name, place, message.checksum, message.nbytes, message.meta):
            return
        self._told(message.nbytes)
        for which, pending in list(self._pending.items()):
            if key in pending.waiting:
                pending.waiting.discard(key)
                self._go_on(which, pending)

    def _is_durable(self, task: int, attempt: int, output: _Durable) -> None:
        """The output itself is: what it refers to may not be yet."""
        pending = self._pending.get((task, attempt))
        if pending is None:
            self._commit(task, attempt, output, ())
        else:
            pending.output = output
            self._go_on((task, attempt), pending)

    def _go_on(self, which: Which, pending: _Pending) -> None:
        if pending.output is not None and not pending.waiting and not pending.over:
            pending.over = True
            self._commit(*which, pending.output, pending.keys)

    def write_failed(self, message: ms.WriteFailed) -> bool:
        """An output could not be written; return whether its bytes are lost."""
        if message.index >= 0:
            key = (message.task, message.attempt, message.index)
            if self._writing_puts.pop(key, None) is None or message.lost:
                return message.lost
            waiting = [which for which, pending in self._pending.items() if key in pending.waiting]
        else:
            if self._writing.get(message.task, (-1, -1))[0] != message.attempt:
                return False
            del self._writing[message.task]
            if message.lost:
                return True
            waiting = [(message.task, message.attempt)]
        for task, attempt in waiting:
            self._driver.say(f"task {self._spec.tasks[task].name} could not be saved: {message.text}")
            self._driver.tell(ev.CommitFailed(task, attempt, Failure("commit", message.text)))
        return False

    def rank_lost(self, rank: int) -> None:
        """What it was writing is written by another one."""
        failed = {(task, attempt): None for task, (attempt, writer) in self._writing.items() if writer == rank}
        self._writing = {task: which for task, which in self._writing.items() if which[1] != rank}
        puts = {key for key, writer in self._writing_puts.items() if writer == rank}
        self._writing_puts = {key: writer for key, writer in self._writing_puts.items() if key not in puts}
        failed.update({which: None for which, pending in self._pending.items() if puts & pending.waiting})
        for task, attempt in failed:
            self._driver.tell(ev.CommitFailed(task, attempt, "the rank that wrote it was lost"))

    def _commit(self, task: int, attempt: int, output: _Durable, keys: Sequence[Key]) -> None:
        place, checksum, nbytes, meta = output
        references = self._references.table(keys)
        if attempt <= self._void_up_to.get(task, -1):
            return
        continued = self._continuing.get((task, attempt), "")
        if self.deviates(task, records.seen_as(checksum, references, continued)):
            return
        name, life = self._spec.tasks[task].name, self._effects.incarnation(task)
        consumed = self.seen.by(task, self.committed)
        stand = plain(self._lineage.of(task, attempt), self._spec.tasks)
        record = records.TaskCommitted(
            name, attempt, life, place, checksum, nbytes, meta, consumed, references, stand, continued
        )
        self._appended.setdefault(task, attempt)

        def durable() -> None:
            fault.point("controller.committed")
            if self._appended.get(task) != attempt:
                return  # it was voided meanwhile
            self.committed[task] = record
            self._references.stands(record)
            self.seen.committed(task)
            self._effects.committed(task, record)
            self._told(nbytes)
            if continued or task in self._spec.ends:  # the workflow is another one from here on
                self._continuing.pop((task, attempt), None)
                fault.point("controller.continued")
                self._driver.continued(task, attempt)
            else:
                self._driver.tell(ev.TaskCommitted(task, attempt))

        def failed(error: BaseException) -> None:
            self._driver.tell(ev.CommitFailed(task, attempt, error, retryable=False))

        self._driver.append(record, durable, failed)

    @property
    def are_continuing(self) -> bool:
        """Whether something that a task continues with is about to be durable, unless that fails."""
        return bool(self._continuing)

    def kept(self, task: int) -> list[Any]:
        """Return where an output is for good, or what it is: what a rollback of a task that takes it will be given."""
        record = self.committed.get(task)
        if record is not None and record.continued:
            place = records.Inline(NOTHING.to_bytes())
            return [place.to_wire(), NOTHING.meta.to_wire(), serialize.checksum(NOTHING.meta, place.data)]
        if record is not None:
            kept: list[Any] = [record.location.to_wire(), record.meta, record.checksum]
            return [*kept, [one.to_wire() for one in record.references]] if record.references else kept
        output = self._outputs[task]
        assert output.data is not None, "a large input, or one that refers to something, was committed before"
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
            self.seen.voided(task, known.seen_as)

        def durable() -> None:
            fault.point("controller.voided")
            self._driver.tell(ev.Voided(task))

        if attempt is None:
            self._driver.post(durable)
        else:
            record = records.TaskVoided(self._spec.tasks[task].name, attempt, _LOST, lost=True)
            self._driver.append(record, durable)

    def damaged(self, message: ms.Corrupt) -> None:
        """A committed output, or what it refers to, is not what was written (R11): the epoch ends with the record of that."""
        found = {task: record for task, record in self.committed.items() if self._is_in(message, task, record)}
        if self._damaged.issuperset(found) and (found or message.index < 0):
            return
        self._damaged.update(found)
        names = ", ".join(record.task_id for record in found.values())
        self._driver.say(f"{message.text}; task {names or self._spec.tasks[message.task].name} runs again")
        if not found:  # it was not committed, so the next epoch will not know of it
            self._driver.begin_again()
        for record in found.values():  # durable together, or in this order
            voided = records.TaskVoided(record.task_id, record.attempt, message.text)
            last = record is next(reversed(found.values()))
            self._driver.append(voided, self._driver.begin_again if last else _nothing)

    def _is_in(self, message: ms.Corrupt, task: int, record: records.TaskCommitted) -> bool:
        if message.index < 0:
            return (task, record.attempt) == (message.task, message.attempt)
        key = (message.task, message.attempt, message.index)
        return any(self._references.key(one) == key for one in record.references)

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


def _nothing() -> None:
    pass
