"""Whether ranks under Open MPI outlive one another, by what a process sees of its launcher."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from hoplite_mpi.transport import openmpi

LIBRARY = "Open MPI v5.0.11, package: Open MPI user@localhost Distribution, ident: 5.0.11"
#: under `mpiexec --with-ft ulfm`, with what `prepare_environment` adds
GOOD = {
    "OMPI_MCA_mpi_ft_enable": "1",
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_btl": "tcp,self",
    "OMPI_MCA_btl_tcp_flags": "send,inplace",
    "PRTE_LAUNCHED": "1",
    "PMIX_HOSTNAME": "node.17",
    "PMIX_NAMESPACE": "prterun-another-1@1",  # it runs on another node
}


def test_under_ulfm_they_do() -> None:
    assert openmpi.why_not(LIBRARY, GOOD) is None
    assert openmpi.why_not(LIBRARY, GOOD | {"OMPI_MCA_btl": "self,tcp", "SLURM_STEP_ID": "0"}) is None


@pytest.mark.parametrize(
    ("library", "change", "why", "advice"),
    [
        ("Open MPI v4.1.6, package: Debian", {}, "before version 5", "openmpi"),
        (LIBRARY, {"OMPI_MCA_mpi_ft_enable": "0"}, "without ULFM", "--with-ft ulfm"),
        (LIBRARY, {"OMPI_MCA_mpi_ft_enable": ""}, "without ULFM", "--with-ft ulfm"),
        (LIBRARY, {"SLURM_STEP_ID": "0", "PRTE_LAUNCHED": ""}, "Slurm ends", "inside of the allocation"),
        (LIBRARY, {"OMPI_MCA_pml": ""}, "OMPI_MCA_pml=(unset)", "import hoplite_mpi before mpi4py.MPI"),
        (LIBRARY, {"OMPI_MCA_pml": "ucx"}, "OMPI_MCA_pml=ucx", "export OMPI_MCA_pml=ob1"),
        (LIBRARY, {"OMPI_MCA_btl": "^sm"}, "OMPI_MCA_btl=^sm", "export OMPI_MCA_btl=tcp,self"),
        (LIBRARY, {"OMPI_MCA_btl_tcp_flags": "send,put"}, "btl_tcp_flags=send,put", "send,inplace"),
    ],
)
def test_otherwise_it_is_said_why_not_and_what_to_do(
    library: str, change: dict[str, str], why: str, advice: str
) -> None:
    said = openmpi.why_not(library, GOOD | change)
    assert said is not None
    assert why in said[0]
    assert advice in said[1]


@pytest.fixture
def launcher(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """A process with a launcher's arguments; what its ranks would see."""
    command = [sys.executable, "-c", "print(flush=True); input()", *request.param]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout is not None
        process.stdout.readline()  # before it runs it has our arguments
        yield GOOD | {"PMIX_NAMESPACE": f"prterun-node.17-{process.pid}@1"}


@pytest.mark.parametrize("launcher", [["--with-ft", "ulfm", "-n", "2"], ["--enable-recovery"]], indirect=True)
def test_a_launcher_that_was_told_keeps_going(launcher: dict[str, str]) -> None:
    assert openmpi.why_not(LIBRARY, launcher) is None


@pytest.mark.parametrize("launcher", [["--mca", "mpi_ft_enable", "1"]], indirect=True)
def test_a_launcher_that_was_not_told_does_not(launcher: dict[str, str]) -> None:
    said = openmpi.why_not(LIBRARY, launcher)
    assert said is not None and "the launcher was not told" in said[0]


def test_a_launcher_that_is_gone_says_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert openmpi.why_not(LIBRARY, GOOD | {"PMIX_NAMESPACE": f"prterun-node.17-{process.pid}@1"}) is None
