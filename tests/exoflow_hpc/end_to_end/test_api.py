"""`run` and its kin called by a Python program: alone, and as ranks under mpiexec."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import Cli

__all__: list[str] = []

pytestmark = pytest.mark.timeout(150)

ALONE = """
import numpy as np
import pytest
import exoflow_hpc as ef

@ef.task
def add(a, b):
    return a + b

@ef.task
def ones(n):
    return np.ones(n)

@ef.task
def divide(a, b):
    return a / b

if __name__ == "__main__":
    node = add.bind(ef.InputNode()["x"], add.options(name="inner").bind(1, 2))
    assert ef.run(node, "w", {"x": 10}, ranks=2) == 13
    assert ef.run(node, "w", {"x": 10}, ranks=2) == ef.resume("w") == ef.get_output("w") == 13
    assert ef.get_output("w", "inner") == 3
    assert ef.get_status("w") == "SUCCESSFUL"
    assert ef.get_metadata("w").committed == 2
    with pytest.raises(ef.WorkflowExistsError):
        ef.run(node, "w", {"x": 11})
    future = ef.run_async(ones.bind(100_000), "v", ranks=1)
    array = future.result(60)
    assert array.shape == (100_000,) and array.sum() == 100_000
    with pytest.raises(ef.TaskError, match="divide.*ZeroDivisionError") as caught:
        ef.run(divide.bind(1, 0), "bad", ranks=1)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert ef.list_all() == [("bad", "FAILED"), ("v", "SUCCESSFUL"), ("w", "SUCCESSFUL")]
    assert ef.list_all("FAILED") == [("bad", "FAILED")]
    with pytest.raises(ef.ExoFlowError, match="node|DAG"):
        ef.run(5)
    with pytest.raises(ValueError, match="ranks"):
        ef.run(add.bind(1, 2), ranks=0)
    ef.delete("w")
    for ask in (ef.get_status, ef.get_output, ef.get_metadata, ef.resume, ef.delete, ef.cancel):
        with pytest.raises(ef.WorkflowNotFoundError):
            ask("w")
    print("all is well")
"""

RANKS = """
import os, sys, time
import numpy as np
import exoflow_hpc as ef

@ef.task
def add(a, b):
    return a + b

@ef.task
def divide(a, b):
    return a / b

@ef.task
def ones(n):
    return np.ones(n, np.int64)

def attempt(*args, **kwargs):
    try:
        return ef.run(*args, **kwargs)
    except ef.ExoFlowError as error:
        return type(error).__name__

if __name__ == "__main__":
    is_first = os.environ["PMI_RANK"] == "0"
    values = [
        attempt(add.bind(add.bind(1, 2), 3), "w" if is_first else None),
        attempt(divide.bind(1, 0)),
        attempt(add.bind(1, 2), "no/id" if is_first else None),
        attempt(5 if is_first else add.bind(1, 2)),
        ef.resume("w"),
    ]
    # deleted, and made anew: nothing of the first one is in the way
    for turn in range(2):
        values.append(attempt(ef.reduce([ones.bind(100_000), ones.bind(100_000)]), "again").sum().item())
        if is_first:
            while not os.path.exists(f"read-{turn}"):
                time.sleep(0.01)
            ef.delete("again", storage=os.environ["EXOFLOW_STORAGE"])
        else:
            open(f"read-{turn}", "w").close()
    values[2:4] = ["ok" if "Error" in str(value) else value for value in values[2:4]]
    sys.stdout.write(f"{values}\\n")
"""

DIES = """
import exoflow_hpc as ef

if __name__ == "__main__":
    ef.run(5)
"""


def test_alone(cli: Cli) -> None:
    (cli.directory / "program.py").write_text(ALONE)
    result = cli.program("program.py")
    assert result.code == 0, result.text
    assert result.stdout.splitlines()[-1] == "all is well"


def test_as_ranks(cli: Cli) -> None:
    """Every rank gets the value, or an error; what is refused on rank 0 leaves no other waiting, and the next run goes well."""
    (cli.directory / "program.py").write_text(RANKS)
    result = cli.program("program.py", launcher=("mpiexec", "-n", "2"))
    assert result.code == 0, result.text
    assert result.stdout.splitlines() == [str([6, "TaskError", "ok", "ok", 6, 200_000, 200_000])] * 2


def test_as_ranks_that_give_up(cli: Cli) -> None:
    (cli.directory / "program.py").write_text(DIES)
    result = cli.program("program.py", launcher=("mpiexec", "-n", "2"))
    assert result.code != 0
    assert "BadWorkflowError" in result.stderr
