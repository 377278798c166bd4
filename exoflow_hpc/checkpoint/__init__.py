"""Checkpoints: outputs of tasks in immutable HDF5 files that any HDF5 tool can read.

A rank hands its outputs to a `WriterClient`; its writer process puts all that came meanwhile into one file. `read` and
`read_into` give them back, checked. `orphans` names the files that no journal record refers to, `links` those that a
file needs.
"""

from __future__ import annotations

from exoflow_hpc.checkpoint.client import WriterClient
from exoflow_hpc.checkpoint.reader import entries, links, orphans, read, read_into, shard_info
from exoflow_hpc.checkpoint.wire import FileSource, WriteRequest, Written

__all__ = [
    "FileSource",
    "WriteRequest",
    "WriterClient",
    "Written",
    "entries",
    "links",
    "orphans",
    "read",
    "read_into",
    "shard_info",
]
