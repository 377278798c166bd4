"""One rank of the test run under mpiexec. Only rank 0 prints; the others write to files, shown if one fails."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Python put tests/ there, where `hoplite_mpi` is the directory of its tests.
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest


def main() -> int:
    """Run pytest with the arguments after the first, which is the directory for the output of the other ranks."""
    rank = os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or "0"
    if rank != "0":
        Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
        output = os.open(Path(sys.argv[1], f"rank.{rank}.out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
    return int(pytest.main(sys.argv[2:]))


if __name__ == "__main__":
    sys.exit(main())
