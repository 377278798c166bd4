from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hoplite_mpi.testing import fault


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    fault.disable()
    yield
    fault.disable()


def test_point_off_does_nothing_and_counts_nothing() -> None:
    fault.point("a")
    assert fault.passed("a") == 0


def test_raise_at_the_kth_passing_only() -> None:
    fault.enable("a.b=raise@2")
    fault.point("a.b")
    with pytest.raises(fault.FaultInjected, match=r"a\.b, passing 2"):
        fault.point("a.b")
    fault.point("a.b")
    assert fault.passed("a.b") == 3


def test_two_rules_for_one_point() -> None:
    fault.enable("a=raise@1; a=raise@2")
    for _ in range(2):
        with pytest.raises(fault.FaultInjected):
            fault.point("a")
    fault.point("a")


def test_corrupt_changes_one_byte_at_the_kth_passing_only() -> None:
    fault.enable("a=corrupt@2")
    buffers = [bytearray(5) for _ in range(3)]
    for buffer in buffers:
        fault.corrupt("a", memoryview(buffer))
    assert [sum(byte != 0 for byte in buffer) for buffer in buffers] == [0, 1, 0]
    assert fault.passed("a") == 3


def test_corrupt_at_every_passing() -> None:
    fault.enable("a=corrupt@*")
    buffer = bytearray(1)
    for passing in range(1, 4):
        fault.corrupt("a", memoryview(buffer))
        assert buffer[0] == (0xFF if passing % 2 else 0)
    fault.corrupt("a", memoryview(bytearray(0)))


def test_a_point_with_a_buffer_fails_in_all_other_ways_too() -> None:
    buffer = memoryview(bytearray(3))
    fault.corrupt("a", buffer)
    assert fault.passed("a") == 0
    fault.enable("a=raise")
    with pytest.raises(fault.FaultInjected):
        fault.corrupt("a", buffer)
    assert bytes(buffer) == bytes(3)


def test_a_point_without_a_buffer_has_nothing_to_corrupt() -> None:
    fault.enable("a=corrupt")
    with pytest.raises(fault.FaultInjected, match="nothing that could be corrupted"):
        fault.point("a")


def test_other_points_are_left_alone() -> None:
    fault.enable("a=raise")
    fault.point("b")
    assert (fault.passed("a"), fault.passed("b")) == (0, 1)


@pytest.mark.parametrize("spec", ["a", "a=explode", "a=kill@0", "a=kill@", "x:a=kill", "a=kill#-1", "=kill"])
def test_a_bad_spec_is_refused_and_changes_nothing(spec: str) -> None:
    fault.enable("b=raise")
    with pytest.raises(ValueError, match="is not a fault"):
        fault.enable(spec)
    with pytest.raises(fault.FaultInjected):
        fault.point("b")


@pytest.mark.parametrize(
    ("spec", "rank", "incarnation", "fires"),
    [
        ("2:a=raise", 2, 0, True),
        ("2:a=raise", 1, 0, False),
        ("a=raise", 1, 0, True),
        ("a=raise", 1, 1, False),
        ("a=raise#1", 1, 1, True),
        ("a=raise#1", 1, 0, False),
        ("2:a=raise@1#*", 2, 7, True),
    ],
)
def test_rank_and_incarnation(
    spec: str, rank: int, incarnation: int, fires: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOPLITE_RANK", str(rank))
    monkeypatch.setenv("HOPLITE_INCARNATION", str(incarnation))
    fault.enable(spec)
    if fires:
        with pytest.raises(fault.FaultInjected):
            fault.point("a")
    else:
        fault.point("a")


_PASS = "from hoplite_mpi.testing import fault; fault.point('p'); print('alive')"


@pytest.mark.parametrize(("action", "code"), [("kill", -signal.SIGKILL), ("exit", 70), ("raise", 1)])
def test_actions_from_the_environment(action: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PASS],
        env={**os.environ, "HOPLITE_FAULT": f"p={action}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code
    assert "alive" not in done.stdout


def test_stop_stops_and_the_process_can_be_continued() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", _PASS], env={**os.environ, "HOPLITE_FAULT": "p=stop"}, stdout=subprocess.PIPE, text=True
    )
    try:
        pid, status = os.waitpid(child.pid, os.WUNTRACED)
        assert pid == child.pid
        assert os.WIFSTOPPED(status)
        child.send_signal(signal.SIGCONT)
        assert child.communicate(timeout=60)[0] == "alive\n"
    finally:
        child.kill()
        child.wait()


def test_testing_is_light_to_import() -> None:
    code = "import sys, hoplite_mpi.testing; print([m in sys.modules for m in ('hoplite_mpi.launch', 'mpi4py.MPI')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[False, False]\n"


def test_counting_without_a_rule() -> None:
    fault.enable("", counting=True)
    fault.point("a")
    fault.point("a")
    assert fault.counts() == {"a": 2}


def test_a_rule_fires_in_one_of_the_processes_that_share_a_directory(tmp_path: Path) -> None:
    environment = {**os.environ, "HOPLITE_FAULT": "p=exit#*", "HOPLITE_FAULT_FIRED": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PASS], env={**environment, "HOPLITE_RANK": str(rank)}, stdout=subprocess.PIPE
        )
        for rank in range(3)
    ]
    for process in processes:
        process.communicate(timeout=60)
    codes = [process.returncode for process in processes]
    assert sorted(codes) == [0, 0, 70]
    (entry,) = fault.fired(tmp_path)
    assert (entry.rule, entry.point) == ("p=exit#*", "p")
    assert entry.rank == codes.index(70)
    assert entry.pid == processes[entry.rank].pid
    assert 0 < time.monotonic() - entry.time < 60
