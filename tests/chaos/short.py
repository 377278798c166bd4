"""A campaign of half a minute, as the suites have them."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

from tests.chaos.campaign import ROOT

__all__ = ["check_short_campaign"]

#: no trial begins later than this; those that have begun end within their own deadline
SECONDS = 25
#: more than that and the deadline of a trial
DEADLINE = 150


def check_short_campaign(module: str, results: Path, *arguments: str) -> None:
    """Run the campaign *module* from a seed that nobody chose, and assert that no trial of it failed. The seeds are printed."""
    command = [sys.executable, "-m", module, "--start", "random", "--seconds", str(SECONDS)]
    process = subprocess.Popen(
        [*command, *arguments, "--results", str(results)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=DEADLINE)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)  # its ranks are tied to it
            process.wait()
    print(output)
    assert process.returncode == 0
    done = re.search(r"(\d+) trials, (\d+) kills, 0 trials failed", output)
    assert done is not None and int(done[1]) > 0 and int(done[2]) > 0
