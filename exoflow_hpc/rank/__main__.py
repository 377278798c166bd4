"""A rank that was started one by one: ``python -m exoflow_hpc.rank ID --storage DIR``. Not for people: see `exoflow_hpc.local`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from exoflow_hpc.errors import ExoFlowError
from exoflow_hpc.exitcodes import RESUMABLE, exit_code
from exoflow_hpc.history import Status
from exoflow_hpc.local import OUTCOME, joined_marker
from exoflow_hpc.rank.session import Session
from exoflow_hpc.storage import Storage
from exoflow_hpc.summary import summarize
from hoplite_mpi.errors import HopliteError
from hoplite_mpi.launch import REPLACE_ME

__all__ = ["main"]


def main() -> int:
    """Run this rank's part; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m exoflow_hpc.rank")
    parser.add_argument("workflow_id")
    parser.add_argument("--storage", required=True)
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--terminal", action="store_true")
    arguments = parser.parse_args()
    session: Session | None = None
    try:
        session = Session()
        _rendezvous(joined_marker(session.rank, session.incarnation)).touch()
        storage = Storage(arguments.storage, create=False)
        ended = session.run(
            lambda: (storage, arguments.workflow_id),
            repeatable=True,
            quiet=arguments.quiet,
            terminal=arguments.terminal,
        )
        if session.led and not session.store.closed:
            _tell_launcher({"summary": summarize(storage, ended), "members": session.members()})
        if session.store.closed and ended.status == Status.RESUMABLE:
            print(f"exoflow_hpc: {ended.error}", file=sys.stderr)
            return REPLACE_ME  # the others go on, and can use one more
        return exit_code(ended.status)
    except (ExoFlowError, HopliteError) as error:
        print(f"exoflow_hpc: rank {os.environ.get('HOPLITE_RANK', '?')}: {error}", file=sys.stderr)
        return _after_error(session)
    except Exception:  # an error of this package: it ends this rank, and nobody may wait for it
        print(f"exoflow_hpc: rank {os.environ.get('HOPLITE_RANK', '?')} failed unexpectedly:", file=sys.stderr)
        traceback.print_exc()
        return _after_error(session)
    finally:
        if session is not None:
            session.close()


def _after_error(session: Session | None) -> int:
    """Return the exit code: one who controlled the run has ended it, without any other it goes on and can use one more."""
    return RESUMABLE if session is not None and session.led else REPLACE_ME


def _rendezvous(name: str) -> Path:
    return Path(os.environ["HOPLITE_RENDEZVOUS"], name)


def _tell_launcher(what: dict[str, Any]) -> None:
    """Say how the run ended, all at once: the launcher looks for the file."""
    path = _rendezvous(OUTCOME)
    path.with_suffix(".tmp").write_text(json.dumps(what))
    path.with_suffix(".tmp").rename(path)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # MPI_Finalize can hang after a peer's death, and everything is durable
