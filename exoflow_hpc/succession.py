"""What a controller leaves to the one that follows it, pure: which outputs and running attempts of it count (E16, R5, R10c).

Agents keep what they have made and go on with what they run when the rank that controls the run is lost, and report it to the
rank that takes over. What they report may be older than what the journal says: an output is of use only if it stands on the values
that everything else stands on. So each attempt is told its *lineage*: which attempts made those of the values that it comes from
that could come out another way.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .semantics import descendants
from .spec import TaskSpec

__all__ = ["Entry", "Lineage", "Stand", "Survivor", "agreeing", "era_of", "first_of_era", "plain", "shown", "stand_of"]

#: attempts of a controller that takes over begin at its epoch, shifted by so many bits: none of them is one that a controller before it
#: may have used, of which nobody knows
_ERA_BITS = 32
#: entries that a lineage has at most; one that would be longer isn't known, and what has it is made again after a loss of the controller
_LONGEST = 4096

#: (task, attempt, whether that was committed when it was read)
Entry = tuple[int, int, bool]
#: None: not known
Stand = frozenset[Entry] | None


def era_of(epoch: int) -> int:
    """Return the least number of an attempt of the controller that takes over in *epoch*."""
    return epoch << _ERA_BITS


def first_of_era(era: int, known: int) -> int:
    """Return the number of the attempt that follows *known* (-1: none), which is of an earlier era."""
    return era | (shown(known) + 1)


def shown(attempt: int) -> int:
    """Return which attempt of its task this is, as people count: from 0, whatever controllers there were."""
    return attempt if attempt < 0 else attempt & ((1 << _ERA_BITS) - 1)


def plain(stand: Stand, names: Sequence[TaskSpec] | None = None) -> list[list[Any]] | None:
    """Return a lineage as lists, with the names of the tasks instead of their indices if *names* has them."""
    if stand is None:
        return None
    return [[task if names is None else names[task].name, attempt, known] for task, attempt, known in sorted(stand)]


def stand_of(wire: Iterable[Iterable[Any]] | None, named: Mapping[str, int] | None = None) -> Stand:
    """Return the lineage of its lists; *named*: name of task → index, if they have names."""
    if wire is None:
        return None
    wire = list(wire)
    if named is not None and any(task not in named for task, _, _ in wire):  # it is of a continuation that is void
        return None
    return frozenset((task if named is None else named[task], attempt, known) for task, attempt, known in wire)


class Lineage:
    """The lineages of what one controller has dispatched. deviant: see `semantics.plan`."""

    def __init__(self, tasks: Sequence[TaskSpec], deviant: Collection[int]) -> None:
        self._tasks = tasks
        self._varying = {task.index for task in tasks if not task.deterministic} | set(deviant)
        #: tasks whose outputs may come out another way
        self._unstable = self._varying.union(descendants(tasks, self._varying))
        #: task → (attempt, lineage) of its latest attempt, if that isn't empty
        self._known: dict[int, tuple[int, Stand]] = {}

    def dispatched(self, task: int, attempt: int, inputs: Iterable[tuple[int, int, bool]]) -> Stand:
        """Note an attempt, and return its lineage. inputs: (task, attempt, whether it is committed) of each."""
        if task not in self._unstable:
            return frozenset()
        found: set[Entry] = set()
        for source, made, committed in inputs:
            if source not in self._unstable:
                continue
            if committed or source in self._varying:
                found.add((source, made, committed))
            if committed:
                continue
            behind = self.of(source, made)
            if behind is None:
                return self.adopt(task, attempt, None)
            found |= behind
        return self.adopt(task, attempt, frozenset(found) if len(found) <= _LONGEST else None)

    def adopt(self, task: int, attempt: int, stand: Stand) -> Stand:
        """Note the lineage of an attempt, and return it."""
        if stand or stand is None:
            self._known[task] = (attempt, stand)
        else:
            self._known.pop(task, None)
        return stand

    def of(self, task: int, attempt: int) -> Stand:
        """Return the lineage of an attempt, if it is the latest one."""
        known, stand = self._known.get(task, (attempt, frozenset()))
        return stand if known == attempt else None


@dataclass(frozen=True)
class Survivor:
    """An output in memory, or a running attempt, that a rank reports."""

    task: int
    attempt: int
    rank: int
    running: bool
    stand: Stand


def agreeing(
    tasks: Sequence[TaskSpec],
    committed: Mapping[int, int],
    started: Mapping[int, int],
    standing: Iterable[Stand],
    deviant: Collection[int],
    survivors: Iterable[Survivor],
) -> dict[int, Survivor]:
    """Return task → what is left of it, of those that stand on the same values as each other and as what is in the journal.

    committed: task → attempt; started: external task → attempt that it was started as last, and that isn't undone; standing: lineages of
    both. What is committed may be in memory too.
    """
    survivors = list(survivors)
    unsure = any(stand is None for stand in standing)
    #: task that is not committed → its newest attempt that anything is known of: only that one counts
    newest: dict[int, int] = {}
    entries = [entry for stand in (*standing, *(one.stand for one in survivors)) for entry in stand or ()]
    for source, attempt, was_committed in entries:
        if not was_committed:
            newest[source] = max(attempt, newest.get(source, -1))
    for one in survivors:
        if not tasks[one.task].deterministic:
            newest[one.task] = max(one.attempt, newest.get(one.task, -1))

    def counts(entry: Entry) -> bool:
        source, attempt, was_committed = entry
        if source in committed:
            return committed[source] == attempt
        return not was_committed and newest[source] == attempt

    doubtful = {*deviant, *descendants(tasks, deviant)}
    found: dict[int, Survivor] = {}
    for one in survivors:
        task = tasks[one.task]
        if one.task in doubtful or one.stand is None:
            continue
        if unsure and (one.stand or (not task.deterministic and one.task not in committed)):
            continue
        if one.task in committed:
            if one.running or committed[one.task] != one.attempt:
                continue
        elif not task.deterministic and newest[one.task] != one.attempt:
            continue
        if task.external and one.task not in committed and started.get(one.task) != one.attempt:
            continue
        if not all(map(counts, one.stand)):
            continue
        other = found.get(one.task)
        if other is None or _precedes(one, other):
            found[one.task] = one
    return found


def _precedes(one: Survivor, other: Survivor) -> bool:
    return (one.running, -one.attempt, one.rank) < (other.running, -other.attempt, other.rank)
