"""Trial after trial, until enough has been killed at each point and in each role; then a summary."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from hoplite_mpi.testing import POINTS
from tests.hoplite_mpi.chaos.plan import KINDS, Trial, plan
from tests.hoplite_mpi.chaos.summary import Needs, lacking, summary
from tests.hoplite_mpi.chaos.trial import Outcome, carry_out

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[3]
#: trials for each kill that is wanted, after which a campaign whose minima are not met gives up
_MOST_TRIALS = 3


def main(arguments: list[str] | None = None) -> int:
    """Return 0 if nothing was wrong and all was killed often enough."""
    options = _parser().parse_args(arguments)
    if options.seed is not None:
        return _one(options.seed)
    kinds = set(KINDS) if not options.no_hosts else {kind for kind in KINDS if not kind.startswith("hosts")}
    needs = Needs(options.kills, options.each, options.each_role, kinds)
    start = random.randrange(10**6) if options.start == "random" else int(options.start)
    print(f"first seed {start}; repeat one trial with: {_repeat('SEED')}", flush=True)
    outcomes = _load(options.results)
    if outcomes:
        print(f"{len(outcomes)} trials are in {options.results} already")
    end = None if options.seconds is None else time.monotonic() + options.seconds
    _run(outcomes, needs, start, options.jobs, end, options.results)
    print(summary(outcomes, needs))
    failed = [o for o in outcomes if o.wrong]
    for outcome in failed:
        print(f"FAILED seed {outcome.seed} ({outcome.kind}): {outcome.wrong[0][:300]}\n  {_repeat(outcome.seed)}")
    missing = [] if end is not None else lacking(outcomes, needs)
    for what in missing:
        print(f"NOT ENOUGH {what}")
    return 1 if failed or missing or not outcomes else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make chaos ARGS=...", description=__doc__)
    parser.add_argument("--seed", type=int, help="carry out this trial only, and show all that its ranks say")
    parser.add_argument("--kills", type=int, default=500, help="processes to kill in all (default: %(default)s)")
    parser.add_argument("--each", type=int, default=4, help="kills at each fault point at least (default: %(default)s)")
    parser.add_argument("--each-role", type=int, default=8, help="kills in each role at least (default: %(default)s)")
    parser.add_argument("--start", default="0", help="first seed, or 'random' (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="trials at a time (default: %(default)s)")
    parser.add_argument("--seconds", type=float, help="begin no trial after so long, and ask for no minimum")
    parser.add_argument("--no-hosts", action="store_true", help="without emulated hosts, which need root")
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "build/chaos.jsonl",
        help="trials that are in this file are not done again; remove it to begin anew (default: %(default)s)",
    )
    return parser


def _repeat(seed: object) -> str:
    return f"make chaos ARGS='--seed {seed}'"


def _one(seed: int) -> int:
    trial = plan(seed)
    print(trial)
    outcome = carry_out(trial)
    shown = dataclasses.asdict(outcome) | {"output": None}
    print(outcome.output)
    print(json.dumps(shown, indent=1))
    return 1 if outcome.wrong else 0


def _load(path: Path) -> list[Outcome]:
    if not path.exists():
        return []
    return [Outcome(**json.loads(line)) for line in path.read_text().splitlines()]


def _run(outcomes: list[Outcome], needs: Needs, start: int, jobs: int, end: float | None, results: Path) -> None:
    results.parent.mkdir(parents=True, exist_ok=True)
    running: dict[Future[Outcome], Trial] = {}
    trials = _trials(outcomes, needs, start)
    # hosts take both cores for themselves: what is measured there are seconds
    with ThreadPoolExecutor(jobs) as pool, open(results, "a") as file:
        while True:
            over = end is not None and time.monotonic() > end
            while not over and len(running) < jobs and (trial := next(trials, None)) is not None:
                running[pool.submit(_safely, trial)] = trial
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                outcome = future.result()
                outcomes.append(outcome)
                file.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
                file.flush()
                _report(outcome, sum(o.kills for o in outcomes))


def _safely(trial: Trial) -> Outcome:
    try:
        return carry_out(trial)
    except Exception as error:
        text = traceback.format_exc()
        return Outcome(trial.seed, trial.kind, trial.ranks, wrong=[f"the trial itself failed: {error!r}"], output=text)


def _report(outcome: Outcome, kills: int) -> None:
    what = ", ".join(f"{name} ×{n}" if n > 1 else name for name, n in outcome.points.items()) or "-"
    state = "FAILED" if outcome.wrong else "ok"
    print(
        f"{kills:4d} kills | seed {outcome.seed}: {state}, {outcome.kind}, {what}, {outcome.seconds:.1f} s", flush=True
    )
    if outcome.wrong:
        print("\n".join([*outcome.wrong, outcome.output, _repeat(outcome.seed)]), flush=True)
    for text in outcome.left:
        print(f"     {text}", flush=True)


def _trials(outcomes: list[Outcome], needs: Needs, start: int) -> Iterator[Trial]:
    """Yield trials that bring something, until all is there."""
    done = {outcome.seed for outcome in outcomes}
    begun = 0
    for seed in itertools.count(start):
        missing = lacking(outcomes, needs)
        if not missing or begun > _MOST_TRIALS * max(needs.kills, len(POINTS)):
            return
        trial = plan(seed)
        if seed in done or trial.kind not in needs.kinds:
            continue
        if sum(o.kills for o in outcomes) >= needs.kills and not needs.wants(trial, outcomes):
            continue
        begun += 1
        yield trial


if __name__ == "__main__":
    sys.exit(main())
