"""The command line: ``python -m exoflow_hpc COMMAND``, also installed as ``exoflow``."""

from __future__ import annotations

from exoflow_hpc.cli.main import entry, main

__all__ = ["entry", "main"]
