"""Reduce tasks: arrays are added up by the ranks themselves, without a worker."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any

import numpy as np

from exoflow_hpc.rank.failure import Failure
from exoflow_hpc.rank.job import Job
from exoflow_hpc.rank.loop import Strand
from exoflow_hpc.records import INLINE_LIMIT
from exoflow_hpc.worker.protocol import ArenaInput, InlineInput
from hoplite_mpi import ClosedError, EvictedError, HopliteError, ObjectID
from hoplite_mpi.memory import reduce_into
from hoplite_mpi.meta import Meta

if TYPE_CHECKING:  # importing it initialises MPI
    from hoplite_mpi.store import ObjectStore

__all__ = ["Reducer"]


class Reducer:
    """Carries out reduces that have all their inputs. All methods run inside of the loop unless they say otherwise."""

    def __init__(
        self,
        store: ObjectStore,
        loop: Strand,
        helpers: Executor,
        finished: Callable[[Job, Meta, bytes | None, float], None],
        failed: Callable[[Job, Failure], None],
    ) -> None:
        self._store = store
        self._loop = loop
        self._helpers = helpers
        self._finished = finished
        self._failed = failed

    def reduce(self, job: Job) -> None:
        """Add up arrays: integers by a tree over the ranks, in whatever order; floats here, in the order of the sources.

        A task that runs again has to give the same bits, which floats added in another order do not.
        """
        metas = [self._meta_of(job, position) for position in range(len(job.run.inputs))]
        first = metas[0]
        for position, meta in enumerate(metas):
            if meta.dtype is None or meta.dtype != first.dtype or meta.shape != first.shape:
                text = f"reduce needs arrays of one dtype and shape: input {position} is {_what(meta)}, input 0 is {_what(first)}"
                self._failed(job, Failure("exception", text))
                return
        assert first.dtype is not None
        ids = {position: one.oid for position, one in job.inputs.items() if isinstance(one, ArenaInput)}
        exact = first.dtype.kind in "biu"
        if exact and len(ids) == len(metas) > 1:
            self._reduce_by_tree(job, first, list(ids.values()))
        else:
            self._helpers.submit(self._reduce_in_order, job, first)

    def _meta_of(self, job: Job, position: int) -> Meta:
        one = job.inputs[position]
        if isinstance(one, InlineInput):
            return one.meta
        ready = self._store.local(one.oid)
        assert ready is not None, "an input that is held can't be gone"
        return ready.meta

    def _reduce_by_tree(self, job: Job, meta: Meta, sources: list[ObjectID]) -> None:
        self._store.reduce(sources, job.task.op, object_id=job.output)
        future = self._store.get_async(job.output)
        future.add_done_callback(lambda _: self._loop.post(lambda: self._reduced(job, meta, future)))

    def _reduced(self, job: Job, meta: Meta, future: Any) -> None:
        if future.cancelled():
            return
        error = future.exception()
        if job.over:  # nobody asks for it any more
            with contextlib.suppress(ClosedError, EvictedError):
                self._store.delete(job.output)
        elif error is not None:
            self._failed(job, Failure("exception", str(error)))
        else:
            self._finished(job, meta, None, 0.0)

    def _reduce_in_order(self, job: Job, meta: Meta) -> None:
        """In a helper thread."""
        total: np.ndarray[Any, Any] | None = None
        failure = None
        try:
            for position in range(len(job.run.inputs)):
                one = job.inputs[position]
                value = meta.view(one.data) if isinstance(one, InlineInput) else job.values[position]
                if total is None:
                    total = np.array(value)
                else:
                    reduce_into(job.task.op, total, total, value)
        except Exception as error:  # whatever it is: the attempt must not wait for ever
            failure = Failure("exception", str(error) or repr(error))
        self._loop.post(lambda: self._reduced_in_order(job, meta, total, failure))

    def _reduced_in_order(self, job: Job, meta: Meta, total: Any, failure: Failure | None) -> None:
        if job.over:
            return
        if failure is None:
            data = total.tobytes()
            try:
                if meta.nbytes > INLINE_LIMIT:
                    self._store.put_bytes(job.output, meta, data)
            except HopliteError as error:
                failure = Failure("crash", f"its output could not be stored: {error}")
        if failure is not None:
            self._failed(job, failure)
        else:
            self._finished(job, meta, data if meta.nbytes <= INLINE_LIMIT else None, 0.0)


def _what(meta: Meta) -> str:
    return "no array" if meta.dtype is None else f"{meta.dtype} of shape {meta.shape}"
