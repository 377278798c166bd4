"""Commands that ask about workflows, or end them."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from exoflow_hpc import api, summary
from exoflow_hpc.cli.streams import put
from exoflow_hpc.history import Status

__all__ = ["STATES", "cancel", "delete", "list_all", "output", "status"]

STATES = Status.ALL


def status(options: Any) -> int:
    """Print the state of a workflow, or of all."""
    if options.id is None:
        return list_all(options, None)
    known = api.get_metadata(options.id, storage=options.storage)
    if options.json:
        wire = dataclasses.asdict(known)
        put(json.dumps({name: value for name, value in wire.items() if value is not None}))
    else:
        put(
            f"{known.workflow_id}: {known.status}, {known.committed} of {known.tasks} tasks committed, epoch {known.epoch}"
        )
    return 0


def list_all(options: Any, wanted: str | None = None) -> int:
    """Print all workflows with their states."""
    found = api.list_all(getattr(options, "status", wanted), options.storage)
    if options.json:
        put(json.dumps({"workflows": [{"workflow_id": one, "status": state} for one, state in found]}))
    else:
        width = max((len(one) for one, _ in found), default=0)
        for one, state in found:
            put(f"{one:{width}}  {state}")
    return 0


def output(options: Any) -> int:
    """Print a committed output."""
    value = api.get_output(options.id, options.task, options.storage)
    if options.json:
        put(json.dumps({"workflow_id": options.id, "task": options.task, "output": summary.jsonable(value)}))
    else:
        put(summary.text(value))
    return 0


def cancel(options: Any) -> int:
    """Stop a workflow for good."""
    api.cancel(options.id, options.storage)
    return _done(options, "CANCELED")


def delete(options: Any) -> int:
    """Delete a workflow."""
    api.delete(options.id, options.storage)
    return _done(options, "DELETED")


def _done(options: Any, what: str) -> int:
    if options.json:
        put(json.dumps({"workflow_id": options.id, "status": what}))
    else:
        put(f"{options.id}: {what}")
    return 0
