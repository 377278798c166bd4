"""A world in which the scheduler runs workflows: ranks with memory, a journal, and an outside that remembers every effect.

It does one thing at a time, whichever it is told to, and compares all that can be seen with a run in which nothing fails.
The values of tasks that vary are never the same twice, so whoever sees two of one task is found out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from exoflow_hpc import records
from exoflow_hpc.rank.messages import InputPlace
from exoflow_hpc.rank.references import Key, Put, References
from exoflow_hpc.scheduler import Scheduler
from exoflow_hpc.scheduler_events import (
    AttemptsOver,
    CancelAttempt,
    Commit,
    CommitFailed,
    Dispatch,
    Event,
    Finish,
    Instruction,
    ObjectsLost,
    RankJoined,
    RankLost,
    Release,
    Rollback,
    RollbackEnded,
    RollbackFailed,
    RolledBack,
    Start,
    TaskCommitted,
    TaskFailed,
    TaskFinished,
    Void,
    Voided,
)
from exoflow_hpc.settings import Settings
from exoflow_hpc.spec import TaskSpec, WorkflowSpec
from exoflow_hpc.succession import Lineage, Stand, Survivor, agreeing, era_of
from exoflow_hpc.task_table import Held

__all__ = ["Attempt", "Commitment", "Facts", "Value", "World", "make_spec", "recovery_set"]

#: what a task made: its index, which of its values it is (0 if it always makes the same), and what went in, by value or by reference
Value = tuple[int, int, tuple[Any, ...]]
#: a commit that is under way: task, attempt, value, and all that it refers to
Commitment = tuple[int, int, Value, tuple[Key, ...]]
SETTINGS = Settings(max_rank_losses=10**6, max_commit_retries=10**6, retry_backoff=0)


def make_spec(rows: Sequence[dict[str, Any]], max_retries: int = 10**6) -> WorkflowSpec:
    """Return a spec; each row has what is not the default of a task: data, after, barriers, checkpoint, annotations."""
    tasks = []
    for index, row in enumerate(rows):
        fields: dict[str, Any] = {
            "kind": "task",
            "data": (),
            "after": (),
            "barriers": (),
            "checkpoint": "skip",
            "max_retries": max_retries,
            "op": "",
            **row,
        }
        tasks.append(TaskSpec(index=index, name=f"t{index}", function="", args=b"", retry="", blobs=(), **fields))
    return WorkflowSpec(tuple(tasks), len(tasks) - 1, "", {})


@dataclass
class Facts:
    """What outlives a crash: the journal, and the outside."""

    #: task → (attempt, value)
    committed: dict[int, tuple[int, Value]] = field(default_factory=dict)
    #: external tasks that were started and not undone since, in the order of their first start
    effects: dict[int, None] = field(default_factory=dict)
    incarnations: dict[int, int] = field(default_factory=dict)
    #: external tasks that were undone, and not committed since
    owed: set[int] = field(default_factory=set)
    #: those of them whose rollback was begun
    undoing: set[int] = field(default_factory=set)
    #: committed task → lineage of its attempt; external task → (last attempt that was started, its lineage)
    stands: dict[int, Stand] = field(default_factory=dict)
    starts: dict[int, tuple[int, Stand]] = field(default_factory=dict)
    #: task → highest attempt
    attempts: dict[int, int] = field(default_factory=dict)
    #: (task, incarnation) → what the effect was made from; once only, unless it is harmless
    outside: dict[tuple[int, int], tuple[Any, ...]] = field(default_factory=dict)
    #: how many values of tasks that vary there have been
    nonce: int = 0
    #: task → what its committed output refers to, all of it durable
    references: dict[int, list[records.Reference]] = field(default_factory=dict)
    #: what is behind an object that was put: the value of the attempt that did
    contents: dict[Key, Value] = field(default_factory=dict)

    def copy(self) -> Facts:
        return Facts(
            dict(self.committed),
            dict(self.effects),
            dict(self.incarnations),
            set(self.owed),
            set(self.undoing),
            dict(self.stands),
            dict(self.starts),
            dict(self.attempts),
            dict(self.outside),
            self.nonce,
            dict(self.references),
            dict(self.contents),
        )

    def key(self) -> Any:
        """What tells it from others."""
        return (
            tuple(sorted((task, value) for task, (_, value) in self.committed.items())),
            tuple(self.effects),
            tuple(sorted(self.incarnations.items())),
            tuple(sorted(self.owed)),
            tuple(sorted(self.undoing)),
            tuple(sorted(self.outside.items())),
        )


@dataclass(eq=False)
class Attempt:
    task: int
    attempt: int
    rank: int
    incarnation: int
    order: Any
    values: tuple[Value, ...] | None
    #: of the task, as it was told
    life: int
    canceled: bool = False
    acted: bool = False
    rollback: bool = False
    #: its rank is lost, but it may go on
    ghost: bool = False
    #: what it was given by reference, directly
    given: tuple[Key, ...] = ()


class World:
    """One workflow, from epoch to epoch.

    choose: returns one of the actions it is given; facts: what there is already; ranks: number of ranks, slots of each; large:
    tasks whose outputs are; puts: task → how many objects it puts, of which each refers to the one before, and the first to what
    the task was given; passing: tasks that return all references that they were given. All that is given is read.
    """

    def __init__(
        self,
        spec: WorkflowSpec,
        choose: Callable[[list[Callable[[], None]]], Callable[[], None]],
        facts: Facts | None = None,
        ranks: int = 1,
        slots: int = 4,
        large: Collection[int] = (),
        puts: Mapping[int, int] | None = None,
        passing: Collection[int] = (),
    ) -> None:
        self.spec = spec
        self.choose = choose
        self.facts = facts or Facts()
        self.ranks = ranks
        self.slots = slots
        self.large = large
        self.puts = puts or {}
        self.passing = passing
        self.incarnations = [0] * ranks
        #: what may still be at work after a crash
        self.ghosts: list[Attempt] = []
        self.epoch = 0
        self.live: dict[int, int] = {}
        self.memory: dict[tuple[int, int], tuple[int, Value]] = {}
        #: (task, attempt) → its lineage, as the rank that runs it was told
        self.stands: dict[tuple[int, int], Stand] = {}
        self.running: list[Attempt] = []
        self.begin()

    def begin(self) -> None:
        """Start an epoch: all memory is new, only the facts stay."""
        self.live, self.memory, self.stands, self.running = {}, {}, {}, []
        self.renumber()
        self.control({}, {}, 0)
        for rank in range(self.ranks):
            self.join(rank)
        self.tell(Start())

    def control(self, held: dict[int, Held], running: dict[int, tuple[int, int]], era: int) -> None:
        """Make a controller; held, running, era: what it finds."""
        facts = self.facts
        self.epoch += 1
        #: objects in memory → their rank
        self.objects: dict[Key, int] = {}
        #: those that are gone, and nobody has noticed
        self.unnoticed: set[Key] = set()
        self.references = References(
            {task: self.record(task) for task in facts.committed}, lambda name: int(name.removeprefix("t"))
        )
        self.commits: list[Commitment] = []
        self.voiding: list[int] = []
        #: rollbacks that have ended, and whose records are on their way
        self.recording: list[Attempt] = []
        self.undelivered: list[Event] = []
        self.finish: Finish | None = None
        #: task → how often it was started in this epoch
        self.ran: dict[int, int] = {}
        self.undone: list[int] = []
        self.scheduler = Scheduler(
            self.spec,
            facts.committed,
            attempts=facts.attempts,
            settings=SETTINGS,
            effects=list(facts.effects),
            unseen=[(one.task, one.attempt) for one in self.ghosts],
            owed=facts.owed,
            undoing=facts.undoing & set(facts.effects),
            held=held,
            running=running,
            era=era,
        )
        self.lineage = Lineage(self.spec.tasks, ())

    def lose_controller(self, rank: int, ghosts: bool, gets_through: Callable[[], bool]) -> None:
        """Lose the rank that controls the run; another one goes on with what there is.

        ghosts: external tasks that ran on it may go on for a while. gets_through: whether a record that is on its way is in the journal.
        """
        facts = self.facts
        for task in self.voiding:
            if gets_through():
                facts.committed.pop(task, None)
        for commit in self.commits:
            if commit[0] not in self.voiding and not self.references.to_write(commit[3]) and gets_through():
                self.record_commit(commit)
        for run in self.recording:
            if gets_through():
                self.record_rollback(run)
        self.renumber()
        self.live.pop(rank, None)
        self.memory = {key: kept for key, kept in self.memory.items() if kept[0] != rank}
        gone = [run for run in self.running if run.rank == rank or run.rollback or run.ghost or run.canceled]
        self.running = [run for run in self.running if run not in gone]
        for run in gone:
            if (self.spec.tasks[run.task].external or run.rollback) and (ghosts or run.rank != rank):
                run.ghost = True
                self.ghosts.append(run)
        # what refers to objects is not taken over
        for which in self.memory:
            if self.references.all_of(which):
                self.stands[which] = None
        for run in self.running:
            if run.given:
                self.stands[run.task, run.attempt] = None
        survivors = [
            Survivor(task, attempt, where, False, self.stands[task, attempt])
            for (task, attempt), (where, _) in self.memory.items()
        ]
        survivors += [
            Survivor(run.task, run.attempt, run.rank, True, self.stands[run.task, run.attempt]) for run in self.running
        ]
        kept = agreeing(
            self.spec.tasks,
            {task: attempt for task, (attempt, _) in facts.committed.items()},
            {task: facts.starts[task][0] for task in facts.effects if task not in facts.undoing},
            [facts.stands[task] for task in facts.committed] + [facts.starts[task][1] for task in facts.effects],
            (),
            survivors,
        )
        ended = [run for run in self.running if kept.get(run.task) != _survivor(run, self.stands)]
        self.running = [run for run in self.running if run not in ended]
        for run in ended:
            if self.spec.tasks[run.task].external:
                run.ghost = True
                self.ghosts.append(run)
        self.memory = {
            (task, attempt): value
            for (task, attempt), value in self.memory.items()
            if task in kept and not kept[task].running and kept[task].attempt == attempt
        }
        nbytes = {task: 1 << 20 if task in self.large else 1 for task in kept}
        self.control(
            {
                task: Held(one.attempt, one.rank, self.live[one.rank], nbytes[task])
                for task, one in kept.items()
                if not one.running
            },
            {task: (one.attempt, one.rank) for task, one in kept.items() if one.running},
            era_of(self.epoch + 1),
        )
        for other, incarnation in self.live.items():
            self.tell(RankJoined(other, incarnation, self.slots))
        for task, one in kept.items():
            self.lineage.adopt(task, one.attempt, one.stand)
        self.tell(Start())

    def record(self, task: int) -> records.TaskCommitted:
        references = self.facts.references.get(task, [])
        attempt = self.facts.committed[task][0]
        return records.TaskCommitted(f"t{task}", attempt, 0, records.Inline(b""), "", 0, [], [], references)

    def join(self, rank: int) -> None:
        self.incarnations[rank] += 1
        self.live[rank] = self.incarnations[rank]
        self.tell(RankJoined(rank, self.incarnations[rank], self.slots))

    def tell(self, event: Event) -> None:
        for instruction in self.scheduler.handle(event):
            self.obey(instruction)

    # ------------------------------------------------------------------------------------------ instructions, checked
    def obey(self, what: Instruction) -> None:
        assert self.finish is None, f"{what} after the end"
        if isinstance(what, Dispatch):
            self.dispatch(what)
        elif isinstance(what, Commit):
            if (what.task, what.attempt) in self.memory:
                keys = self.references.all_of((what.task, what.attempt))
                self.commits.append((what.task, what.attempt, self.memory[what.task, what.attempt][1], keys))
            else:
                assert self.comes_as_lost(what.task, what.attempt)
        elif isinstance(what, Void):
            self.commits = [commit for commit in self.commits if commit[0] != what.task]
            self.voiding.append(what.task)
        elif isinstance(what, Rollback):
            self.roll_back(what)
        elif isinstance(what, Release):
            self.forget((what.task, what.attempt))
        elif isinstance(what, CancelAttempt):
            for run in self.running:
                if (run.task, run.attempt) == (what.task, what.attempt):
                    run.canceled = True
        else:
            self.finish = what

    def dispatch(self, order: Dispatch) -> None:
        task, facts = self.spec.tasks[order.task], self.facts
        assert order.task not in facts.committed, f"{task.name} is committed and runs again"
        assert order.attempt > facts.attempts.get(order.task, -1), "an attempt number is used twice"
        busy = [run for run in self.running if run.task == order.task and not run.canceled and not run.ghost]
        assert not busy, f"{task.name} runs twice at a time"
        for barrier in task.barriers:
            assert barrier in facts.committed
        life = facts.incarnations.get(order.task, 0)
        if task.external:
            others = [run for run in (*self.running, *self.ghosts) if run.task == order.task]
            assert not others, f"{task.name} is started while an attempt of it may still act"
            facts.effects.setdefault(order.task)
        for before in task.after:
            acted = not self.spec.tasks[before].external or any(key[0] == before for key in facts.outside)
            assert acted, f"{task.name} starts after t{before}, whose effect is undone"
        facts.attempts[order.task] = order.attempt
        inputs = [
            (
                one.task,
                facts.committed[one.task][0] if one.source == "checkpoint" else one.attempt,
                one.task in facts.committed,
            )
            for one in order.inputs
        ]
        stand = self.stands[order.task, order.attempt] = self.lineage.dispatched(order.task, order.attempt, inputs)
        if task.external:
            facts.starts[order.task] = (order.attempt, stand)
        self.ran[order.task] = self.ran.get(order.task, 0) + 1
        run = Attempt(
            order.task, order.attempt, order.rank, self.live[order.rank], order, self.read(order.inputs), life
        )
        run.given = self.given(order.inputs)
        self.running.append(run)

    def roll_back(self, order: Rollback) -> None:
        task = self.spec.tasks[order.task]
        assert task.rollback
        others = [run for run in (*self.running, *self.ghosts) if run.task == order.task]
        assert not others, f"{task.name} is undone while an attempt of it may still act"
        later = list(self.facts.effects)[list(self.facts.effects).index(order.task) + 1 :]
        assert not set(later) & self.scheduler._undoing._undo, "an effect that began later is still to be undone"
        self.facts.attempts[order.task] = order.attempt
        self.facts.undoing.add(order.task)
        life = self.facts.incarnations.get(order.task, 0)
        run = Attempt(order.task, order.attempt, order.rank, self.live[order.rank], order, (), life, rollback=True)
        self.running.append(run)

    def comes_as_lost(self, task: int, attempt: int) -> bool:
        return any(isinstance(event, ObjectsLost) and (task, attempt) in event.outputs for event in self.undelivered)

    def read(self, inputs: Any) -> tuple[Value, ...] | None:
        values = []
        for one in inputs:
            if one.source == "checkpoint":
                values.append(self.facts.committed[one.task][1])
            elif (one.task, one.attempt) in self.memory:
                values.append(self.memory[one.task, one.attempt][1])
            else:
                assert self.comes_as_lost(one.task, one.attempt)
                return None
        keys, missing = self.leads_to(inputs)
        for key in missing:
            holders = [(i.task, i.attempt) for i in inputs if key in self.references.all_of((i.task, i.attempt))]
            assert key in self.unnoticed or any(self.comes_as_lost(*which) for which in holders)
        behind = {self.facts.contents[key] for key in keys}
        return None if missing else (*values, *sorted(behind))

    # ------------------------------------------------------------------------------------------------------ references
    def given(self, inputs: Any) -> tuple[Key, ...]:
        """Return what inputs refer to directly, as the controller tells agents."""
        found: dict[Key, None] = {}
        for one in inputs:
            if one.source == "memory":
                found.update(dict.fromkeys(self.references.direct((one.task, one.attempt))))
            else:
                stored = self.facts.references.get(one.task, [])
                found.update(dict.fromkeys(self.references.key(reference) for reference in stored))
        return tuple(found)

    def leads_to(self, inputs: Any) -> tuple[list[Key], list[Key]]:
        """Return all that inputs refer to, and what of it is not where it is said to be."""
        places = self.references.places([(InputPlace(0, "memory"), self.given(inputs))])
        keys = [(place.task, place.attempt, place.index) for place in places]
        memory = [key for key, place in zip(keys, places, strict=True) if place.kind == "memory"]
        return keys, [key for key in memory if key not in self.objects]

    def make_references(self, run: Attempt, value: Value) -> None:
        """Have an attempt put its objects, and return references to them, and perhaps to what it was given."""
        which, before, puts = (run.task, run.attempt), run.given, {}
        for index in range(self.puts.get(run.task, 0)):
            key = (*which, index)
            puts[key] = Put(1, run.rank, before)
            self.objects[key] = run.rank
            self.facts.contents[key] = value
            before = (key,)
        direct = (*puts, *(run.given if run.task in self.passing else ()))
        # what nothing refers to is dropped: each object but the last is referred to by the next one
        self.references.made(which, direct, puts)

    def forget(self, which: tuple[int, int]) -> None:
        """An output is not in memory any more, nor what only it referred to."""
        self.memory.pop(which, None)
        for key in self.references.gone(which):
            self.objects.pop(key, None)

    def write(self, key: Key) -> None:
        """The bytes of an object become durable, or are found to be gone."""
        if key in self.objects:
            place = records.InCheckpoint("f", "e")
            assert self.references.written(key, f"t{key[0]}", place, "", 1, [])
        else:
            self.undelivered.append(ObjectsLost(tuple(self.references.lost([key]))))
            self.unnoticed.discard(key)

    def lose_value(self, key: Key, noticed: bool) -> None:
        """The only copy of an object is gone."""
        del self.objects[key]
        if noticed:
            self.undelivered.append(ObjectsLost(tuple(self.references.lost([key]))))
        else:
            self.unnoticed.add(key)

    # --------------------------------------------------------------------------------------------------- what happens
    def actions(self) -> list[Callable[[], None]]:
        """Return all that may happen next."""
        found: list[Callable[[], None]] = []
        for run in (*self.running, *self.ghosts):
            external = self.spec.tasks[run.task].external
            if not run.acted and (external or run.rollback):
                found.append(lambda run=run: self.act(run))
            if not run.ghost and (run.acted or not external or run.canceled):
                found.append(lambda run=run: self.end(run))
        for commit in self.commits:
            unwritten = self.references.to_write(commit[3])
            for key in unwritten:
                if key in self.objects or key in self.unnoticed:
                    found.append(lambda key=key: self.write(key))
            if commit[0] not in self.voiding and not unwritten:  # the journal keeps their order
                found.append(lambda commit=commit: self.end_commit(commit))
        for run in self.recording:
            found.append(lambda run=run: self.end_record(run))
        for task in self.voiding:
            found.append(lambda task=task: self.end_void(task))
        for event in self.undelivered:
            found.append(lambda event=event: self.deliver(event))
        return found

    def step(self) -> None:
        actions = self.actions()
        if not actions and self.any_ghosts():
            self.lease_over()
            return
        assert actions, f"stuck: {[self.scheduler.story(t) for t in range(len(self.spec.tasks))]}"
        self.choose(actions)()

    def any_ghosts(self) -> bool:
        return bool(self.ghosts) or any(run.ghost for run in self.running)

    def act(self, run: Attempt) -> None:
        """The effect of an attempt, or of a rollback, happens."""
        run.acted = True
        key = (run.task, run.life)
        if run.rollback:
            self.facts.outside.pop(key, None)
            return
        if run.values is None:
            return  # it will find out that its inputs are lost
        known = self.facts.outside.get(key)
        if self.spec.tasks[run.task].idempotent:
            assert known in (None, run.values), (
                f"t{run.task} acts twice, and not in the same way: {known}, {run.values}"
            )
        else:
            assert known is None, f"t{run.task} acts twice"
        self.facts.outside[key] = run.values

    def end(self, run: Attempt) -> None:
        self.running.remove(run)
        if run.rollback:
            if not run.acted:
                self.act(run)
            self.recording.append(run)
            self.tell(RollbackEnded(run.task, run.attempt))
            return
        if run.canceled and not run.acted:
            self.tell(TaskFailed(run.task, run.attempt, "canceled"))
            return
        if run.values is None:
            gone = tuple(
                (i.task, i.attempt)
                for i in run.order.inputs
                if i.source == "memory" and (i.task, i.attempt) not in self.memory
            )
            _, keys = self.leads_to(run.order.inputs)
            self.unnoticed.difference_update(keys)
            lost = tuple(self.references.lost(keys))
            self.tell(TaskFailed(run.task, run.attempt, "lost-input", missing=(*gone, *lost)))
            if lost and self.finish is None:  # also if nobody waits for that attempt any more
                self.lose(lost)
            for which in gone:
                if not self.scheduler.is_held(*which):
                    self.forget(which)
            return
        nonce = 0
        if not self.spec.tasks[run.task].deterministic:
            self.facts.nonce += 1
            nonce = self.facts.nonce
        value = (self.identity(run.task), nonce, run.values)
        continued = self.continues(run, value)
        self.memory[run.task, run.attempt] = (run.rank, value)
        self.make_references(run, value)
        # a large output of a task with "auto" that took no time is not worth a write that does
        refers = self.references.all_of((run.task, run.attempt))
        nbytes = 1 << 20 if run.task in self.large or refers else 1
        missing = self.references.missing((run.task, run.attempt))
        if missing:
            self.undelivered.append(ObjectsLost(tuple(self.references.lost(missing))))
        write_seconds = float(run.attempt % 2)
        self.tell(TaskFinished(run.task, run.attempt, run.rank, nbytes, 0.0, write_seconds, continued=continued))

    # what `continuing.ContinuingWorld` does otherwise
    def renumber(self) -> None:
        """Take the tasks that there are by now."""

    def identity(self, task: int) -> int:
        """Return what a task is called in values."""
        return task

    def continues(self, run: Attempt, value: Value) -> bool:
        """Whether an attempt that made *value* continues with a DAG."""
        return False

    def end_record(self, run: Attempt) -> None:
        """The journal says that an effect is undone."""
        self.recording.remove(run)
        self.record_rollback(run)
        self.undone.append(run.task)
        self.tell(RolledBack(run.task, run.attempt))

    def record_rollback(self, run: Attempt) -> None:
        self.facts.incarnations[run.task] = run.life + 1
        self.facts.owed.add(run.task)
        self.facts.undoing.discard(run.task)
        del self.facts.effects[run.task]

    def end_commit(self, commit: Commitment) -> None:
        self.commits.remove(commit)
        self.record_commit(commit)
        self.tell(TaskCommitted(*commit[:2]))

    def record_commit(self, commit: Commitment) -> None:
        task, attempt, value, keys = commit
        if task not in self.facts.committed:
            self.facts.committed[task] = (attempt, value)
            self.facts.references[task] = self.references.table(keys)
            self.facts.stands[task] = self.stands[task, attempt]
        self.facts.owed.discard(task)

    def end_void(self, task: int) -> None:
        self.voiding.remove(task)
        self.facts.committed.pop(task, None)
        self.facts.references.pop(task, None)
        self.tell(Voided(task))

    def deliver(self, event: Event) -> None:
        self.undelivered.remove(event)
        if isinstance(event, ObjectsLost):
            self.lose(event.outputs)
        else:
            self.tell(event)

    def lose(self, outputs: tuple[tuple[int, int], ...]) -> None:
        self.tell(ObjectsLost(outputs))
        for which in outputs:
            self.forget(which)

    def lease_over(self) -> None:
        """Whoever may still have been at work is not any more."""
        over = [run for run in (*self.running, *self.ghosts) if run.ghost]
        self.running = [run for run in self.running if not run.ghost]
        self.ghosts = []
        self.tell(AttemptsOver(tuple((run.task, run.attempt) for run in over)))

    # --------------------------------------------------------------------------------------------------------- faults
    def kill_rank(self, rank: int, certain: bool, late: bool = False) -> None:
        """late: what it was writing gets through."""
        incarnation = self.live.pop(rank)
        lost = tuple(key for key, (where, _) in self.memory.items() if where == rank)
        self.memory = {key: kept for key, kept in self.memory.items() if kept[0] != rank}
        keys = [key for key, where in self.objects.items() if where == rank]
        for key in keys:
            del self.objects[key]
        lost = tuple(dict.fromkeys((*lost, *self.references.lost(keys))))
        self.commits = [commit for commit in self.commits if late or commit[:2] not in lost]
        there = [run for run in self.running if run.rank == rank and not run.ghost]
        self.running = [run for run in self.running if run not in there]
        self.undelivered.append(ObjectsLost(lost))
        self.tell(RankLost(rank, incarnation, certain))
        if not certain:
            for run in there:
                if self.spec.tasks[run.task].external:
                    run.ghost = True
                    self.running.append(run)

    def fail_attempt(self, run: Attempt) -> None:
        self.running.remove(run)
        if run.rollback:
            self.tell(RollbackFailed(run.task, run.attempt, "no"))
        else:
            self.tell(TaskFailed(run.task, run.attempt, "crash"))

    def fail_commit(self, commit: Commitment) -> None:
        self.commits.remove(commit)
        self.tell(CommitFailed(commit[0], commit[1]))

    def crash(self, ghosts: bool = False) -> None:
        """All memory is lost; ghosts: external tasks may go on where they are, for a while."""
        self.ghosts += [run for run in self.running if ghosts and self.spec.tasks[run.task].external]
        for run in self.ghosts:
            run.ghost = True
        self.begin()

    # ------------------------------------------------------------------------------------------------------ the end
    def run(self) -> None:
        steps = 0
        while self.finish is None:
            self.step()
            steps += 1
            assert steps < 5000, "it does not end"

    def check_end(self) -> None:
        """It ended as a run without failures does."""
        spec, facts = self.spec, self.facts
        assert self.finish == Finish("SUCCESSFUL", spec.output), self.finish
        seen: dict[int, Value] = {}
        for task, (_, value) in facts.committed.items():
            assert value[0] == self.identity(task)
            _see(value, seen)
        for task in spec.tasks:
            if task.external:
                lives = [life for index, life in facts.outside if index == task.index]
                life = facts.incarnations.get(task.index, 0)
                assert lives == [life], f"{task.name} acted in its lives {lives}, and is in {life}"
                for value in facts.outside[task.index, life]:
                    _see(value, seen)


def _see(value: Value, seen: dict[int, Value]) -> None:
    pending = [value]
    while pending:
        one = pending.pop()
        known = seen.setdefault(one[0], one)
        assert known is one or known == one, f"two values of t{one[0]} were seen: {known} and {one}"
        if known is one:
            pending.extend(one[2])


def _survivor(run: Attempt, stands: dict[tuple[int, int], Stand]) -> Survivor:
    return Survivor(run.task, run.attempt, run.rank, True, stands[run.task, run.attempt])


def recovery_set(spec: WorkflowSpec, facts: Facts) -> tuple[set[int], set[int]]:
    """Return what has to run after a crash, and which effects have to be undone, the naive way (R5, R6)."""
    tasks = spec.tasks
    committed, void, roots = set(facts.committed), set[int](), {spec.output, *facts.owed}
    roots |= facts.undoing
    while True:
        begun = committed | (set(facts.effects) - void)
        happened: set[int] = set()
        for task in tasks:
            for up in (*task.data, *task.after, *task.barriers):
                if task.index in begun:
                    happened |= {up} | _all_before(tasks, up)
        happened -= void | facts.owed
        need = set(roots) - committed
        while (
            more := {up for i in need for up in (*tasks[i].data, *(set(tasks[i].after) - happened), *tasks[i].barriers)}
            - committed
            - need
        ):
            need |= more
        stale = {i for i in need if not tasks[i].deterministic}
        below: set[int] = set()
        for task in tasks:
            if set(task.data) & (stale | below):
                below.add(task.index)
        fresh = (below & (committed | set(facts.effects))) - void
        if not fresh:
            break
        void |= fresh
        committed -= fresh
        roots |= {i for i in fresh if tasks[i].external}
    undo = {
        i
        for i in facts.effects
        if i in void | facts.undoing or (i in need and tasks[i].rollback and not tasks[i].idempotent)
    }
    return need, undo


def _all_before(tasks: Sequence[TaskSpec], index: int) -> set[int]:
    direct = {*tasks[index].data, *tasks[index].after, *tasks[index].barriers}
    return direct.union(*(_all_before(tasks, up) for up in direct))
