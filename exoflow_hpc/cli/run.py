"""``run`` and ``resume``: alone, or as one of the ranks that a launcher has started."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exoflow_hpc import api, local, summary
from exoflow_hpc.cli.streams import put
from exoflow_hpc.exitcodes import exit_code
from exoflow_hpc.history import Status
from exoflow_hpc.outcome import REFUSED
from exoflow_hpc.storage import Storage
from exoflow_hpc.workflow_file import load, parse_inputs

__all__ = ["resume", "run"]


def run(options: Any) -> int:
    """Run the workflow of a file."""

    def prepare() -> tuple[Storage, str]:
        inputs = parse_inputs(options.input)
        node = load(options.file, inputs)
        storage = Storage.locate(options.storage)
        return storage, api.submit(storage, node, options.id, inputs, unused_inputs=True)

    return _run(options, prepare)


def resume(options: Any) -> int:
    """Go on with a workflow that is in the storage."""

    def prepare() -> tuple[Storage, str]:
        storage = Storage.locate(options.storage, create=False)
        storage.directory(options.id)
        return storage, options.id

    return _run(options, prepare)


def _run(options: Any, prepare: Callable[[], tuple[Storage, str]]) -> int:
    if local.under_launcher():
        return _run_as_rank(options, prepare)
    storage, workflow_id = prepare()
    options.workflow_id = workflow_id
    result = api.execute(storage, workflow_id, options.ranks, quiet=options.quiet)
    return _put(options, result)


def _run_as_rank(options: Any, prepare: Callable[[], tuple[Storage, str]]) -> int:
    session = api.rank_session()

    known: list[Storage] = []

    def prepared() -> tuple[Storage, str]:
        storage, options.workflow_id = prepare()
        known.append(storage)
        return storage, options.workflow_id

    try:
        ended = session.run(prepared, repeatable=options.id is not None, quiet=options.quiet)
        if not session.led:
            return exit_code(ended.status)  # the one that controls the run says why
        if ended.directory:
            known.append(Storage(Path(ended.directory).parent.parent, create=False))
            options.workflow_id = ended.workflow_id
        if ended.status == REFUSED and ended.error is not None:
            raise ended.error
        if not known:  # it was lost before it began
            print(f"exoflow_hpc: {ended.error}", file=sys.stderr)
            return exit_code(ended.status)
        return _put(options, summary.summarize(known[-1], ended))
    finally:
        session.close()


def _put(options: Any, result: dict[str, Any]) -> int:
    status, workflow_id = result["status"], result["workflow_id"]
    if result.get("error"):
        print(f"exoflow_hpc: workflow {workflow_id}: {result['error']}", file=sys.stderr)
    if status == Status.RESUMABLE:
        print(f"exoflow_hpc: go on with: python -m exoflow_hpc resume {workflow_id}", file=sys.stderr)
    if options.json:
        put(json.dumps(result))
    else:
        tasks, ranks = result["tasks"], result["ranks"]
        put(
            f"{workflow_id}: {status} in {result['seconds']:.1f} s; tasks: {tasks['run']} run, {tasks['skipped']} skipped, "
            f"{tasks['rerun']} run again; ranks: {ranks['started']} started, {ranks['lost']} lost, {ranks['rejoined']} rejoined"
        )
        if status == Status.SUCCESSFUL:
            put(summary.text(result["output"]))
    return exit_code(status)
