from __future__ import annotations

import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from hoplite_mpi.launch import processes_of_run
from hoplite_mpi.testing import fault, run_ranks


def _identity(*args: Any) -> dict[str, Any]:
    names = ("HOPLITE_RANK", "HOPLITE_SIZE", "HOPLITE_INCARNATION", "HOPLITE_RUN")
    return {"args": args, **{name: os.environ[name] for name in names}}


def _left_of(run: str) -> list[Any]:
    """Everything that a run must not leave."""
    directories = list(Path(tempfile.gettempdir()).glob(f"hoplite-run-{run}*"))
    return [*processes_of_run(run), *directories, *Path("/dev/shm").glob(f"hoplite-{os.getuid()}-{run}*")]


def test_each_rank_knows_who_it_is_and_gets_the_arguments() -> None:
    result = run_ranks(2, _identity, args=("x", 3))
    for rank in range(2):
        assert result[rank].exitcode == 0, result[rank].output
        assert result[rank].value["args"] == ("x", 3)
        assert result[rank].value["HOPLITE_RANK"] == str(rank)
        assert result[rank].value["HOPLITE_SIZE"] == "2"
        assert result[rank].value["HOPLITE_INCARNATION"] == "0"
    assert result[0].value["HOPLITE_RUN"] == result[1].value["HOPLITE_RUN"]
    assert _left_of(result[0].value["HOPLITE_RUN"]) == []


def test_closures_travel_by_value() -> None:
    offset = 40
    assert run_ranks(1, lambda: offset + 2)[0].value == 42


def test_an_exception_is_exit_code_1_and_its_traceback_the_output() -> None:
    def fail() -> None:
        print("before")
        raise KeyError("the reason")

    result = run_ranks(1, fail)[0]
    assert (result.exitcode, result.value) == (1, None)
    assert "before" in result.output
    assert "KeyError: 'the reason'" in result.output


@pytest.mark.parametrize("code", [3, 9])
def test_sys_exit_in_a_script(code: int, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys; print(sys.argv[1:]); sys.exit(int(sys.argv[1]))")
    result = run_ranks(1, script, args=(code, "b"))[0]
    assert result.exitcode == code  # 9 is not signal 9
    assert f"['{code}', 'b']" in result.output


def test_a_script_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.py"):
        run_ranks(1, tmp_path / "nothing.py")


def test_kill_at_a_fault_point_takes_that_rank_only() -> None:
    def work() -> int:
        for _ in range(3):
            fault.point("work.step")
        print("done")
        return fault.passed("work.step")

    result = run_ranks(2, work, kill=[(1, "work.step@2")])
    assert (result[0].exitcode, result[0].value) == (0, 0)
    assert (result[1].exitcode, result[1].value) == (-signal.SIGKILL, None)
    assert "done" not in result[1].output


def test_kill_at_a_time() -> None:
    def work() -> str:
        if os.environ["HOPLITE_RANK"] == "1":
            signal.pause()
        return "alive"

    result = run_ranks(2, work, kill=[(1, 0.1)])
    assert (result[0].value, result[0].exitcode) == ("alive", 0)
    assert result[1].exitcode == -signal.SIGKILL


def test_respawn_starts_the_next_incarnation_once() -> None:
    def work() -> str:
        fault.point("work.begin")
        return os.environ["HOPLITE_INCARNATION"]

    result = run_ranks(2, work, kill=[(0, "work.begin")], respawn=True)
    assert [(result[r].value, result[r].incarnation, result[r].exitcode) for r in (0, 1)] == [("1", 1, 0), ("0", 0, 0)]


def test_the_deadline_kills_everything_and_shows_the_output() -> None:
    def hang() -> None:
        if os.fork() == 0:
            os.setsid()  # a grandchild that tries to get away
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("run", os.environ["HOPLITE_RUN"], "hangs", flush=True)
        while True:
            signal.pause()

    start = time.monotonic()
    with pytest.raises(TimeoutError, match="rank 0, incarnation 0: still ran") as info:
        run_ranks(1, hang, timeout=1.5)
    assert time.monotonic() - start < 15
    assert " in hang\n" in str(info.value), "it does not say what the rank was doing"
    words = str(info.value).split()
    assert _left_of(words[words.index("run") + 1]) == []


def test_shared_memory_of_the_run_is_removed() -> None:
    def work() -> str:
        name = f"/dev/shm/hoplite-{os.getuid()}-{os.environ['HOPLITE_RUN']}"
        os.mkdir(name)
        Path(name, "object").write_bytes(b"x")
        return name

    assert not os.path.exists(run_ranks(1, work)[0].value)


def test_a_kill_of_a_rank_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 2"):
        run_ranks(2, _identity, kill=[(2, 0.0)])


def test_ranks_can_use_mpi_each_in_a_world_of_its_own() -> None:
    def world() -> int:
        from mpi4py import MPI

        return MPI.COMM_WORLD.size

    result = run_ranks(2, world)
    assert [result[rank].value for rank in range(2)] == [1, 1], result
