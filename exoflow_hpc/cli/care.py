"""Commands that look after a storage: is all of it as it was written, and what of it does nobody need?"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from exoflow_hpc import api, exitcodes, garbage, verification
from exoflow_hpc.cli.streams import put
from exoflow_hpc.settings import Settings
from exoflow_hpc.storage import Storage

__all__ = ["array", "check", "collect"]


def array(options: Any) -> int:
    """Write the file that has a global array as one dataset, and print its path."""
    found = api.read_global(options.id, options.name, options.storage)
    path = found.to_hdf5()
    if options.json:
        wire = {"name": found.name, "shape": found.shape, "dtype": str(found.dtype), "file": str(path)}
        put(json.dumps({"workflow_id": options.id, **wire}))
    else:
        put(f"{path}: dataset {found.name!r} of shape {found.shape}, {found.dtype}")
    return exitcodes.SUCCESSFUL


def check(options: Any) -> int:
    """Print what is damaged of a workflow; the exit code is 1 if anything is."""
    report = verification.examine(Storage.locate(options.storage, create=False), options.id)
    for finding in report.findings:
        put(finding.problem if finding.task is None else f"task {finding.task}: {finding.problem}")
    for tail in report.torn:
        put(
            f"note: {tail.file} ends with {tail.nbytes} bytes that are no record, at {tail.offset}: never acknowledged, or damaged"
        )
    if options.json:
        found = [dataclasses.asdict(finding) for finding in report.findings]
        wire = dataclasses.asdict(report) | {"workflow_id": options.id, "ok": not found, "findings": found}
        put(json.dumps(wire))
    else:
        put(
            f"{options.id}: {report.journal_files} journal files and {report.outputs} outputs "
            f"{f'and {report.references} objects that they refer to, ' if report.references else ''}of {report.nbytes:,} bytes checked, "
            f"{len(report.findings) or 'nothing'} damaged"
        )
    return exitcodes.FAILED if report.findings else exitcodes.SUCCESSFUL


def collect(options: Any) -> int:
    """Free what nobody needs; the exit code is 1 if a workflow had to be left as it is."""
    freed = garbage.collect(
        Storage.locate(options.storage, create=False), options.retention or Settings.from_environment().retention
    )
    for workflow_id, why in freed.skipped:
        put(f"{workflow_id}: left as it is: {why}")
    for workflow_id, task in freed.expired:
        put(f"{workflow_id}: the output of task {task} was removed by retention")
    if options.json:
        put(json.dumps(dataclasses.asdict(freed)))
    else:
        put(f"freed {freed.nbytes:,} bytes in {freed.files} files")
    return exitcodes.FAILED if freed.skipped else exitcodes.SUCCESSFUL
