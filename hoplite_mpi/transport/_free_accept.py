"""What frees a stuck accept, as a process of its own: it connects to the port given, and stays until it is told to go.

It must not leave before the accept is over: MPI crashes a process that accepts somebody who is gone.
"""

from __future__ import annotations

import os
import sys

from hoplite_mpi.memory import unlink_own_segments


def _main() -> None:
    from mpi4py import MPI

    unlink_own_segments()
    MPI.COMM_SELF.Connect(sys.argv[1])
    sys.stdin.read()
    os._exit(0)  # MPI_Finalize would wait for the other side


if __name__ == "__main__":
    _main()
