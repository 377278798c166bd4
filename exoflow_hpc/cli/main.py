"""Arguments of the command line, and what becomes of errors."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from exoflow_hpc import exitcodes
from exoflow_hpc._version import __version__
from exoflow_hpc.cli import care, query, run
from exoflow_hpc.cli.interrupt import Interrupted, interruptible
from exoflow_hpc.cli.streams import put, repair
from exoflow_hpc.errors import ExoFlowError, TaskError
from exoflow_hpc.local import is_other_rank
from exoflow_hpc.settings import RETENTIONS, Settings
from hoplite_mpi.config import Config
from hoplite_mpi.errors import HopliteError
from hoplite_mpi.launch import LaunchError

__all__ = ["entry", "main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m exoflow_hpc", description="Exactly-once task DAGs over MPI ranks.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, act: Callable[..., int], text: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text)
        one.add_argument(
            "--storage", metavar="DIR", help="storage directory (default: EXOFLOW_STORAGE, else ./.exoflow)"
        )
        one.add_argument("--json", action="store_true", help="print one JSON object on the last line")
        one.set_defaults(act=act)
        return one

    one = command("run", run.run, "run the workflow that FILE defines; goes on with --id if it is the same workflow")
    one.add_argument(
        "file", metavar="FILE[:FUNCTION]", help="Python file with a function workflow(**inputs) that returns a DAG"
    )
    one.add_argument(
        "--input", action="append", default=[], metavar="KEY=VALUE", help="input; VALUE is JSON, else a string"
    )
    one.add_argument("--id", help="id of the workflow (default: a new one)")
    _ranks(one)
    one = command("resume", run.resume, "go on with a workflow that was interrupted or failed")
    one.add_argument("id", metavar="ID")
    _ranks(one)
    one = command("status", query.status, "say how a workflow stands, or all")
    one.add_argument("id", metavar="ID", nargs="?")
    one = command("list", query.list_all, "list all workflows with their states")
    one.add_argument("--status", choices=query.STATES, help="only those in this state")
    one = command("output", query.output, "print the output of a workflow, or of one of its tasks")
    one.add_argument("id", metavar="ID")
    one.add_argument("task", metavar="TASK", nargs="?")
    command("cancel", query.cancel, "stop a workflow for good").add_argument("id", metavar="ID")
    command("delete", query.delete, "delete a workflow with all it has stored").add_argument("id", metavar="ID")
    one = command(
        "verify", care.check, "check everything that is stored of a workflow; exit code 1 if any of it is damaged"
    )
    one.add_argument("id", metavar="ID")
    one = command("array", care.array, "write a file in which a global array of a workflow is one dataset")
    one.add_argument("id", metavar="ID")
    one.add_argument("name", metavar="NAME", nargs="?", default="array")
    one = command("gc", care.collect, "free what nobody needs: leftovers of kills, and files that no record names")
    one.add_argument(
        "--retention",
        choices=RETENTIONS,
        help="outputs to leave of workflows that have succeeded (default: EXOFLOW_RETENTION, else all)",
    )
    return parser


def _ranks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=_positive, metavar="N", help="local ranks to start (default: as many as cores)")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def _positive(text: str) -> int:
    number = int(text) if text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of ranks: at least 1 is needed")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out a command line and return its exit code: 0 successful, 1 failed, 2 bad usage or input, 3 resumable."""
    with contextlib.ExitStack() as stack:
        if is_other_rank():  # the first one says it
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        options = _parser().parse_args(arguments)
    options.workflow_id = None
    if is_other_rank() and options.command not in ("run", "resume"):  # the first one does it
        return exitcodes.SUCCESSFUL
    try:
        with interruptible():
            _check_environment()
            return int(options.act(options))
    except Interrupted as signal:
        if is_other_rank():
            return exitcodes.RESUMABLE
        text = f"stopped by {signal}"
        if options.workflow_id is not None:
            text += f"; go on with: python -m exoflow_hpc resume {options.workflow_id}"
        return _report(options, text, exitcodes.RESUMABLE, options.workflow_id)
    except (ExoFlowError, HopliteError, LaunchError) as error:
        failed = isinstance(error, TaskError)
        return _report(options, str(error), exitcodes.FAILED if failed else exitcodes.BAD_USAGE, options.workflow_id)


def _check_environment() -> None:
    """Raise ExoFlowError for a setting in the environment that can't be read: here once, and not in each rank."""
    try:
        Settings.from_environment()
        Config.from_environment()
    except ValueError as error:
        raise ExoFlowError(str(error)) from None


def _report(options: Any, text: str, code: int, workflow_id: str | None) -> int:
    """Say what went wrong, for people on stderr and for programs as JSON."""
    print(f"exoflow_hpc: {text}", file=sys.stderr, flush=True)
    if options.json:
        status = {exitcodes.FAILED: "FAILED", exitcodes.RESUMABLE: "RESUMABLE"}.get(code)
        with contextlib.suppress(ExoFlowError):  # that stdout can't be written may be just what went wrong
            put(json.dumps({"workflow_id": workflow_id, "status": status, "output": None, "error": text}))
    return code


def entry() -> NoReturn:
    """Run the command line of this process and exit."""
    repair()
    sys.exit(main())
