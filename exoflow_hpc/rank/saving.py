"""Outputs on their way from the store to a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from exoflow_hpc import checkpoint
from exoflow_hpc.errors import ExoFlowError, StorageError
from exoflow_hpc.rank import messages as ms
from exoflow_hpc.rank.loop import Strand
from hoplite_mpi import ObjectID
from hoplite_mpi.meta import Meta
from hoplite_mpi.testing import fault

if TYPE_CHECKING:  # importing it initialises MPI
    from hoplite_mpi.store import ObjectStore

__all__ = ["Saver"]


class Saver:
    """Has outputs written by the rank's writer process. All methods run inside of the loop."""

    def __init__(
        self, store: ObjectStore, writer: checkpoint.WriterClient, loop: Strand, reply: Callable[[ms.Message], None]
    ) -> None:
        self._store = store
        self._writer = writer
        self._loop = loop
        self._reply = reply

    def write(self, message: ms.Write, oid: ObjectID, workflow_dir: str, name: str) -> None:
        """Write output *oid* of task *name*, or what it has put; answered by `Written` or `WriteFailed`."""
        future = self._store.get_async(oid)
        future.add_done_callback(
            lambda _: self._loop.post(lambda: self._write_value(message, oid, workflow_dir, name, future))
        )

    def _write_value(self, message: ms.Write, oid: ObjectID, workflow_dir: str, name: str, future: Any) -> None:
        ready = None if future.cancelled() or future.exception() is not None else self._store.local(oid)
        if ready is None:
            self._reply(
                ms.WriteFailed(
                    message.epoch, message.task, message.attempt, "its bytes are gone", 0, True, message.index
                )
            )
            return
        # held until the writer is done with the bytes
        value = future.result()
        source: checkpoint.FileSource | bytes
        if ready.inline is not None:
            source = ready.inline
        else:
            source = checkpoint.FileSource(*self._store.arena_file(oid, ready.version), ready.meta.nbytes)
        entry = name if message.index < 0 else f"{name}.put{message.index}"
        request = checkpoint.WriteRequest(workflow_dir, message.epoch, name, entry, ready.meta, source)

        def written(_: checkpoint.WriteRequest, outcome: checkpoint.Written | ExoFlowError) -> None:
            self._loop.post(lambda: self._written(message, ready.meta, outcome, value))

        try:
            self._writer.submit([request], written)
        except ExoFlowError as error:
            self._written(message, ready.meta, error, value)

    def _written(self, message: ms.Write, meta: Meta, outcome: checkpoint.Written | ExoFlowError, value: Any) -> None:
        del value  # its bytes were needed until now
        if isinstance(outcome, ExoFlowError):
            number = outcome.errno or 0 if isinstance(outcome, StorageError) else 0
            self._reply(
                ms.WriteFailed(message.epoch, message.task, message.attempt, str(outcome), number, False, message.index)
            )
            return
        fault.point("agent.written")
        self._reply(
            ms.Written(
                message.epoch,
                message.task,
                message.attempt,
                outcome.file,
                outcome.entry,
                outcome.checksum,
                outcome.nbytes,
                meta.to_wire(),
                message.index,
            )
        )
