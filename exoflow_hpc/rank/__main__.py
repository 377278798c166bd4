"""A rank that was started one by one: ``python -m exoflow_hpc.rank ID --storage DIR``. Not for people: see `exoflow_hpc.local`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from exoflow_hpc.exitcodes import exit_code
from exoflow_hpc.rank.session import Session
from exoflow_hpc.storage import Storage
from exoflow_hpc.summary import summarize

__all__ = ["OUTCOME", "main"]

#: file in the rendezvous directory by which the head tells the launcher how the run ended
OUTCOME = "outcome.json"


def main() -> int:
    """Run this rank's part; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m exoflow_hpc.rank")
    parser.add_argument("workflow_id")
    parser.add_argument("--storage", required=True)
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--terminal", action="store_true")
    arguments = parser.parse_args()
    session = Session()
    try:
        storage = Storage(arguments.storage, create=False) if session.rank == 0 else None
        ended = session.run(storage, arguments.workflow_id, quiet=arguments.quiet, terminal=arguments.terminal)
        if session.rank == 0 and storage is not None:
            text = json.dumps(summarize(storage, ended))
            path = Path(os.environ["HOPLITE_RENDEZVOUS"], OUTCOME)
            path.with_suffix(".tmp").write_text(text)
            path.with_suffix(".tmp").rename(path)
    finally:
        session.close()
    return exit_code(ended.status)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # MPI_Finalize can hang after a peer's death, and everything is durable
