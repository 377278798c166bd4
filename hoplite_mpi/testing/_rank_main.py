"""What a rank process of `run_ranks` runs: the given callable or script, and then out by the short way."""

from __future__ import annotations

import faulthandler
import os
import pickle
import runpy
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import cloudpickle

from hoplite_mpi import ending

__all__ = ["BEGUN", "PAYLOAD", "VALUE"]

#: file in the rendezvous directory with what to run
PAYLOAD = "payload.pickle"
#: files that a rank writes there: when its program begins, and its value; formatted with rank and incarnation
BEGUN = "begun.{}.{}"
VALUE = "value.{}.{}"

#: seconds before the deadline of the run at which a rank says what it is doing
_DUMP_BEFORE = 1.0


def _write(name: str, content: bytes) -> None:
    """Write a file of this rank so that whoever sees it sees all of it."""
    path = Path(os.environ["HOPLITE_RENDEZVOUS"]) / name.format(
        os.environ["HOPLITE_RANK"], os.environ["HOPLITE_INCARNATION"]
    )
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.rename(path)


def _run(payload: dict[str, Any]) -> None:
    if payload["script"] is not None:
        sys.argv = [payload["script"], *map(str, payload["args"])]
        sys.path.insert(0, os.path.dirname(payload["script"]))
        _write(BEGUN, b"")
        runpy.run_path(payload["script"], run_name="__main__")
        return
    # Here and not in _main: a failing import in it is the error of the rank.
    function, args = pickle.loads(payload["call"])
    _write(BEGUN, b"")
    value = function(*args)
    _write(VALUE, cloudpickle.dumps(value))


def _main() -> NoReturn:
    code: Any = 0
    try:
        payload = pickle.loads((Path(os.environ["HOPLITE_RENDEZVOUS"]) / PAYLOAD).read_bytes())
        sys.path[:] = payload["path"]
        # from a thread of C: also when another one has the GIL
        faulthandler.dump_traceback_later(max(0.1, payload["deadline"] - _DUMP_BEFORE - time.monotonic()))
        _run(payload)
        ending.close_stores()
    except SystemExit as leave:
        code = leave.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit((code or 0) & 0xFF)  # MPI_Finalize, which a normal exit would call, can hang after a peer was killed


if __name__ == "__main__":
    _main()
