"""Entry of the writer process: started as a script, so that importing it loads neither package.

The `__init__` of the packages may load MPI, and MPI in a process that the launcher doesn't know hurts the whole job. So
their names are bound here to empty packages with the same path, and only the modules that are needed are imported from
them.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["main"]

_BARE = ("hoplite_mpi", "exoflow_hpc", "exoflow_hpc.checkpoint")


def main() -> None:
    """Run the writer process."""
    root = Path(__file__).resolve().parents[2]
    sys.path[0] = str(root)  # was this directory, whose modules would hide others of the same name
    for name in _BARE:
        module = ModuleType(name)
        module.__path__ = [str(root.joinpath(*name.split(".")))]
        sys.modules[name] = module
    importlib.import_module("exoflow_hpc.checkpoint.process").main()


if __name__ == "__main__":
    main()
