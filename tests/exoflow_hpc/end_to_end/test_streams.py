"""The result is alone on stdout, and a run goes well whatever the caller has made of the standard streams."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import Cli

__all__: list[str] = []

pytestmark = pytest.mark.timeout(150)

ODD = """
@ef.task
def odd():
    os.system("echo from a child of the task")
    ef.context().progress(0.5, "lone \\ud800")
    return "lone \\ud800"

def workflow():
    return odd.bind()
"""

PROGRAM = """
import exoflow_hpc as ef

@ef.task
def nested():
    print("from the task")
    return ef.run(one.bind(), ranks=1, storage=STORAGE)

@ef.task
def one():
    return 1

if __name__ == "__main__":
    print(ef.run(nested.bind(), ranks=1))
"""


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-", "| true", "| grep -ac 'lone .ud800' >&2"])
def test_streams_that_are_closed(cli: Cli, closed: str) -> None:
    command = f"set -o pipefail; exec '{sys.executable}' -m exoflow_hpc run '{cli.file(ODD)}' --id w --ranks 1"
    environment = {**cli.environment, "EXOFLOW_STORAGE": str(cli.storage), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        ["bash", "-c", f"{command} {closed}"], env=environment, cwd=cli.directory, timeout=100, capture_output=True
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert b"child of the task" not in done.stdout
    assert cli("status", "w", "--json").json["status"] == "SUCCESSFUL"


def test_the_stdout_of_a_program_is_its_own(cli: Cli) -> None:
    """Neither the task nor the run that it starts, whose process is no rank of ours, writes there."""
    program = PROGRAM.replace("STORAGE", repr(str(cli.directory / "inner")))
    (cli.directory / "program.py").write_text(program)
    result = cli.program("program.py")
    assert result.code == 0, result.text
    assert result.stdout == "1\n"
    assert "from the task" in result.stderr
