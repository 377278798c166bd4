"""The example gives one result: on any number of ranks and shards, and after a kill of everything at any moment."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import pytest

from exoflow_hpc import journal

if TYPE_CHECKING:
    from .conftest import Cli

__all__: list[str] = []

pytestmark = pytest.mark.timeout(300)

EXAMPLE = Path(__file__).parents[3] / "examples" / "bpe_ngram.py"
SMALL = ["--input", "limit_files=60", "--input", "shards=4", "--input", "rounds=4"]


def example_command(cli: Cli, ranks: int, inputs: list[str]) -> list[str]:
    where = ["--input", f"out={cli.directory / 'out.h5'}"]
    return ["run", str(EXAMPLE), "--id", f"example-{ranks}", "--ranks", str(ranks), *inputs, *where, "--json"]


def committed(cli: Cli, ranks: int) -> int:
    """Return how many tasks are committed."""
    directory = cli.storage / f"workflows/example-{ranks}"
    return (
        sum(record["type"] == "task_committed" for record in journal.read(directory).records)
        if directory.exists()
        else 0
    )


@pytest.fixture(scope="module")
def clean(
    new_cli: Callable[[Path], AbstractContextManager[Cli]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Return the output of a run on one rank in which nothing happens, and how many tasks it commits."""
    with new_cli(tmp_path_factory.mktemp("clean")) as cli:
        result = cli(*example_command(cli, 1, SMALL))
        assert result.code == 0, result.text
        output = result.json["output"]
        assert output["perplexity"] < 0.5 * output["unigram_perplexity"]
        with h5py.File(output.pop("out")) as file:
            assert file.attrs["checksum"] == output["checksum"]
        return {"output": output, "committed": committed(cli, 1)}


@pytest.mark.parametrize("ranks", [2, 4])
def test_same_result_on_ranks(cli: Cli, clean: dict[str, Any], ranks: int) -> None:
    result = cli(*example_command(cli, ranks, SMALL))
    assert result.code == 0, result.text
    output = result.json["output"]
    assert Path(output.pop("out")).exists()
    assert output == clean["output"]


def test_same_result_with_other_shards(cli: Cli, clean: dict[str, Any]) -> None:
    inputs = [text.replace("shards=4", "shards=7") for text in SMALL]
    result = cli(*example_command(cli, 2, inputs))
    assert result.code == 0, result.text
    assert result.json["output"]["checksum"] == clean["output"]["checksum"]


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_same_result_after_a_kill(cli: Cli, clean: dict[str, Any], share: float) -> None:
    """Everything is killed when that share of the tasks is committed; another number of ranks finishes it."""
    run = cli.start(*example_command(cli, 2, SMALL))
    goal = share * clean["committed"]
    cli.wait_until(lambda: committed(cli, 2) >= goal or run.popen.poll() is not None, "the run gets on")
    assert run.popen.poll() is None, "it had ended before it could be killed"
    cli.kill_all()
    result = cli("resume", "example-2", "--ranks", "1", "--json")
    assert result.code == 0, result.text
    output = result.json["output"]
    with h5py.File(output.pop("out")) as file:
        assert file.attrs["checksum"] == output["checksum"]
    assert output == clean["output"]
    assert result.json["tasks"]["skipped"] >= goal
