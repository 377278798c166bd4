"""The agent of a rank: runs what the controller dispatches, in worker processes, and has outputs written to checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exoflow_hpc import checkpoint, heartbeat, history
from exoflow_hpc.errors import CorruptCheckpointError, StorageError
from exoflow_hpc.rank import messages as ms
from exoflow_hpc.rank.failure import Failure
from exoflow_hpc.rank.job import Job
from exoflow_hpc.rank.loop import Strand
from exoflow_hpc.rank.made import Made, MadeOutputs
from exoflow_hpc.rank.naming import is_of_run, output_id, reference_id
from exoflow_hpc.rank.reducing import Reducer
from exoflow_hpc.rank.renumbering import Renumbering
from exoflow_hpc.rank.saving import Saver
from exoflow_hpc.rank.shares import Shares
from exoflow_hpc.records import INLINE_LIMIT
from exoflow_hpc.spec import WorkflowSpec
from exoflow_hpc.storage import Storage
from exoflow_hpc.worker.pool import WorkerPool
from exoflow_hpc.worker.protocol import (
    ArenaInput,
    Given,
    InlineInput,
    TaskCancelled,
    TaskCrashed,
    TaskDone,
    TaskFailed,
    TaskIdentity,
    TaskRequest,
    TaskResult,
)
from hoplite_mpi import ClosedError, EvictedError, HopliteError, ObjectID, ObjectLostError
from hoplite_mpi.memory import Arena
from hoplite_mpi.meta import Meta
from hoplite_mpi.testing import fault

if TYPE_CHECKING:  # importing it initialises MPI
    from hoplite_mpi.store import ObjectStore

__all__ = ["Agent"]

log = logging.getLogger("exoflow_hpc.agent")

#: seconds between looks at whether inputs that have not come still exist
_INPUT_CHECK = 2.0
#: seconds after which the controller is told of a task that waits for a worker: other ranks may be idle
_LONG_WAIT = 0.25
#: seconds after which it is told that other runs have more tasks here, or fewer
_SHARES_PERIOD = 0.05
#: how often a lease is renewed while it lasts
_RENEWALS = 4


class Agent:
    """What a rank does for the controller of one run. All methods run inside of the loop.

    send: ``send(rank, message)``.
    """

    def __init__(
        self,
        store: ObjectStore,
        arena: Arena,
        pool: WorkerPool,
        slots: int,
        shares: Shares,
        writer: checkpoint.WriterClient,
        loop: Strand,
        send: Callable[[int, ms.Message], None],
    ) -> None:
        self._store = store
        self._arena = arena
        self._pool = pool
        self._slots = slots
        self._loop = loop
        self._send = send
        #: None before the run and after it
        self._begun: ms.Begin | None = None
        self._controller = -1
        #: of the controller whose messages count: that of `_begun`, or of one that takes over from it
        self._epoch = -1
        self._spec: WorkflowSpec | None = None
        self._jobs: dict[tuple[int, int], Job] = {}
        self._made = MadeOutputs()
        #: (name of the task, attempt, …) → object that was read from its checkpoint
        self._loaded: dict[tuple[str | int, ...], ObjectID] = {}
        #: what is to be said to a controller that takes over once it has begun, since its tasks may have other indices; None: not now
        self._unsaid: list[ms.Message] | None = None
        #: reads checkpoints and reduces in order, which would hold up the loop
        self._helpers = ThreadPoolExecutor(2, thread_name_prefix="exoflow-agent")
        self._reducer = Reducer(store, loop, self._helpers, self._finished, self._failed)
        self._saver = Saver(store, writer, loop, self._reply)
        #: how the run ended
        self.ended: ms.End | None = None
        self._checking = False
        #: attempts that the pool has
        self._submitted: dict[Job, None] = {}
        self._share = shares.join(self._note_shares)
        #: whether the controller will be told of what waits, and of what others have; and what it was told of the latter
        self._looking = self._telling = False
        self._told = (0, 1)

    def close(self) -> None:
        """Wait for the helper threads."""
        self._helpers.shutdown(wait=True, cancel_futures=True)

    # -- messages ------------------------------------------------------------------------------------------------------------

    def handle(self, rank: int, message: ms.Message) -> None:
        """Take a message of a controller; one of an older epoch is refused (R10)."""
        if isinstance(message, ms.Begin):
            self._begin(rank, message)
            return
        if isinstance(message, ms.Survey):
            self._report(rank, message)
            return
        if isinstance(message, ms.End) and message.epoch == 0:  # refused before it began
            self._end(rank, message)
            return
        if self._begun is None or message.epoch != self._epoch or rank != self._controller:
            log.info("a %s of epoch %d from rank %d was refused", type(message).__name__, message.epoch, rank)
            return
        match message:
            case ms.Run():  # the most frequent one first
                self._run(message)
            case ms.Renewed():
                self._pool.set_lease(message.sent + self._begun.lease, self)
            case ms.Cancel():
                self._cancel(message)
            case ms.Recall():
                self._recall(message)
            case ms.Write():
                self._saver.write(
                    message,
                    self._id(message.task, message.attempt, message.index),
                    self._begun.workflow_dir,
                    self._name(message.task),
                )
            case ms.End():
                self._end(rank, message)

    def _end(self, rank: int, message: ms.End) -> None:
        self.leave()
        self._begun, self.ended, self._unsaid = None, message, None
        self._send(rank, ms.Over(message.epoch))

    def retire(self) -> None:
        """The rank takes part in the run no longer."""
        self.leave()
        self._begun = self._unsaid = None
        self._share.leave()

    def leave(self) -> None:
        """Stop what still runs for the workflow that was begun, and free what was read for it."""
        self._stop(list(self._jobs.values()))
        self._made.clear()
        self._pool.set_lease(None, self)
        with contextlib.suppress(ClosedError, EvictedError, FileNotFoundError):  # the arena goes with the store
            for oid in self._loaded.values():
                self._store.delete(oid)
            # what attempts have left that were not kept, here or on a rank of this node that is gone
            run = "" if self._begun is None else self._begun.run
            for known in list(self._arena.objects()) if run else ():
                if is_of_run(known.oid, run):
                    self._arena.delete(known.oid)
        self._loaded.clear()

    def _stop(self, jobs: Iterable[Job]) -> None:
        """End attempts without an answer."""
        for job in jobs:
            self._over(job)
            if job.handle is not None:
                self._pool.cancel(job.handle)

    @property
    def run(self) -> tuple[str, str, str] | None:
        """Id, directory and run of the workflow that was begun and has not ended."""
        begun = self._begun
        return None if begun is None else (begun.workflow_id, begun.workflow_dir, begun.run)

    def _begin(self, rank: int, message: ms.Begin) -> None:
        if (
            self._begun is not None
            and self._begun.workflow_dir == message.workflow_dir
            and (message.epoch <= self._begun.epoch or message.epoch < self._epoch)
        ):
            return
        storage = Storage(Path(message.workflow_dir).parent.parent, create=False)
        base = WorkflowSpec.from_bytes(storage.spec(message.workflow_id), message.workflow_dir)
        before, spec = self._spec, history.expanded(base, Path(message.workflow_dir), message.continued)
        unsaid, self._unsaid = self._unsaid or [], None
        if self._begun is not None and self._begun.run == message.run and message.kept is not None:
            assert before is not None, "a run has begun"
            kept = {(task, attempt) for task, attempt in message.kept}
            self._stop([job for job in self._jobs.values() if (job.task.name, job.run.attempt) not in kept])
            self._made.keep(kept)
            renamed = Renumbering(before, spec)
            for job in self._jobs.values():
                job.run, job.task = renamed.run(job.run), spec.tasks[renamed.task(job.run.task)]
            self._jobs = {(job.run.task, job.run.attempt): job for job in self._jobs.values()}
            if not message.lease:
                self._pool.set_lease(None, self)
            unsaid = [said for one in unsaid if (said := renamed.said(one, message.epoch, kept)) is not None]
            fault.point("agent.kept")
        else:
            self.leave()
            unsaid = []
        self._spec = spec
        self._begun, self._controller, self._epoch, self.ended = message, rank, message.epoch, None
        self._told = (0, 1)
        self._send(rank, ms.Ready(message.epoch, self._slots, time.monotonic(), heartbeat.identity()))
        self._tell_shares([])
        for one in unsaid:
            self._reply(one)
        if message.lease:
            self._loop.after(message.lease / _RENEWALS, lambda: self._renew(message))

    def _report(self, rank: int, message: ms.Survey) -> None:
        """Answer a controller that takes over; what goes on here goes on."""
        begun = self._begun
        mine = begun is not None and (begun.workflow_dir, begun.run) == (message.workflow_dir, message.run)
        if mine and message.epoch <= self._epoch and rank != self._controller:
            return
        made: list[list[Any]] = []
        running: list[list[Any]] = []
        if mine:
            self._epoch, self._controller = message.epoch, rank
            self._unsaid = self._unsaid or []
            # a rollback may be called again, and is; what was canceled is void; what is damaged is to be found out again
            self._stop([job for job in self._jobs.values() if job.run.rollback or job.canceled or job.stuck])
            made = [[m.task, m.attempt, m.meta, m.nbytes, m.data, m.stand] for m in self._made.all()]
            running = [
                [job.task.name, job.run.attempt, None if job.run.references else job.run.stand]
                for job in self._jobs.values()
            ]
        fault.point("agent.report")
        self._send(rank, ms.Report(message.epoch, self._slots, made, running))

    def _renew(self, begun: ms.Begin) -> None:
        """Ask for the lease of a run, as long as it lasts."""
        if self._begun is begun:
            self._reply(ms.Renew(begun.epoch, time.monotonic()))
            self._loop.after(begun.lease / _RENEWALS, lambda: self._renew(begun))

    def _reply(self, message: ms.Message) -> None:
        if self._unsaid is None:
            self._send(self._controller, message)
        else:
            self._unsaid.append(message)

    def _id(self, task: int, attempt: int, index: int = -1) -> ObjectID:
        assert self._begun is not None
        output = output_id(self._begun.run, self._name(task), attempt)
        return output if index < 0 else reference_id(self._begun.run, output, index)

    def _name(self, task: int) -> str:
        assert self._spec is not None
        return self._spec.tasks[task].name

    def _key(self, place: ms.InputPlace) -> tuple[str, int, int]:
        return self._name(place.task), place.attempt, place.index

    # -- running -------------------------------------------------------------------------------------------------------------

    def _run(self, run: ms.Run) -> None:
        assert self._spec is not None and self._begun is not None
        job = Job(run, self._spec.tasks[run.task], self._id(run.task, run.attempt), self._begun.run)
        self._jobs[run.task, run.attempt] = job
        fault.point("agent.dispatched")
        for position, place in enumerate(job.places):
            if place.kind == "inline":
                assert place.meta is not None
                job.inputs[position] = InlineInput(Meta.from_wire(place.meta), place.data, tuple(place.refers))
            elif place.kind == "memory":
                self._fetch(job, position, self._id(place.task, place.attempt, place.index))
            elif place.kind == "checkpoint" and self._key(place) in self._loaded:
                self._fetch(job, position, self._loaded[self._key(place)])
            else:
                job.coming[position] = ObjectID.random()  # any: it isn't looked for while it is read
                self._helpers.submit(self._read, job, position, place, self._begun.workflow_dir)
        self._start_if_complete(job)

    def _fetch(self, job: Job, position: int, oid: ObjectID) -> None:
        job.coming[position] = oid
        future = self._store.get_async(oid)
        future.add_done_callback(lambda _: self._loop.post(lambda: self._fetched(job, position, oid, future)))
        self._watch_inputs()

    def _fetched(self, job: Job, position: int, oid: ObjectID, future: Any) -> None:
        if job.over or future.cancelled():
            return
        error = future.exception()
        if error is not None:
            place = job.place(position)
            lost = [_missing(place)] if place.kind == "memory" else []
            self._failed(job, Failure("lost-input", f"input {position}: {error}"), missing=lost)
            return
        job.coming.pop(position, None)
        job.values[position] = future.result()
        ready, refers = self._store.local(oid), tuple(job.place(position).refers)
        if ready is None:  # deleted meanwhile: only an attempt that was given up can see that
            self._failed(job, Failure("lost-input", f"input {position} was deleted"))
        elif ready.inline is not None:
            job.inputs[position] = InlineInput(ready.meta, ready.inline, refers)
            self._start_if_complete(job)
        else:
            job.inputs[position] = ArenaInput(oid, ready.version, refers)
            self._start_if_complete(job)

    def _read(self, job: Job, position: int, place: ms.InputPlace, workflow_dir: str) -> None:
        """Read an input from its checkpoint; in a helper thread."""
        try:
            meta, data = checkpoint.read(workflow_dir, place.file, place.entry, place.checksum)
        except CorruptCheckpointError as error:
            text = str(error)
            if place.kind == "kept":
                self._loop.post(lambda: self._failed(job, Failure("lost-input", text)))
            else:
                self._loop.post(lambda: self._found_corrupt(job, position, text))
        except Exception as error:  # whatever it is: the attempt must not wait for ever
            kind = "storage" if isinstance(error, StorageError) else "lost-input"
            failure = Failure(kind, str(error) or repr(error))
            self._loop.post(lambda: self._failed(job, failure))
        else:
            self._loop.post(lambda: self._was_read(job, position, meta, data))

    def _found_corrupt(self, job: Job, position: int, text: str) -> None:
        """Tell the controller, which begins again without that output; the attempt waits until then."""
        if not job.over:
            job.stuck = True
            place = job.place(position)
            self._reply(ms.Corrupt(self._epoch, place.task, place.attempt, text, place.index))

    def _was_read(self, job: Job, position: int, meta: Meta, data: memoryview) -> None:
        if job.over:
            return
        place = job.place(position)
        oid = self._loaded.get(self._key(place)) if place.kind == "checkpoint" else None
        if oid is None:
            oid = ObjectID.random()
            try:
                self._store.put_bytes(oid, meta, data)
            except HopliteError as error:
                self._failed(job, Failure("lost-input", f"no room for input {position}: {error}"))
                return
            # what is kept for a rollback may be any attempt's: under a key that is used once only
            kept = place.kind == "kept"
            self._loaded[(job.task.name, job.run.attempt, -1, position) if kept else self._key(place)] = oid
        self._fetch(job, position, oid)

    def _start_if_complete(self, job: Job) -> None:
        if job.over or not job.is_complete:
            return
        if job.canceled:
            self._failed(job, Failure("canceled", "canceled"))
        elif job.task.kind == "reduce":
            self._reducer.reduce(job)
        else:
            self._submit(job)

    def _submit(self, job: Job) -> None:
        assert self._spec is not None and self._begun is not None
        run, task, spec = job.run, job.task, self._spec
        blobs = (*task.needed_blobs, task.rollback) if run.rollback else task.needed_blobs
        request = TaskRequest(
            identity=TaskIdentity(self._begun.workflow_id, task.name, run.incarnation, run.attempt, self._epoch),
            function=task.function,
            retry=task.retry,
            args=task.args,
            blobs={key: spec.blobs[key] for key in blobs},
            inputs={position: one for position, one in job.inputs.items() if position < len(run.inputs)},
            output=job.output,
            inline_limit=self._store.inline_limit,
            sys_path=spec.sys_path,
            rollback=task.rollback if run.rollback else "",
            result=len(task.data) if run.rollback and len(run.inputs) > len(task.data) else -1,
            timeout=task.timeout,
            memory=task.memory,
            catch=task.catch_exceptions and not run.rollback,
            run=self._begun.run,
            references=tuple(
                Given(self._name(one.task), one.attempt, one.index, job.inputs[len(run.inputs) + position])
                for position, one in enumerate(run.references)
            ),
        )
        job.submitted = time.monotonic()
        self._submitted[job] = None
        self._share.add(1)
        job.handle = self._pool.submit(
            request,
            lambda result: self._loop.post(lambda: self._ran(job, result)),
            lambda progress: self._loop.post(
                lambda: self._reply(
                    ms.Progress(self._epoch, job.run.task, run.attempt, progress.fraction, progress.text)
                )
            ),
            self if self._begun.lease else None,
        )

        if not self._looking and not job.handle.has_begun:
            self._looking = True
            self._loop.after(_LONG_WAIT, self._look)

    def _look(self) -> None:
        """Tell the controller what has waited for a worker for long."""
        limit = time.monotonic() - _LONG_WAIT
        waiting = [
            job for job in self._submitted if job.handle is not None and not job.handle.has_begun and not job.over
        ]
        late = [[job.run.task, job.run.attempt] for job in waiting if job.submitted <= limit]
        if late:
            self._tell_shares(late)
        self._looking = bool(waiting)
        if waiting:
            self._loop.after(_LONG_WAIT, self._look)

    def _note_shares(self) -> None:
        if not self._telling:
            self._telling = True
            self._loop.after(_SHARES_PERIOD, self._noted_shares)

    def _noted_shares(self) -> None:
        self._telling = False
        self._tell_shares([])

    def _tell_shares(self, waiting: list[list[int]]) -> None:
        """Tell the controller what other runs have here, if that is new, and what waits."""
        if self._begun is None or self._unsaid is not None or (self._share.besides == self._told and not waiting):
            return
        self._told = self._share.besides
        self._reply(ms.Shared(self._epoch, *self._told, waiting))

    def _recall(self, message: ms.Recall) -> None:
        job = self._jobs.get((message.task, message.attempt))
        if job is not None and job.handle is not None and self._pool.withdraw(job.handle):
            del self._submitted[job]
            self._share.add(-1)
            self._failed(job, Failure("returned", "it has waited for a worker"))

    def _ran(self, job: Job, result: TaskResult) -> None:
        oid = job.output
        del self._submitted[job]
        self._share.add(-1)
        if job.over or not isinstance(result, TaskDone):
            # a worker that died, or was killed, may have sealed an output that nobody will ask for
            self._arena.delete(oid)
            self._delete_puts(job, result)
        if job.over:
            return
        if isinstance(result, TaskDone):
            fault.point("agent.task_done")
            try:
                for put in result.puts:
                    self._take_put(reference_id(job.run_name, oid, put.index))
                if result.inline is None:
                    self._arena.adopt(oid)  # the memory is this rank's from now on, and not the worker's
                    self._store.adopt(oid)
                elif result.nbytes > INLINE_LIMIT:
                    self._store.put_bytes(oid, result.meta, result.inline)
            except HopliteError as error:
                self._arena.delete(oid)
                with contextlib.suppress(HopliteError):
                    for put in result.puts:
                        self._store.delete(reference_id(job.run_name, oid, put.index))
                self._delete_puts(job, result)
                self._failed(job, Failure("crash", f"its output could not be stored: {error}"))
                return
            data = result.inline if result.nbytes <= INLINE_LIMIT else None
            self._finished(job, result.meta, data, result.seconds, result)
        elif isinstance(result, TaskFailed):
            self._task_failed(job, result)
        elif isinstance(result, TaskCrashed):
            self._failed(job, Failure(result.kind, result.reason))
        elif isinstance(result, TaskCancelled):
            self._failed(job, Failure("canceled", "canceled"))

    def _take_put(self, oid: ObjectID) -> None:
        """Make an object that a worker has sealed this rank's, and known to all. HopliteError."""
        pinned = self._arena.map(oid)
        if pinned is None:
            raise ObjectLostError(f"{oid} is not in this node's arena")
        if pinned.meta.nbytes > self._store.inline_limit:
            self._arena.adopt(oid)
            self._store.adopt(oid)
            return
        meta, data = pinned.meta, bytes(pinned.buffer)
        self._arena.delete(oid)
        self._store.put_bytes(oid, meta, data)

    def _delete_puts(self, job: Job, result: TaskResult) -> None:
        """Remove what an attempt has put that is not kept. A worker that died has left the first ones of its objects, without a gap."""
        done = isinstance(result, TaskDone)
        for index in [put.index for put in result.puts] if isinstance(result, TaskDone) else itertools.count():
            if not self._arena.delete(reference_id(job.run_name, job.output, index)) and not done:
                return

    def _task_failed(self, job: Job, result: TaskFailed) -> None:
        if result.stage == "inputs" and result.lost_inputs:
            missing = [[job.run.inputs[k].task, job.run.inputs[k].attempt] for k in result.lost_inputs]
            self._failed(job, Failure("lost-input", result.message), missing=missing)
            return
        name = result.type_names[0].removeprefix("builtins.") if result.type_names else "an error"
        text = f"{name}: {result.message}" if result.message else name
        if result.stage != "call":
            text = {"load": "when it was loaded: ", "output": "when its output was stored: "}.get(
                result.stage, ""
            ) + text
        failure = Failure("exception", text, result.traceback, result.pickled or b"")
        self._failed(job, failure, retryable=result.retryable)

    def _finished(
        self, job: Job, meta: Meta, data: bytes | None, seconds: float, result: TaskDone | None = None
    ) -> None:
        self._over(job)
        run, wire = job.run, meta.to_wire()
        refers = result is not None and bool(result.refers)
        if not run.rollback:
            # of what refers to objects, or is to be continued with, another controller knows nothing: it is made again
            stand = None if refers or (result is not None and result.continued) else run.stand
            self._made.add(Made(job.task.name, run.attempt, wire, meta.nbytes, data, stand))
        message = ms.Finished(self._epoch, run.task, run.attempt, wire, meta.nbytes, data, seconds)
        if result is not None and refers:
            puts = [[put.index, put.meta.to_wire(), self._by_index(put.refers)] for put in result.puts]
            message = dataclasses.replace(message, refers=self._by_index(result.refers), puts=puts)
        if result is not None and result.continued:
            message = dataclasses.replace(message, continued=result.continued)
        self._reply(message)

    def _by_index(self, keys: Iterable[tuple[str, int, int]]) -> list[list[int]]:
        assert self._spec is not None
        return [[self._spec.index(task), attempt, index] for task, attempt, index in keys]

    def _failed(
        self, job: Job, failure: Failure, *, retryable: bool = False, missing: list[list[int]] | None = None
    ) -> None:
        if job.over:
            return
        self._over(job)
        run = job.run
        self._reply(
            ms.Failed(self._epoch, run.task, run.attempt, failure.kind, failure.to_wire(), retryable, missing or [])
        )

    def _over(self, job: Job) -> None:
        job.over = True
        job.values.clear()
        self._jobs.pop((job.run.task, job.run.attempt), None)

    def _cancel(self, message: ms.Cancel) -> None:
        job = self._jobs.get((message.task, message.attempt))
        if job is None:
            return
        job.canceled = True
        if job.handle is not None:
            self._pool.cancel(job.handle)
        else:
            self._failed(job, Failure("canceled", "canceled"))

    # -- inputs that don't come ------------------------------------------------------------------------------------------------

    def _watch_inputs(self) -> None:
        if not self._checking:
            self._checking = True
            self._loop.after(_INPUT_CHECK, self._check_inputs)

    def _check_inputs(self) -> None:
        """Give up inputs that have been waited for and have no copy anywhere: what made them has to run again."""
        self._checking = False
        waiting = [job for job in self._jobs.values() if job.coming]
        if not waiting:
            return
        asked = {oid for job in waiting for position, oid in job.coming.items() if job.place(position).kind == "memory"}
        found = self._store.located(sorted(asked)) if asked else frozenset()
        for job in waiting:
            lost = [
                _missing(job.place(position))
                for position, oid in job.coming.items()
                if oid in asked and oid not in found
            ]
            if lost:
                self._failed(job, Failure("lost-input", f"no copy is left of {len(lost)} of its inputs"), missing=lost)
        self._watch_inputs()


def _missing(place: ms.InputPlace) -> list[int]:
    """Return what `Failed.missing` says of it."""
    return [place.task, place.attempt, *([] if place.index < 0 else [place.index])]
