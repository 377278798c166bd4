"""The campaign: `python -m tests.exoflow_hpc.chaos [--seed S] [--kills N] ...`, which is what ``make chaos-workflows`` calls."""

from __future__ import annotations

import sys

from tests.exoflow_hpc.chaos.campaign import main

sys.exit(main())
