"""Trial after trial, until enough has been killed at each point and in each role; then a summary. For every package's campaign."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hoplite_mpi.testing import Point
from tests.chaos.counts import BaseOutcome, Needs, lacking

__all__ = ["ROOT", "Campaign"]

ROOT = Path(__file__).resolve().parents[2]
#: trials for each kill that is wanted, after which a campaign whose minima are not met gives up
_MOST_TRIALS = 3


@dataclass(frozen=True)
class Campaign:
    """Which trials there are, and how they are carried out."""

    #: what a user types
    command: str
    #: seed → trial
    plan: Callable[[int], Any]
    carry_out: Callable[[Any], Any]
    outcome: type[BaseOutcome]
    summary: Callable[[Sequence[Any], Needs], str]
    points: Mapping[str, Point]
    #: kinds of trials
    kinds: tuple[str, ...]
    #: file, from the repository's root, that trials are added to
    results: str
    kills: int
    each: int = 4
    each_role: int = 8
    #: roles in which a process is killed that need not be at a point
    more_roles: tuple[str, ...] = ()

    def main(self, arguments: list[str] | None = None) -> int:
        """Return 0 if nothing was wrong and all was killed often enough."""
        options = self._parser().parse_args(arguments)
        if options.seed is not None:
            return self._one(options.seed)
        kinds = {kind for kind in self.kinds if not kind.startswith(tuple(options.without))}
        needs = Needs(options.kills, options.each, options.each_role, kinds, self.points, self.more_roles)
        start = random.randrange(10**6) if options.start == "random" else int(options.start)
        print(f"first seed {start}; repeat one trial with: {self._repeat('SEED')}", flush=True)
        outcomes = self._load(options.results)
        if outcomes:
            print(f"{len(outcomes)} trials are in {options.results} already")
        end = None if options.seconds is None else time.monotonic() + options.seconds
        stopped = self._run(outcomes, needs, start, options.jobs, end, options.results)
        print(self.summary(outcomes, needs))
        failed = [o for o in outcomes if o.wrong]
        for outcome in failed:
            print(f"FAILED seed {outcome.seed} ({outcome.kind}): {outcome.wrong[0][:300]}")
            print(f"  {self._repeat(outcome.seed)}")
        missing = [] if stopped or end is not None else lacking(outcomes, needs)
        for what in missing:
            print(f"NOT ENOUGH {what}")
        return 1 if failed or missing or not outcomes else 0

    def _parser(self) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(prog=f"{self.command} ARGS=...", description=__doc__)
        add = parser.add_argument
        add("--seed", type=int, help="carry out this trial only, and show all that its processes say")
        add("--kills", type=int, default=self.kills, help="processes to kill in all (default: %(default)s)")
        add("--each", type=int, default=self.each, help="kills at each fault point at least (default: %(default)s)")
        add("--each-role", type=int, default=self.each_role, help="kills in each role at least (default: %(default)s)")
        add("--start", default="0", help="first seed, or 'random' (default: %(default)s)")
        add("--jobs", type=int, default=2, help="trials at a time (default: %(default)s)")
        add("--seconds", type=float, help="begin no trial after so long, and ask for no minimum")
        add("--without", nargs="*", default=[], help="beginnings of the names of kinds to leave out: 'hosts' need root")
        add(
            "--results",
            type=Path,
            default=ROOT / self.results,
            help="trials that are in this file are not done again; remove it to begin anew (default: %(default)s)",
        )
        return parser

    def _repeat(self, seed: object) -> str:
        return f"{self.command} ARGS='--seed {seed}'"

    def _one(self, seed: int) -> int:
        trial = self.plan(seed)
        print(trial)
        outcome = self.carry_out(trial)
        shown = dataclasses.asdict(outcome) | {"output": None}
        print(outcome.output)
        print(json.dumps(shown, indent=1))
        return 1 if outcome.wrong else 0

    def _load(self, path: Path) -> list[BaseOutcome]:
        if not path.exists():
            return []
        return [self.outcome(**json.loads(line)) for line in path.read_text().splitlines()]

    def _run(
        self, outcomes: list[BaseOutcome], needs: Needs, start: int, jobs: int, end: float | None, results: Path
    ) -> bool:
        """Add what is done to *outcomes* and to the file; return whether somebody stopped it by ^C, which lets trials come to their end."""
        stopped = threading.Event()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, lambda *_: stopped.set())
        results.parent.mkdir(parents=True, exist_ok=True)
        running: dict[Future[BaseOutcome], Any] = {}
        trials = self._trials(outcomes, needs, start)
        with ThreadPoolExecutor(jobs) as pool, open(results, "a") as file:
            while True:
                over = stopped.is_set() or (end is not None and time.monotonic() > end)
                while not over and len(running) < jobs and (trial := next(trials, None)) is not None:
                    running[pool.submit(self._safely, trial)] = trial
                if not running:
                    return stopped.is_set()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    del running[future]
                    outcome = future.result()
                    outcomes.append(outcome)
                    file.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
                    file.flush()
                    self._report(outcome, sum(o.kills for o in outcomes))

    def _safely(self, trial: Any) -> BaseOutcome:
        try:
            outcome: BaseOutcome = self.carry_out(trial)
            return outcome
        except Exception as error:
            wrong = [f"the trial itself failed: {error!r}"]
            return self.outcome(trial.seed, trial.kind, trial.ranks, wrong=wrong, output=traceback.format_exc())

    def _report(self, outcome: BaseOutcome, kills: int) -> None:
        what = ", ".join(f"{name} ×{n}" if n > 1 else name for name, n in outcome.points.items()) or "-"
        state = "FAILED" if outcome.wrong else "ok"
        line = f"{kills:4d} kills | seed {outcome.seed}: {state}, {outcome.kind}, {what}, {outcome.seconds:.1f} s"
        print(line, flush=True)
        if outcome.wrong:
            print("\n".join([*outcome.wrong, outcome.output, self._repeat(outcome.seed)]), flush=True)
        for text in outcome.left:
            print(f"     {text}", flush=True)

    def _trials(self, outcomes: list[BaseOutcome], needs: Needs, start: int) -> Iterator[Any]:
        """Yield trials that bring something, until all is there."""
        done = {outcome.seed for outcome in outcomes}
        begun = 0
        for seed in itertools.count(start):
            missing = lacking(outcomes, needs)
            if not missing or begun > _MOST_TRIALS * max(needs.kills, len(self.points)):
                return
            trial = self.plan(seed)
            if seed in done or trial.kind not in needs.kinds:
                continue
            if sum(o.kills for o in outcomes) >= needs.kills and not needs.wants(trial, outcomes):
                continue
            begun += 1
            yield trial
