"""A checkpoint that is not what was written is reported by name, and its value is computed again (case 8)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import Cli

__all__: list[str] = []

pytestmark = pytest.mark.timeout(150)

WORKFLOW = """
@ef.task(checkpoint="sync")
def salted(directory):
    log(directory, "salted", 0)
    with open(os.path.join(directory, "salt")) as file:
        return np.full(20_000, int(file.read()))

@ef.task(checkpoint="sync")
def through(directory, array):
    log(directory, "through", 0)
    return array + 1

@ef.task
def both(array, other, waited):
    return [int(array[0]), int(other[0])]

def workflow(directory):
    array = salted.bind(directory)
    other = through.bind(directory, array)
    return both.bind(array, other, gated.bind(directory, 0, [0]).after(other.committed()))
"""


def run_until_the_gate(cli: Cli) -> None:
    run = cli.start("run", cli.file(WORKFLOW), "--id", "w", "--ranks", "1", "--input", f"directory={cli.directory}")
    cli.wait_until(lambda: cli.times("gated") or run.popen.poll() is not None, "what comes before is committed")
    cli.kill_all()
    cli.open_gate()


@pytest.mark.parametrize("salt", [7, 8])
def test_input(cli: Cli, salt: int) -> None:
    """Computed again with the same value, only that; with another one, what came of it is computed again as well."""
    (cli.directory / "salt").write_text("7")
    run_until_the_gate(cli)
    file = cli.damage("w", "salted", 7)
    (cli.directory / "salt").write_text(str(salt))
    result = cli("resume", "w", "--ranks", "2", "--json")
    assert result.values == ([salt, salt + 1], 0, 0)
    assert file in result.stderr
    assert ("taken to be deterministic" in result.stderr) == (salt != 7)
    # once for the value that is another one, once after all that came of the first one is void
    assert cli.times("salted") == {"0": 2 if salt == 7 else 3}
    assert cli.times("through") == {"0": 1 if salt == 7 else 2}
    assert cli("output", "w", "salted").code == 0


def test_output(cli: Cli) -> None:
    """Of a workflow that has succeeded."""
    body = "def workflow(directory):\n    return block.bind(directory, 5, [block.bind(directory, 1, [])])\n"
    args = ["run", cli.file(body), "--id", "w", "--ranks", "1", "--input", f"directory={cli.directory}", "--json"]
    first = cli(*args).values
    file = cli.damage("w", "block_1", 6)
    refused = cli("output", "w")
    assert refused.code == 2
    assert file in refused.stderr
    assert "Traceback" not in refused.text
    again = cli(*args)
    assert again.values == first
    assert again.json["tasks"] == {"run": 1, "skipped": 1, "rerun": 0, "rolled_back": 0}
    assert cli("output", "w").code == 0
