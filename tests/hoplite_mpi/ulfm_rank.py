"""What a rank of `ulfm.run_together` runs: a function from a file, to the end that a user's program would have."""

from __future__ import annotations

import faulthandler
import os
import pickle
import sys
import time
import traceback
from pathlib import Path


def main() -> int:
    """Run the function in the payload, leave its value and the exit code beside it."""
    payload = Path(sys.argv[1])
    directory, rank = payload.parent, os.environ["OMPI_COMM_WORLD_RANK"]
    output = os.open(directory / f"rank{rank}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # by which fault points know the rank, and each rank has a node of its own, so that bytes travel by MPI
    os.environ["HOPLITE_RANK"] = rank
    os.environ["HOPLITE_NODE"] = f"{os.environ['HOPLITE_RUN']}-{rank}"
    what = pickle.loads(payload.read_bytes())
    faulthandler.dump_traceback_later(max(0.1, what["deadline"] - 1 - time.monotonic()))
    code = 0
    try:
        function, args = pickle.loads(what["call"])
        value = function(*args)
        (directory / f"value.{rank}").write_bytes(pickle.dumps(value))
    except SystemExit as leave:
        code = int(leave.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    (directory / f"code.{rank}").write_text(str(code))
    return code


if __name__ == "__main__":
    sys.exit(main())
