"""The collectives of a store: composites of put, get and reduce, so that they go on with those who live.

Their calls are matched by key and number (`hoplite_mpi.collectives.rounds`). Whatever more than one rank has to agree on comes from an
object of which there is one version only: a reduce, whose sources say who takes part, or a put, of which the first counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np

from hoplite_mpi.collectives import stripes
from hoplite_mpi.collectives.buffers import as_array, check_out, fill, items_for, stack
from hoplite_mpi.collectives.call import Call, Op, processes_of, round_key
from hoplite_mpi.collectives.rounds import Process, Rounds
from hoplite_mpi.config import DEFAULT
from hoplite_mpi.errors import ObjectLostError, PeerLostError
from hoplite_mpi.memory import SUM

if TYPE_CHECKING:
    from hoplite_mpi.store import ObjectStore

__all__ = ["Collectives"]


class Collectives:
    """Collective calls of an `ObjectStore`. All members call each of them.

    The nth call with a *key* on one rank matches the nth on the others; calls without a key are counted together. Calls that go on at
    the same time, in several threads, need different keys. A process that joins takes part from the first call that starts after it has
    joined. Ranks that die are left out: the result is that of the others, the same on all of them. `took_part` says whose parts are in it.

    *timeout*: seconds (default: `Config.default_timeout`; None: no limit) for the whole call; GetTimeoutError says who is missing.
    *out*: a writable NumPy array of the result's shape and dtype, which is filled and returned; without it the result may be a
    read-only view of the store's memory. ReduceError if the ranks' arrays differ in dtype or shape.
    """

    #: set by the store
    rounds: Rounds
    _calls: dict[str | None, Call]

    def _call(self, what: str, key: str | None, timeout: Any) -> Call:
        call = Call(cast("ObjectStore", self), what, key, timeout)
        self._calls[key] = call
        return call

    def _rank_of_root(self, what: str, root: int) -> None:
        if not isinstance(root, (int, np.integer)) or root < 0:
            raise ValueError(f"{what}: root is a rank, not {root!r}")

    def took_part(self, key: str | None = None, timeout: Any = DEFAULT) -> frozenset[int]:
        """Return the ranks whose parts went into the last call with that key; of `broadcast` and `scatter`, the root.

        Waits until that is known, where the call did not. KeyError if there was none, PeerLostError if the root of `gather` alone knew it.
        """
        call = self._calls.get(key)
        if call is None:
            raise KeyError(f"there was no collective call with key {key!r} on this rank")
        return call.who(timeout)

    def next_call(self, key: str | None = None, timeout: Any = DEFAULT) -> int:
        """Return the number, from 1, that this rank's next call with that key will have.

        It tells a process that has joined where the others are.
        """
        seconds = cast("ObjectStore", self).runtime.config.deadline(timeout)
        return self.rounds.next(round_key(key), seconds)

    def barrier(self, timeout: Any = DEFAULT, *, key: str | None = None) -> None:
        """Wait until every member has come here, or has died."""
        with self._call("barrier", key, timeout) as call:
            call.took_part(call.present(call.roll_call()))

    def broadcast(
        self, array: Any, root: int = 0, *, timeout: Any = DEFAULT, out: Any = None, key: str | None = None
    ) -> Any:
        """Return the root's array (or bytes) on all ranks; what others pass is not looked at.

        PeerLostError if the root is gone and nobody has all of its array.
        """
        self._rank_of_root("broadcast", root)
        mine = cast("ObjectStore", self).rank == root
        if mine and array is None:
            raise ValueError("broadcast: the root has to give an array")
        if mine:
            check_out("broadcast", out, as_array(array))
        with self._call("broadcast", key, timeout) as call:
            process = self._root(call, root)
            call.took_part([process])
            if process == call.me:
                call.put("data", array)
            return fill("broadcast", out, self._from_root(call, "data", process))

    def reduce_to(
        self,
        array: Any,
        root: int = 0,
        op: Op = SUM,
        *,
        timeout: Any = DEFAULT,
        out: Any = None,
        key: str | None = None,
        deterministic: bool = False,
    ) -> Any:
        """Return the reduction of all arrays at the root, None elsewhere, where it does not wait. op, deterministic: as in `reduce`."""
        self._rank_of_root("reduce_to", root)
        part = as_array(array)
        check_out("reduce_to", out, part)
        with self._call("reduce_to", key, timeout) as call:
            call.put("part", part)
            # the last of an ordered chain ends up with the result
            order = sorted(call.processes, key=lambda process: ((process[0] - root - 1) % (1 << 24), process))
            rid = call.reduce("sum", "part", op, deterministic, order=order)
            if call.me[0] != root:
                call.take_part_later(
                    cast("ObjectStore", self).watch(rid), lambda parts: [p[0] for p in processes_of(parts)]
                )
                return None
            value, sources = call.result(rid)
            call.took_part(sources)
            return fill("reduce_to", out, value)

    def allreduce(
        self,
        array: Any,
        op: Op = SUM,
        *,
        timeout: Any = DEFAULT,
        out: Any = None,
        key: str | None = None,
        deterministic: bool = False,
    ) -> Any:
        """Return the reduction of all arrays, on all ranks. op, deterministic: as in `reduce`.

        Arrays of `Config.stripe_threshold` bytes or more are reduced in stripes, one rooted at each rank, if all come within
        `Config.stripe_patience`; otherwise in one tree that forms in the order of the arrivals.
        """
        part = as_array(array)
        check_out("allreduce", out, part)
        with self._call("allreduce", key, timeout) as call:
            present: list[Process] | None = None
            if part.nbytes >= call.config.stripe_threshold:
                present = stripes.agree(call, patient=deterministic)
            if present is not None:
                found = stripes.all_of(call, present, part.reshape(-1), op, out)
                if found is not None:
                    call.took_part(present)
                    return found.reshape(part.shape) if out is None else out
            call.put("part", part)
            value, sources = call.result(call.reduce("sum", "part", op, deterministic))
            call.took_part(sources)
            return fill("allreduce", out, value)

    def reduce_scatter(
        self,
        array: Any,
        op: Op = SUM,
        *,
        timeout: Any = DEFAULT,
        out: Any = None,
        key: str | None = None,
        deterministic: bool = False,
    ) -> Any:
        """Return this rank's block of the reduction of all arrays, shape (n, ...).

        The blocks are those of ``numpy.array_split`` along the first axis over the ranks that took part, in their order.
        """
        part = as_array(array)
        if part.ndim == 0:
            raise ValueError("reduce_scatter: an array without axes can't be split")
        with self._call("reduce_scatter", key, timeout) as call:
            if part.nbytes >= call.config.stripe_threshold:
                present = stripes.agree(call, patient=True)
                block = None if present is None else stripes.own_of(call, present, part, op)
                if present is not None and block is not None:
                    call.took_part(present)
                    return fill("reduce_scatter", out, block)
            call.put("part", part)
            value, sources = call.result(call.reduce("sum", "part", op, deterministic))
            call.took_part(sources)
            return fill("reduce_scatter", out, np.array_split(value, len(sources))[sources.index(call.me)])

    def gather(
        self, array: Any, root: int = 0, *, timeout: Any = DEFAULT, out: Any = None, key: str | None = None
    ) -> Any:
        """Return the arrays of all ranks at the root, along a new first axis in the order of ranks; None elsewhere, without waiting.

        A list where they differ in dtype or shape, or are bytes. *out* may have more rows than ranks took part; those filled are returned.
        """
        self._rank_of_root("gather", root)
        with self._call("gather", key, timeout) as call:
            call.put("part", array)
            roll = call.roll_call()
            process = call.root(root)
            if process is not None and process != call.me:
                call.take_part_later(call.begin_get("took part", process), lambda ranks: ranks.tolist())
            if process != call.me:
                return None
            try:
                return self._collect(call, "gather", "part", roll, out)
            finally:  # if it failed, the others learn that nobody did: they would wait for it
                call.put("took part", np.array(sorted(call.took or ()), np.int64))

    def allgather(self, array: Any, *, timeout: Any = DEFAULT, out: Any = None, key: str | None = None) -> Any:
        """Return the arrays of all ranks, on all ranks; as `gather`."""
        with self._call("allgather", key, timeout) as call:
            call.put("part", array)
            return self._collect(call, "allgather", "part", call.roll_call(), out)

    def scatter(
        self, items: Any, root: int = 0, *, timeout: Any = DEFAULT, out: Any = None, key: str | None = None
    ) -> Any:
        """Return this rank's item of what the root gives: a sequence, or an array along whose first axis they are.

        One item for each rank from 0 to the highest, or beyond, or one for each that takes part. PeerLostError if the root is gone with it.
        """
        self._rank_of_root("scatter", root)
        mine = cast("ObjectStore", self).rank == root
        if mine and items is None:
            raise ValueError("scatter: the root has to give an item for each rank")
        with self._call("scatter", key, timeout) as call:
            process = self._root(call, root)
            call.took_part([process])
            if process == call.me:
                for receiver, item in items_for("scatter", items, call.processes).items():
                    call.put(_to(receiver), item)
            return fill("scatter", out, self._from_root(call, _to(call.me), process))

    def alltoall(self, items: Any, *, timeout: Any = DEFAULT, out: Any = None, key: str | None = None) -> Any:
        """Give each rank an item and return what all gave this one, in the order of ranks; items as in `scatter`, result as in `gather`."""
        with self._call("alltoall", key, timeout) as call:
            for receiver, item in items_for("alltoall", items, call.processes).items():
                call.put(_to(receiver), item)
            return self._collect(call, "alltoall", _to(call.me), call.roll_call(), out, agree=True)

    # -- helpers -------------------------------------------------------------------------------------------------------------------

    @staticmethod
    def _root(call: Call, root: int) -> Process:
        process = call.root(root)
        if process is None:
            raise PeerLostError(f"{call.title}: rank {root}, the root, is no member: {call.processes} take part")
        return process

    @staticmethod
    def _from_root(call: Call, label: str, root: Process) -> Any:
        try:
            return call.wait(call.begin_get(label, root))
        except ObjectLostError as error:
            raise PeerLostError(f"{call.title}: rank {root[0]}, the root, is gone, and its data with it") from error

    @staticmethod
    def _collect(call: Call, what: str, label: str, roll: Any, out: Any, agree: bool = False) -> Any:
        """Return the parts of all who came and whose part is not lost. They travel while the roll is called.

        agree: each rank gets other parts, so what one has lost, the others may have.
        """
        futures = {process: call.begin_get(label, process) for process in call.processes}
        present = call.present(roll)
        for process in futures.keys() - set(present):
            futures.pop(process).cancel()
        found = call.gather(label, present, futures)
        if agree:
            found = {process: found[process] for process in call.all_have(present, found)}
        call.took_part(found)
        return stack(what, out, list(found.values()))


def _to(receiver: Process) -> str:
    return f"to {receiver[0]}.{receiver[1]}"
