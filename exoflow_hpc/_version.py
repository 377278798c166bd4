"""The version of the distribution: one for both packages."""

from __future__ import annotations

from hoplite_mpi._version import __version__

__all__ = ["__version__"]
