"""``python -m exoflow_hpc``: see `exoflow_hpc.cli`."""

from __future__ import annotations

from exoflow_hpc.cli import entry

if __name__ == "__main__":
    entry()
