"""The rules of exactly-once as pure functions of a DAG, its annotations and what the journal says. No I/O, no clock.

What may be run at all (R4), what has to be committed before what (R3), what is void after a loss, what has to be undone, and in which
order (R5), what runs again (R6). The rules are those of ``docs/guarantees.md``; they go back to ExoFlow (OSDI 2023, section 4).

Tasks are indices in `WorkflowSpec.tasks`. All functions are iterative: a chain of 10,000 tasks is no deeper for them than one of 2.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .errors import IllegalAnnotationError
from .spec import TaskSpec

__all__ = [
    "Plan",
    "check_annotations",
    "descendants",
    "gates",
    "is_irrevocable",
    "is_worth_writing",
    "known_to_have_happened",
    "must_run_again",
    "plan",
    "wanted",
]


def check_annotations(tasks: Sequence[TaskSpec]) -> None:
    """IllegalAnnotationError for a task whose effect could be neither repeated nor undone (R4), or that contradicts itself."""
    for task in tasks:
        if task.kind == "reduce" and (task.external or not task.deterministic):
            option = "external=True" if task.external else "deterministic=False"
            raise IllegalAnnotationError(f"reduce {task.name!r} can't be {option}: it only adds up what others made")
        if not task.external:
            if task.rollback or task.idempotent:
                option = "rollback" if task.rollback else "idempotent"
                raise IllegalAnnotationError(
                    f"task {task.name!r} has {option}=, but no effect outside of the workflow that it could be about: "
                    "add external=True"
                )
        elif not (task.rollback or task.idempotent):
            raise IllegalAnnotationError(
                f"task {task.name!r} is external, and a crash between its effect and its commit runs it again. Do one of three: "
                "declare it idempotent=True if repeating the effect is harmless; give it a rollback= function that undoes it; "
                "or have it use ef.context().idempotency_key with a service that drops what it has seen, and say so with "
                "idempotent=True"
            )


def is_irrevocable(task: TaskSpec) -> bool:
    """Whether the task has an effect that can't be undone."""
    return task.external and not task.rollback


# ---------------------------------------------------------------------------------------------------- what runs (R6)
def descendants(tasks: Sequence[TaskSpec], sources: Iterable[int]) -> list[int]:
    """Return, in topological order, the tasks whose outputs were computed from those of *sources*."""
    roots = set(sources)
    found: set[int] = set()
    for task in tasks[min(roots, default=len(tasks)) + 1 :]:
        if not roots.isdisjoint(task.data) or not found.isdisjoint(task.data):
            found.add(task.index)
    return sorted(found)


def wanted(
    tasks: Sequence[TaskSpec], roots: Iterable[int], committed: Container[int], happened: Container[int] = ()
) -> list[int]:
    """Return, in topological order, the tasks that a run has to execute for *roots*, given those *committed* by earlier ones.

    Control edges count like data: what an uncommitted task waits for happens (again) first, unless it is known to have
    *happened*.
    """
    found: set[int] = set()
    pending = list(roots)
    while pending:
        index = pending.pop()
        if index in found or index in committed:
            continue
        found.add(index)
        task = tasks[index]
        pending.extend(task.data)
        pending.extend(other for other in task.after if other not in happened)
        pending.extend(task.barriers)
    return sorted(found)


def known_to_have_happened(tasks: Sequence[TaskSpec], begun: Collection[int]) -> set[int]:
    """Return the tasks that have finished once, given that those *begun* were started: all that these had to wait for.

    Not what they wait for instead of a task that has continued: they may have begun when that had an output itself, which was lost.
    """
    found: set[int] = set()
    for task in reversed(tasks):
        if task.index in begun or task.index in found:
            found.update(task.data)
            found.update(one for one in (*task.after, *task.barriers) if tasks[one].scope == task.scope)
    return found


def must_run_again(
    tasks: Sequence[TaskSpec], lost: Iterable[int], is_needed: Callable[[int], bool], is_gone: Callable[[int], bool]
) -> list[int]:
    """Return, in topological order, what has to run again after outputs were *lost*.

    is_needed: whether a task has a consumer that still has to start, or a promise to be committed. is_gone: whether
    its output is neither committed, nor in memory, nor being made. Control edges do not count: what they wait for has
    happened in this run.
    """
    found: set[int] = set()
    pending = [index for index in lost if is_needed(index)]
    while pending:
        index = pending.pop()
        if index in found or not is_gone(index):
            continue
        found.add(index)
        pending.extend(tasks[index].data)
    return sorted(found)


# --------------------------------------------------------------------------------------- what is void, and undone (R5)
@dataclass(frozen=True)
class Plan:
    """What a run begins with."""

    #: tasks whose outputs stand
    committed: frozenset[int]
    #: committed tasks that are void: they were computed from a value that is lost
    void: tuple[int, ...]
    #: external tasks whose effects have to be undone before anything of `hold` runs
    undo: frozenset[int]
    #: tasks that must not start before that
    hold: frozenset[int]
    #: tasks that have to run, in topological order
    wanted: tuple[int, ...]
    #: those, and all that may have to run if outputs in memory are lost, in topological order
    reach: tuple[int, ...]
    #: tasks whose outputs in memory, or whose running attempts, stand
    kept: frozenset[int]
    #: tasks that have finished once, in this run or another, and are neither void nor undone
    happened: frozenset[int]
    #: external tasks that were undone, and have to come again, and ends of what tasks have continued with that have to come
    owed: frozenset[int] = frozenset()
    #: task with an irrevocable effect → tasks that are committed before it starts, whatever their options say (R3)
    gates: dict[int, frozenset[int]] = field(default_factory=dict)
    #: (task that would give another value, effect for good that stands on the first one): the rules can't be kept
    conflict: tuple[int, int] | None = None


def plan(
    tasks: Sequence[TaskSpec],
    output: int,
    committed: Collection[int],
    effects: Sequence[int] = (),
    deviant: Container[int] = (),
    owed: Collection[int] = (),
    undoing: Collection[int] = (),
    held: Collection[int] = (),
    running: Collection[int] = (),
    ends: Mapping[int, int] | None = None,
) -> Plan:
    """Return what a run begins with, given what the journal says.

    effects: external tasks that were started and not rolled back since, finished or not. deviant: tasks that are taken to be
    deterministic, but have given two outputs (R12). owed: external tasks whose effects were undone, and that were not
    committed since. undoing: those of *effects* whose rollback was begun, so that perhaps it has done its work. held: tasks whose
    outputs are in memory, and running: those of which an attempt runs, since another controller had them run. ends: as in `WorkflowSpec`;
    a task that stands, and has continued, has not done all that it does before that end has happened.
    """
    standing, kept = set(committed), {*held, *running}
    touched = standing | kept | set(effects)
    roots, void = {output, *owed, *undoing}, set[int]()
    unfinished = set[int]()
    while True:
        happened = known_to_have_happened(tasks, standing | kept | (set(effects) - void)) | (kept - set(running))
        before = happened - void - set(owed)
        needed = wanted(tasks, roots, standing | kept, before)
        sources = [index for index in needed if _varies(tasks[index], deviant)]
        fresh = [index for index in descendants(tasks, sources) if index in touched and index not in void]
        void.update(fresh)
        standing.difference_update(fresh)
        kept.difference_update(fresh)
        # an effect that is undone has to come again, also if nobody needs the output for anything else
        roots.update(index for index in fresh if tasks[index].external)
        if fresh:
            continue
        open_ends = {end for task, end in (ends or {}).items() if task in standing and end not in happened}
        if not open_ends <= standing | kept | set(needed):  # nobody needs its output, only that it happens
            unfinished |= open_ends - standing - kept - set(needed)
            roots |= unfinished
            continue
        reach = needed if not kept else _reach(tasks, roots, kept, standing, touched - void, before, deviant)
        guards = gates(tasks, output, reach, standing, deviant, needed)
        # what has to be committed and can't be any more, as it is lost, is made again first
        promised = set().union(*guards.values(), *(tasks[index].barriers for index in reach))
        gone = promised - standing - kept - set(needed)
        if not gone:
            break
        roots.update(gone)
    again = set(needed)
    undo = {
        index
        for index in effects
        if index in void
        or index in undoing
        or (index in again and tasks[index].rollback and not tasks[index].idempotent)
    }
    conflict = None
    for index in sorted(undo):
        if is_irrevocable(tasks[index]):
            above = [s for s in sources if index in descendants(tasks, [s])]
            conflict = (above[0], index)
            break
    hold = undo & again
    if void or undo:
        hold.update(sources)
    return Plan(
        frozenset(standing),
        tuple(sorted(void & set(committed))),
        frozenset(undo),
        frozenset(hold),
        tuple(needed),
        tuple(reach),
        frozenset(kept),
        frozenset((standing | happened) - void - undo - set(owed) - set(running)),
        frozenset(owed) | unfinished,
        guards,
        conflict,
    )


def _reach(
    tasks: Sequence[TaskSpec],
    roots: Iterable[int],
    kept: Collection[int],
    standing: Collection[int],
    touched: Collection[int],
    happened: Container[int],
    deviant: Container[int],
) -> list[int]:
    """Return what may have to run, if some of what is *kept* in memory is lost."""
    voidable: set[int] = set()
    while True:
        reach = wanted(tasks, {*roots, *kept, *voidable}, set(standing) - voidable, happened)
        below = set(descendants(tasks, (index for index in reach if _varies(tasks[index], deviant))))
        if below.intersection(touched) <= voidable:
            return reach
        voidable |= below.intersection(touched)


def _varies(task: TaskSpec, deviant: Container[int]) -> bool:
    return not task.deterministic or task.index in deviant


# -------------------------------------------------------------------------------------------------- output commit (R3)
def gates(
    tasks: Sequence[TaskSpec],
    output: int,
    needed: Sequence[int],
    committed: Container[int],
    deviant: Container[int] = (),
    starting: Iterable[int] | None = None,
) -> dict[int, frozenset[int]]:
    """Return, for each task *starting* (default: all *needed*) with an irrevocable effect, which tasks are committed before it starts.

    Those that vary and that its inputs come from, unless one can never be needed again by then: all its other consumers are
    committed by then, or behind tasks that are.
    """
    ends = [index for index in (needed if starting is None else starting) if is_irrevocable(tasks[index])]
    if not ends:
        return {}
    consumers: dict[int, list[int]] = {}
    #: task → bits of what it is computed from, itself left out; committed tasks that can't become void hide what is behind them
    above: dict[int, int] = {}
    varying = 0
    for index in needed:
        bits = 0
        for source in tasks[index].data:
            consumers.setdefault(source, []).append(index)
            if source not in committed or source in above:
                bits |= above.get(source, 0) | 1 << source
        above[index] = bits
        if _varies(tasks[index], deviant):
            varying |= 1 << index
    found = {}
    for end in ends:
        before = above[end]
        guards = {
            index for index in _bits(before & varying) if not _is_cut_off(tasks, output, index, before, consumers)
        }
        if guards:
            found[end] = frozenset(guards)
    return found


def _bits(number: int) -> list[int]:
    found = []
    while number:
        low = number & -number
        found.append(low.bit_length() - 1)
        number ^= low
    return found


def _is_cut_off(
    tasks: Sequence[TaskSpec], output: int, source: int, before: int, consumers: dict[int, list[int]]
) -> bool:
    """Whether nobody can need *source* again once the tasks *before* (bits) that are ``"sync"`` are committed."""
    if _is_promised(tasks, output, source):
        return False
    pending, seen = [source], {source}
    while pending:
        for index in consumers.get(pending.pop(), ()):
            if index in seen:
                continue
            seen.add(index)
            if not before >> index & 1:  # it may still have to run when the effect has happened
                return False
            if tasks[index].checkpoint == "sync":
                continue
            if _is_promised(tasks, output, index):
                return False
            pending.append(index)
    return True


# ---------------------------------------------------------------------------------------------------------- checkpoint="auto"
#: a checkpoint may take this many times as long as what it saves has taken: it is written beside other work, and only once
_MOST_WRITING = 10.0


def is_worth_writing(task: TaskSpec, seconds: float, write_seconds: float, consumers: int) -> bool:
    """Return whether the output of a task with ``checkpoint="auto"`` should be committed.

    seconds: that the task has taken; write_seconds: that its output will take; consumers: tasks that wait for it, and would
    wait again if it was lost. What varies counts twice: if it is lost, all that was computed from it is lost as well (R5).
    """
    saved = seconds * max(1, consumers) * (1 if task.deterministic else 2)
    return write_seconds <= _MOST_WRITING * saved


def _is_promised(tasks: Sequence[TaskSpec], output: int, index: int) -> bool:
    return tasks[index].checkpoint != "skip" or index == output
