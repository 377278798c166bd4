"""The campaign: `python -m tests.hoplite_mpi.chaos [--seed S] [--kills N] ...`, which is what ``make chaos`` calls."""

from __future__ import annotations

import sys

from tests.hoplite_mpi.chaos.campaign import main

sys.exit(main())
