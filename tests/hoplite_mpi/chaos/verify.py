"""What the processes of a trial say, and whether it fits together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.hoplite_mpi.chaos.plan import Trial
    from tests.hoplite_mpi.chaos.trial import Outcome

__all__ = ["Process", "Story", "verify"]

#: (rank, incarnation)
Process = tuple[int, int]

#: seconds before and after a death in which who was connecting to the dead may crash
_CONNECTING = 8.0


class Story:
    """The logs of all processes, read as they grow."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._read: dict[Process, int] = {}
        self.lines: dict[Process, list[dict[str, Any]]] = {}
        #: founders that have everything and go on under load
        self.loaded: set[Process] = set()
        #: process → what it says of its eviction
        self.evicted: dict[Process, str] = {}
        #: process → when it was seen to have ended
        self.ended: dict[Process, float] = {}
        #: process → from when to when it was stopped
        self.stopped: dict[Process, tuple[float, float]] = {}
        #: processes whose host was cut off
        self.cut: set[Process] = set()

    def read(self) -> None:
        """Take in what has been written since."""
        for path in self._directory.glob("log.*"):
            _, rank, incarnation = path.name.split(".")
            process = (int(rank), int(incarnation))
            with open(path) as file:
                file.seek(self._read.get(process, 0))
                new = file.read()
            whole = new[: new.rfind("\n") + 1]
            self._read[process] = self._read.get(process, 0) + len(whole)
            for text in whole.splitlines():
                line = json.loads(text)
                self.lines.setdefault(process, []).append(line)
                if line["what"] == "load":
                    self.loaded.add(process)
                elif line["what"] == "evicted":
                    self.evicted[process] = line["text"]

    def settled(self, incarnations: dict[int, int], since: float) -> bool:
        """Whether every rank's last process has done two calls since then."""
        return all(
            len([line for line in self.lines.get(process, ()) if line["what"] == "call" and line["time"] > since]) >= 2
            for process in incarnations.items()
        )

    def most_senior(self) -> Process | None:
        """Return who coordinates the membership: of those who joined first and have not ended, the lowest rank."""
        views = [line for process, line in self.of("view") if process not in self.ended]
        if not views:
            return None
        members = [tuple(member) for member in max(views, key=lambda line: line["number"])["members"]]
        founders = [member for member in members if member[1] == 0]
        return min(founders, default=None)

    def of(self, what: str) -> list[tuple[Process, dict[str, Any]]]:
        """Return all lines of that kind."""
        return [(process, line) for process, lines in self.lines.items() for line in lines if line["what"] == what]

    def may_crash(self, process: Process, killed: dict[Process, float]) -> bool:
        """Whether it may have been in a connect to somebody senior who died just then."""
        now = self.ended[process]
        return any(
            (other[1], other[0]) < (process[1], process[0]) and abs(now - when) < _CONNECTING
            for other, when in [*killed.items(), *self.ended.items()]
            if other != process
        )


def verify(story: Story, trial: Trial, killed: dict[Process, float], outcome: Outcome) -> None:
    """Add to the outcome what the logs say of detection, and what is wrong in them."""
    for kind in ("wrong", "failed"):
        for process, line in story.of(kind):
            text = line.get("text") or json.dumps(line)
            outcome.wrong.append("rank {}.{} {}: {}".format(*process, kind, text))
    # who is put out is to the others as if it had died when it was stopped
    dead = {process: story.stopped[process][0] for process in story.evicted if process in story.stopped} | killed
    _same(story, "call", ("call",), ("op", "took"), dead, outcome)
    _same(story, "reduced", ("rid",), ("sources",), dead, outcome)
    gone = killed.keys() | story.ended.keys()
    for process, line in story.of("lost"):
        owner = tuple(line["process"])
        if owner not in gone:
            outcome.wrong.append("rank {}.{} lost {} of a process that lives".format(*process, line))
        alive = [p for p, kept in story.of("kept") if tuple(kept["process"]) == owner and p not in gone]
        if line["object"].startswith("kept") and alive:
            outcome.wrong.append("rank {}.{} lost {}, which {} has".format(*process, line, alive))
    _two_sides(story, outcome)
    for process in story.evicted:
        if process not in story.stopped and process not in story.cut:
            outcome.wrong.append("rank {}.{} was put out: {}".format(*process, story.evicted[process]))
    for _, line in story.of("over"):
        for name, count in line["counts"].items():
            outcome.passed[name] = outcome.passed.get(name, 0) + count
    _detection(story, trial, killed, outcome)
    _handover(story, outcome)


def _same(
    story: Story,
    what: str,
    key: tuple[str, ...],
    value: tuple[str, ...],
    killed: dict[Process, float],
    outcome: Outcome,
) -> None:
    """All processes say the same of the same thing; what only the dead have seen may be made anew."""
    known: dict[tuple[Any, ...], tuple[Process, Any]] = {}
    for process, line in sorted(story.of(what), key=lambda item: item[1]["time"]):
        name, said = tuple(line[k] for k in key), [line[v] for v in value]
        other, before = known.get(name, (process, said))
        if killed.get(other, line["time"]) < line["time"]:
            other, before = process, said
        known[name] = (other, before) if other not in killed else (process, said)
        if said != before:
            outcome.wrong.append(f"{what} {name}: {process} says {said}, {other} says {before}")


def _two_sides(story: Story, outcome: Outcome) -> None:
    """Views of one number are the same everywhere."""
    views: dict[int, tuple[Process, Any]] = {}
    for process, line in story.of("view"):
        other, members = views.setdefault(line["number"], (process, line["members"]))
        if members != line["members"]:
            outcome.wrong.append(f"view {line['number']}: {line['members']} at {process}, {members} at {other}")


def _detection(story: Story, trial: Trial, killed: dict[Process, float], outcome: Outcome) -> None:
    for victim, when in killed.items():
        for process, lines in story.lines.items():
            if process in killed:
                continue
            new = [line["time"] for line in lines if line["what"] == "view" and list(victim) in line["lost"]]
            if new:
                seconds = outcome.host_seconds if victim in story.cut else outcome.process_seconds
                seconds.append(round(min(new) - when, 4))


def _handover(story: Story, outcome: Outcome) -> None:
    """Of each shard of the smaller part, the last answer there is before the first one in the other part."""
    answers = [line for _, line in story.of("answer")]
    for rank, incarnation in story.cut:
        there = [a["time"] for a in answers if a["owner"] == [rank, incarnation]]
        heirs = [a["time"] for a in answers if a["home"] == rank and a["view"] > 1 and a["owner"][0] != rank]
        if there and heirs:
            seconds = round(min(heirs) - max(there), 4)
            outcome.handover_seconds.append(seconds)
            if seconds <= 0:
                outcome.wrong.append(f"both parts of a cut answered for the shard of rank {rank} for {-seconds} s")
