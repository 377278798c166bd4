"""The scheduler, driven by a simulated cluster through random DAGs, orders, losses and restarts."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exoflow_hpc.scheduler import _AHEAD, Scheduler
from exoflow_hpc.scheduler_events import (
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
    RankShared,
    Recall,
    Release,
    RetryAfter,
    RetryDue,
    Start,
    TaskCommitted,
    TaskFailed,
    TaskFinished,
)
from exoflow_hpc.semantics import known_to_have_happened
from exoflow_hpc.settings import Settings
from exoflow_hpc.spec import TaskSpec, WorkflowSpec
from exoflow_hpc.task_table import TaskTable

SLOTS = 2


def random_spec(rng: random.Random, count: int) -> WorkflowSpec:
    tasks = []
    for index in range(count):
        upstream = list(range(index))
        rng.shuffle(upstream)
        data = tuple(upstream[: rng.choice([0, 1, 1, 2, 3])])
        if index == count - 1 and not data:
            data = tuple(upstream[:1])
        edges = rng.sample(range(index), min(index, rng.choice([0, 0, 0, 1, 2])))
        after = tuple(edge for edge in edges if rng.random() < 0.5)
        barriers = tuple(edge for edge in edges if edge not in after and tasks[edge].checkpoint != "skip")
        kind = "reduce" if data and rng.random() < 0.2 else "task"
        mode = rng.choice(["sync", "async", "skip"])
        tasks.append(TaskSpec(index, f"t{index}", kind, "", b"", data, after, barriers, mode, 100, "", "", ()))
    return WorkflowSpec(tuple(tasks), count - 1, "", {})


def true_values(spec: WorkflowSpec) -> list[int]:
    values: list[int] = []
    for task in spec.tasks:
        values.append(hash((task.index, tuple(values[upstream] for upstream in task.data))))
    return values


@dataclass
class Attempt:
    task: int
    attempt: int
    rank: int
    incarnation: int
    inputs: tuple
    values: list[int] | None
    canceled: bool = False


class Cluster:
    """Ranks with memory and a journal: does one random thing at a time, checks each instruction against the truth."""

    def __init__(self, spec: WorkflowSpec, rng: random.Random, faults: int, sharing: bool = True) -> None:
        self.spec = spec
        self.sharing = sharing
        self.rng = rng
        self.faults = faults
        self.truth = true_values(spec)
        self.journal: dict[int, int] = {}
        self.highest: dict[int, int] = {}
        self.incarnations = [0, 0, 0]
        self.runs_of_epochs: list[dict[int, int]] = []
        self.begin()

    def begin(self) -> None:
        """Start an epoch: all memory is new, only the journal stays."""
        self.live: dict[int, int] = {}
        self.memory: dict[tuple[int, int], tuple[int, int]] = {}
        self.running: list[Attempt] = []
        self.commits: list[tuple[int, int, int]] = []
        self.undelivered: list[Event] = []
        self.waits: list[RetryAfter] = []
        # what a committed task had waited for has happened as well
        self.happened = set(self.journal) | known_to_have_happened(self.spec.tasks, set(self.journal))
        self.known_committed = set(self.journal)
        self.had_faults = False
        self.quick = self.shared = False
        self.returned = 0
        self.recalled: list[Recall] = []
        self.ran: dict[int, int] = {}
        self.finish: Finish | None = None
        self.scheduler = Scheduler(
            self.spec,
            dict(self.journal),
            attempts=self.highest,
            settings=Settings(max_rank_losses=1000, max_commit_retries=1000),
        )
        self.runs_of_epochs.append(self.ran)
        for rank in range(len(self.incarnations)):
            self.join(rank)
        self.tell(Start())

    def join(self, rank: int) -> None:
        self.incarnations[rank] += 1
        self.live[rank] = self.incarnations[rank]
        self.tell(RankJoined(rank, self.incarnations[rank], SLOTS))

    def tell(self, event: Event) -> None:
        for instruction in self.scheduler.handle(event):
            self.obey(instruction)
        while self.recalled:
            self.return_recalled(self.recalled.pop())

    def return_recalled(self, recall: Recall) -> None:
        """Return an attempt that has not begun; of one that has, nothing is said."""
        for run in self.running:
            if (run.task, run.attempt) == (recall.task, recall.attempt) and run.values is None and not run.canceled:
                self.running.remove(run)
                self.came_back(run)
                return

    # ------------------------------------------------------------------------------------------ instructions, checked
    def obey(self, instruction: Instruction) -> None:
        assert self.finish is None, f"{instruction} after the end"
        if isinstance(instruction, Dispatch):
            self.dispatch(instruction)
        elif isinstance(instruction, Commit):
            task = self.spec.tasks[instruction.task]
            assert task.checkpoint != "skip" or task.index == self.spec.output
            key = (instruction.task, instruction.attempt)
            if key in self.memory:
                self.commits.append((*key, self.memory[key][1]))
            else:
                assert self.reported_later(key)
        elif isinstance(instruction, Release):
            key = (instruction.task, instruction.attempt)
            readers = [run for run in self.running if not run.canceled and run.values is None]
            assert not any((i.task, i.attempt) == key and i.source == "memory" for run in readers for i in run.inputs)
            self.memory.pop(key, None)
        elif isinstance(instruction, CancelAttempt):
            for run in self.running:
                if (run.task, run.attempt) == (instruction.task, instruction.attempt):
                    run.canceled = True
        elif isinstance(instruction, RetryAfter):
            self.waits.append(instruction)
        elif isinstance(instruction, Recall):
            self.recalled.append(instruction)
        else:
            self.finish = instruction

    def dispatch(self, order: Dispatch) -> None:
        task = self.spec.tasks[order.task]
        assert order.task not in self.known_committed, "a committed task runs again"
        assert order.attempt > self.highest.get(order.task, -1), "an attempt number is used twice"
        assert not any(run.task == order.task and not run.canceled for run in self.running)
        assert not any(wait.task == order.task for wait in self.waits), "the time is not over"
        assert order.rank in self.live
        if task.kind == "task":
            busy = [run for run in self.running if run.rank == order.rank and self.spec.tasks[run.task].kind == "task"]
            if len(busy) >= SLOTS and not self.shared:  # ahead: only while nobody is idle
                assert self.quick and len(busy) < SLOTS * (1 + _AHEAD)
                held = [run.rank for run in self.running if self.spec.tasks[run.task].kind == "task"]
                assert all(held.count(rank) >= SLOTS for rank in self.live)
        assert all(upstream in self.happened for upstream in task.after)
        assert all(upstream in self.known_committed for upstream in task.barriers)
        assert tuple(i.task for i in order.inputs) == task.data
        for i in order.inputs:
            if i.source == "checkpoint":
                assert i.task in self.known_committed
            else:
                assert (i.task, i.attempt) in self.memory or self.reported_later((i.task, i.attempt))
                assert self.spec.tasks[i.task].checkpoint != "sync" or i.task in self.known_committed
        self.highest[order.task] = order.attempt
        self.ran[order.task] = self.ran.get(order.task, 0) + 1
        values = self.read(order.inputs) if self.rng.random() < 0.5 else None
        self.running.append(Attempt(order.task, order.attempt, order.rank, self.live[order.rank], order.inputs, values))

    def reported_later(self, key: tuple[int, int]) -> bool:
        return any(isinstance(event, ObjectsLost) and key in event.outputs for event in self.undelivered)

    def read(self, inputs: tuple) -> list[int] | None:
        values = []
        for i in inputs:
            if i.source == "checkpoint":
                values.append(self.journal[i.task])
            elif (i.task, i.attempt) in self.memory:
                values.append(self.memory[i.task, i.attempt][1])
            else:
                return None
        return values

    # --------------------------------------------------------------------------------------------------- what happens
    def step(self) -> None:
        actions = []
        if self.running:
            actions += [self.end_attempt] * 4
        if self.commits:
            actions += [self.end_commit] * 3
        if self.undelivered:
            actions += [self.deliver] * 2
        if self.waits:
            actions.append(self.end_wait)
        if len(self.live) < len(self.incarnations):
            actions.append(self.replace)
        if self.faults:
            actions += [self.kill_rank, self.fail_attempt, self.crash_everything, self.repeat_something]
        if self.sharing and self.running and self.rng.random() < 0.3:
            actions.append(self.share)
        assert actions, f"stuck: {[self.scheduler.story(t) for t in range(len(self.spec.tasks))]}"
        self.rng.choice(actions)()

    def end_attempt(self) -> None:
        run = self.running.pop(self.rng.randrange(len(self.running)))
        values = run.values if run.values is not None else self.read(run.inputs)
        if run.canceled and self.rng.random() < 0.7:
            self.tell(TaskFailed(run.task, run.attempt, "canceled"))
        elif run.values is None and self.rng.random() < 0.1 and self.spec.tasks[run.task].kind == "task":
            self.came_back(run)
        elif values is None:
            gone = tuple(
                (i.task, i.attempt)
                for i in run.inputs
                if i.source == "memory" and (i.task, i.attempt) not in self.memory
            )
            assert gone
            self.tell(TaskFailed(run.task, run.attempt, "lost-input", missing=gone))
        else:
            value = hash((run.task, tuple(values)))
            assert value == self.truth[run.task]
            self.memory[run.task, run.attempt] = (run.rank, value)
            self.happened.add(run.task)
            self.quick = self.rng.random() < 0.7
            self.tell(TaskFinished(run.task, run.attempt, run.rank, self.rng.randrange(100), self.quick))

    def came_back(self, run: Attempt) -> None:
        self.returned += 1
        self.ran[run.task] -= 1
        self.quick = False
        self.tell(TaskFailed(run.task, run.attempt, "returned"))

    def share(self) -> None:
        """Other workflows come to a rank, or leave it."""
        if self.live:
            rank = self.rng.choice(list(self.live))
            others = self.rng.randrange(2 * SLOTS)
            waiting = [run for run in self.running if run.rank == rank and run.values is None]
            self.shared = True
            if waiting:
                self.quick = False
            keys = tuple((run.task, run.attempt) for run in waiting)
            self.tell(RankShared(rank, others, 1 + (others > 0), keys))

    def end_commit(self) -> None:
        task, attempt, value = self.commits.pop(self.rng.randrange(len(self.commits)))
        if self.faults and self.rng.random() < 0.2:
            self.faults -= 1
            self.tell(CommitFailed(task, attempt))
            return
        self.journal.setdefault(task, value)
        self.known_committed.add(task)
        self.happened.add(task)
        self.tell(TaskCommitted(task, attempt))

    def end_wait(self) -> None:
        wait = self.waits.pop(self.rng.randrange(len(self.waits)))
        self.tell(RetryDue(wait.task, wait.attempt))

    def deliver(self) -> None:
        self.tell(self.undelivered.pop(self.rng.randrange(len(self.undelivered))))

    def replace(self) -> None:
        self.join(self.rng.choice([rank for rank in range(len(self.incarnations)) if rank not in self.live]))

    def kill_rank(self) -> None:
        if not self.live:
            return
        self.faults -= 1
        self.had_faults = True
        rank = self.rng.choice(list(self.live))
        incarnation = self.live.pop(rank)
        lost = tuple(key for key, (where, _) in self.memory.items() if where == rank)
        self.memory = {key: kept for key, kept in self.memory.items() if kept[0] != rank}
        late = [run for run in self.running if run.rank == rank]
        self.running = [run for run in self.running if run.rank != rank]
        # some writes had their snapshot, and may get through although their rank is dead
        self.commits = [commit for commit in self.commits if commit[:2] not in lost or self.rng.random() < 0.5]
        self.undelivered.append(ObjectsLost(lost))
        self.tell(RankLost(rank, incarnation))
        if self.rng.random() < 0.5:
            self.deliver()
        if late and self.rng.random() < 0.5:  # a message that was under way
            self.tell(TaskFinished(late[0].task, late[0].attempt, rank, 1))

    def fail_attempt(self) -> None:
        runs = [run for run in self.running if not run.canceled]
        if runs:
            self.faults -= 1
            self.had_faults = True
            run = self.rng.choice(runs)
            self.running.remove(run)
            self.tell(TaskFailed(run.task, run.attempt, self.rng.choice(["rank-lost", "crash"])))

    def repeat_something(self) -> None:
        self.faults -= 1
        for task, attempt in list(self.memory)[:2]:
            self.tell(TaskFinished(task, attempt, self.memory[task, attempt][0], 1))
            if self.finish:
                return
        for task in list(self.journal)[:1]:
            if self.highest.get(task, -1) >= 0:
                self.tell(TaskCommitted(task, self.highest[task]))

    def crash_everything(self) -> None:
        self.faults -= 1
        for task, _, value in self.commits:
            if self.rng.random() < 0.3:  # durable, but nobody was told
                self.journal.setdefault(task, value)
        self.begin()

    def run(self) -> None:
        steps = 0
        while self.finish is None:
            self.step()
            steps += 1
            assert steps < 5000, "it does not end"


def needed_without(spec: WorkflowSpec, committed: set[int]) -> set[int]:
    """The recovery set, the naive way."""
    if spec.output in committed:
        return set()
    happened = known_to_have_happened(spec.tasks, committed)
    found = {spec.output}
    while True:
        more = {
            upstream
            for index in found
            for upstream in (
                *spec.tasks[index].data,
                *(before for before in spec.tasks[index].after if before not in happened),
                *spec.tasks[index].barriers,
            )
            if upstream not in committed
        }
        if more <= found:
            return found
        found |= more


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 12), faults=st.integers(0, 8))
@settings(max_examples=300, deadline=None)
def test_every_run_ends_with_the_right_value(seed: int, count: int, faults: int) -> None:
    rng = random.Random(seed)
    cluster = Cluster(random_spec(rng, count), rng, faults, sharing=rng.random() < 0.5)
    cluster.run()
    spec = cluster.spec
    assert cluster.finish == Finish("SUCCESSFUL", spec.output)
    assert cluster.journal[spec.output] == cluster.truth[spec.output]
    for task in cluster.ran:  # every promise of this epoch was kept
        if spec.tasks[task].checkpoint != "skip":
            assert task in cluster.journal
    for task in cluster.journal:  # and nothing else was written
        assert spec.tasks[task].checkpoint != "skip" or task == spec.output


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_without_failures_each_wanted_task_runs_once(seed: int, count: int) -> None:
    rng = random.Random(seed)
    cluster = Cluster(random_spec(rng, count), rng, faults=0)
    cluster.run()
    wanted = needed_without(cluster.spec, set())
    assert cluster.ran == dict.fromkeys(wanted, 1)
    counters = cluster.scheduler.counters
    assert (counters.run, counters.skipped, counters.rerun, counters.rolled_back) == (
        len(wanted),
        count - len(wanted),
        0,
        0,
    )
    outputs = {task for task, _ in cluster.memory}
    assert outputs <= {cluster.spec.output}, "memory is released as soon as nobody reads it"


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 12), steps=st.integers(0, 30))
@settings(max_examples=150, deadline=None)
def test_resume_runs_exactly_the_recovery_set(seed: int, count: int, steps: int) -> None:
    rng = random.Random(seed)
    cluster = Cluster(random_spec(rng, count), rng, faults=0)
    for _ in range(steps):
        if cluster.finish is None:
            cluster.step()
    cluster.faults = 1
    cluster.crash_everything()
    wanted = needed_without(cluster.spec, set(cluster.journal))
    if cluster.finish is None:
        cluster.run()
    assert cluster.ran == dict.fromkeys(wanted, 1)
    assert cluster.finish == Finish("SUCCESSFUL", cluster.spec.output)


def test_the_cluster_notices_a_scheduler_that_dispatches_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TaskTable, "is_usable", lambda self, task: True)

    def twenty_runs() -> None:
        for seed in range(20):
            rng = random.Random(seed)
            Cluster(random_spec(rng, 8), rng, faults=4).run()

    with pytest.raises(AssertionError):
        twenty_runs()
