"""What each rank of a trial does: puts, gets, reduces, collectives and deletes without a pause, and checks every byte.

Ranks go in steps, one for each call of a collective; what each is follows from the seed and the number of the call, so a process that
joins does the same as the others. After each allreduce all know which processes are in it, and load each other with work.

Each process writes what it does into a file of its own, line by line, so that what it did before it was killed is known.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

import hoplite_mpi as hm
from hoplite_mpi import ending
from hoplite_mpi.launch import REPLACE_ME
from hoplite_mpi.testing import fault

Process = tuple[int, int]

KEY = "chaos"
#: call after which faults may come: everybody has what everybody keeps
QUIET_CALLS = 2
#: elements of int64: inline, some dozens of chunks, more than a MiB (an allreduce goes in stripes)
SIZES = (500, 500, 8_000, 40_000, 40_000, 150_000)
#: of trials in which ranks hold more than their memory does
LARGE_SIZES = (150_000,)
#: more than is put in one piece; now and then there is one
HUGE = 600_000
#: seconds for a deletion to have come to all
PATIENCE = 10.0
#: seconds before a step: sometimes all come at once, and mostly not
_NAPS = (0.0, 0.0, 0.002, 0.01, 0.03)
#: seconds between two questions to the owners of the shards, in trials that cut the hosts in two parts
_KNOCK = 0.005
#: first elements of an allreduce: incarnation + 1 by rank, and who could end now, by rank
_SLOTS = 8


class Rank:
    """One process of a trial."""

    def __init__(self, directory: Path, seed: int, rules: str, early: str, cut: bool, pressed: bool) -> None:
        self.seed = seed
        self.sizes = LARGE_SIZES if pressed else SIZES
        self.cut = cut
        self.finish = directory / "finish"
        self.me: Process = (int(os.environ["HOPLITE_RANK"]), int(os.environ["HOPLITE_INCARNATION"]))
        self.size = int(os.environ["HOPLITE_SIZE"])
        self.log_file = os.open(directory / "log.{}.{}".format(*self.me), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.rules = rules
        founder = self.me[1] == 0
        fault.enable(early if founder else rules, counting=True)
        self.store: Any = None
        #: members that were seen, by what they keep
        self.kept: set[Process] = set()
        #: call → processes that did it, and who deletes what was put in it
        self.done: dict[int, list[Process]] = {}

    def log(self, what: str, **more: Any) -> None:
        """Write a line, whole at once."""
        os.write(self.log_file, (json.dumps({"time": time.monotonic(), "what": what, **more}) + "\n").encode())

    # -- what is put where -------------------------------------------------------------------------------------------------

    def name(self, call: int, what: str, process: Process | None = None) -> hm.ObjectID:
        return hm.ObjectID.from_name(f"{call}/{what}", process)

    def data(self, call: int, what: str, process: Process, size: int) -> Any:
        """Return what stands under that name."""
        start = zlib.crc32(f"{self.seed}/{call}/{what}/{process}".encode())
        return (np.arange(start, start + size, dtype=np.int64) * 2654435761) & 0xFFFFF

    def rng(self, *what: object) -> random.Random:
        return random.Random("/".join(map(str, (self.seed, *what))))

    # -- the run -----------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        self.store = hm.init()
        view = self.store.on_view(lambda view, lost: self.view(view, lost))
        self.view(view, ())
        self.put(0, "kept", 20_000)
        self.put(0, "kept small", 100)
        if self.cut:
            for home in view.ranks:
                threading.Thread(target=self.knock, args=(view, home), daemon=True).start()
        first = self.store.next_call(KEY)
        self.log("first", call=first)
        call = first
        while not self.step(call, ready=self.finish.exists() and call > first + 1):
            if call == QUIET_CALLS and self.me[1] == 0:
                fault.enable(self.rules, counting=True)
                self.log("load")
            call += 1
        self.log("over", counts=fault.counts())
        self.store.barrier(key="end")
        self.store.close()

    def knock(self, first: Any, home: int) -> None:
        """Ask whoever owns that rank's shard of the first view to take a small object, again and again; write down who did when."""
        runtime = self.store.runtime
        with contextlib.suppress(hm.EvictedError, hm.ClosedError):
            for number in itertools.count():
                oid = hm.ObjectID.from_name(f"knock {self.me} {number}")
                if first.owner(bytes(oid)) != home:
                    continue
                view = runtime.view
                owner = view.owner(bytes(oid))
                self.store.put(b"who is there", oid)
                if runtime.view is view:  # else it is not known who answered
                    process = (owner, view.members[owner].incarnation)
                    self.log("answer", home=home, owner=process, view=view.number)
                time.sleep(_KNOCK)

    def view(self, view: Any, lost: Iterable[Any]) -> None:
        members = sorted((m.rank, m.incarnation) for m in view.members.values())
        self.log("view", number=view.number, members=members, lost=[(m.rank, m.incarnation) for m in lost])

    def step(self, call: int, ready: bool) -> bool:
        """Do the call of that number, and what follows from it; return whether it was the last one."""
        rng = self.rng("step", call)
        time.sleep(self.rng("nap", call, self.me).choice(_NAPS))
        if call % 2:
            size = _SLOTS * 2 + rng.choice(SIZES)
            part = self.data(call, "part", (self.me[0], 0), size)
            part[: 2 * _SLOTS] = 0
            part[self.me[0]], part[_SLOTS + self.me[0]] = self.me[1] + 1, ready
            got = self.store.allreduce(part, key=KEY, deterministic=rng.random() < 0.2)
            took = sorted(self.store.took_part(KEY))
            self.log("call", call=call, op="allreduce", took=took)
            expected = sum(self.data(call, "part", (rank, 0), size) for rank in took)
            self.same(got[2 * _SLOTS :], expected[2 * _SLOTS :], f"allreduce {call} of {took}")
            processes = [(rank, int(got[rank]) - 1) for rank in took]
            if sum(got[_SLOTS : 2 * _SLOTS]) == len(took) == self.size:
                return True
            self.load(call, processes)
            return False
        self.other(call, rng)
        return False

    def other(self, call: int, rng: random.Random) -> None:
        """One of the other collectives."""
        op = rng.choice(["barrier", "gather", "allgather", "broadcast", "reduce_to", "alltoall", "reduce_scatter"])
        size, root = rng.choice(SIZES[:-1]), rng.randrange(self.size)
        mine = self.data(call, "part", (self.me[0], 0), size)
        took: list[int] | None = None
        try:
            if op == "barrier":
                self.store.barrier(key=KEY)
            elif op == "broadcast":
                got = self.store.broadcast(mine if self.me[0] == root else None, root, key=KEY)
                self.same(got, self.data(call, "part", (root, 0), size), f"broadcast {call} of {root}")
            elif op == "alltoall":
                items = [mine + to for to in range(self.size)]
                got = self.store.alltoall(items, key=KEY)
                took = sorted(self.store.took_part(KEY))
                for row, rank in zip(got, took, strict=True):
                    expected = self.data(call, "part", (rank, 0), size) + self.me[0]
                    self.same(row, expected, f"alltoall {call}, of {rank}")
            elif op in ("gather", "reduce_to"):
                got = getattr(self.store, op)(mine, root=root, key=KEY)
                if self.me[0] == root:
                    took = sorted(self.store.took_part(KEY))
                    self.collected(op, call, got, took, size)
            else:
                got = getattr(self.store, op)(mine, key=KEY)
                took = sorted(self.store.took_part(KEY))
                self.collected(op, call, got, took, size)
            if took is None:
                took = sorted(self.store.took_part(KEY))
        except hm.PeerLostError as error:
            assert op in ("gather", "reduce_to", "broadcast"), f"{op}: {error}"
            self.log("root lost", call=call, op=op, root=root)
            return
        self.log("call", call=call, op=op, took=took)

    def collected(self, op: str, call: int, got: Any, took: list[int], size: int) -> None:
        parts = [self.data(call, "part", (rank, 0), size) for rank in took]
        if op in ("gather", "allgather"):
            expected = np.stack(parts)
        else:
            expected = sum(parts)
            if op == "reduce_scatter":
                expected = np.array_split(expected, len(took))[took.index(self.me[0])]
        self.same(got, expected, f"{op} {call} of {took}")

    # -- objects -----------------------------------------------------------------------------------------------------------

    def load(self, call: int, processes: list[Process]) -> None:
        """Everybody puts, everybody gets all at once, and reduces go on at the same time."""
        self.done[call] = processes
        store, rng = self.store, self.rng("load", call)
        sizes = [rng.choice(self.sizes) for _ in range(2)]
        if self.sizes is SIZES and rng.random() < 0.25:
            sizes[0] = HUGE
        wanted = [(process, number) for process in processes for number in range(len(sizes))]
        # who waits before the object is there, and who comes when others have it
        patient = self.rng("patient", call, self.me).random() < 0.5
        futures = self.get_all(call, wanted) if patient else {}
        part = rng.choice(SIZES)
        rids = [self.reduce(call, number, rng, processes, part) for number in range(2)]
        for number, size in enumerate(sizes):
            self.put(call, f"object {number}", size)
        self.put(call, "source", part)
        futures = futures or self.get_all(call, wanted)
        if min(processes) == self.me:
            for process, number in self.put_in(call - 2):
                store.delete(self.name(call - 2, f"object {number}", process))
            for what, process in [("source", process) for process in self.done.get(call - 2, ())]:
                store.delete(self.name(call - 2, what, process))
        for (process, number), future in futures.items():
            self.got(future, call, f"object {number}", process, sizes[number])
        for rid in rids:
            self.reduced(call, rid, part)
        self.keep(processes)
        self.deleted(call - 4, processes)

    def put(self, call: int, what: str, size: int) -> None:
        self.store.put(self.data(call, what, self.me, size), self.name(call, what, self.me))

    def put_in(self, call: int) -> list[tuple[Process, int]]:
        return [(process, number) for process in self.done.get(call, ()) for number in range(2)]

    def get_all(self, call: int, wanted: list[tuple[Process, int]]) -> dict[tuple[Process, int], Any]:
        mixed = wanted[:]
        self.rng("order", call, self.me).shuffle(mixed)
        return {
            (process, number): self.store.get_async(self.name(call, f"object {number}", process))
            for process, number in mixed
        }

    def got(self, future: Any, call: int, what: str, process: Process, size: int) -> bool:
        try:
            value = future.result()
        except hm.ObjectLostError:
            self.log("lost", call=call, object=what, process=process)
            return False
        self.same(value, self.data(call, what, process, size), f"{what} of {process} in {call}")
        return True

    def reduce(self, call: int, number: int, rng: random.Random, processes: list[Process], size: int) -> hm.ObjectID:
        rid = self.name(call, f"sum {number}")
        few = number == 1 and len(processes) > 2 and rng.random() < 0.5
        options: dict[str, Any] = {"shape": rng.choice([None, "chain", "d_ary", "star", "tree_of_chains"])}
        if options["shape"] == "d_ary":
            options["degree"] = 2
        if few:
            options["num_objects"] = len(processes) - 1
        elif rng.random() < 0.3:
            options["deterministic"] = True
        sources = [self.name(call, "source", process) for process in processes]
        self.store.reduce(sources, object_id=rid, skip_lost=True, **options)
        return rid

    def reduced(self, call: int, rid: hm.ObjectID, size: int) -> None:
        value = self.store.get(rid)
        sources = sorted(oid.origin for oid in self.store.reduced_from(rid))
        self.log("reduced", call=call, rid=rid.hex(), sources=sources)
        expected = sum(self.data(call, "source", process, size) for process in sources)
        self.same(value, expected, f"reduce in {call} of {sources}")

    def keep(self, processes: list[Process]) -> None:
        """Get what each process keeps: the newcomers what was there before them, and the others what the newcomers put."""
        for process in processes:
            if process not in self.kept:
                whole = [
                    self.got(self.store.get_async(self.name(0, what, process)), 0, what, process, size)
                    for what, size in (("kept", 20_000), ("kept small", 100))
                ]
                if all(whole):
                    self.kept.add(process)
                    self.log("kept", process=process)

    def deleted(self, call: int, processes: list[Process]) -> None:
        """What somebody who still lives has deleted is gone for all."""
        before, following = self.done.get(call, ()), self.done.get(call + 2)
        if not following or min(following) not in processes or min(following) not in before:
            return
        for process, number in self.put_in(call):
            oid, end = self.name(call, f"object {number}", process), time.monotonic() + PATIENCE
            while True:
                try:
                    self.store.get(oid)
                except hm.ObjectDeletedError:
                    break
                except hm.ObjectLostError:  # who has deleted it took part in the last call, and has died since
                    assert not self.store.runtime.view.has(*min(following)), (
                        f"{oid} was deleted, and is said to be lost"
                    )
                    break
                assert time.monotonic() < end, f"{oid} of {process} in {call} was deleted and is still there"
                time.sleep(0.01)

    def same(self, value: Any, expected: Any, what: str) -> None:
        if not np.array_equal(value, expected):
            wrong = np.flatnonzero(np.asarray(value).reshape(-1) != np.asarray(expected).reshape(-1))
            self.log("wrong", object=what, first=int(wrong[0]), last=int(wrong[-1]), count=len(wrong))
            raise AssertionError(f"{what}: {len(wrong)} elements of {np.size(expected)} are wrong")


def main() -> NoReturn:
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    directory = Path(sys.argv[1])
    order = json.loads((directory / "trial.json").read_text())
    rank = Rank(directory, **order)
    code = 0
    try:
        rank.run()
        ending.close_stores()
        rank.log("end")
    except hm.EvictedError as error:
        rank.log("evicted", text=str(error))
        code = REPLACE_ME
        with contextlib.suppress(hm.HopliteError):
            ending.close_stores()
    except BaseException as error:
        rank.log("failed", text=f"{type(error).__name__}: {error}")
        traceback.print_exc()
        for thread in threading.enumerate():
            print(thread, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
