"""The workflow of a trial, as `python -m exoflow_hpc run` takes it: its tasks say what they see and do.

A task's value is a digest of its name, what it was given and, if it varies, a number drawn anew each time: so whatever a
consumer has seen says from which run of each task it came. The outside is a database with a row for each idempotency key.

Tasks are pickled by value; nothing of the tests is imported where they run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import sqlite3
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

import exoflow_hpc as ef

__all__ = ["LOG", "OUTSIDE", "digest", "workflow"]

#: files in the trial's directory: what tasks say, a line each; the outside; the steps
LOG, OUTSIDE, STEPS = "log", "outside.db", "steps.json"


def workflow(directory: str) -> Any:
    """Return the workflow whose steps are in the directory."""
    with open(os.path.join(directory, STEPS)) as file:
        steps = json.load(file)
    nodes: dict[str, Any] = {}
    for step in steps:
        data = [nodes[name] for name in step["data"]]
        if step["kind"] == "reduce":
            node: Any = ef.reduce(data, "sum", name=step["name"], checkpoint=step["checkpoint"])
        else:
            node = _options(step).bind(directory, step["name"], step["effect"], step["size"], step["seconds"], *data)
        node.after(*(nodes[name] for name in step["after"]))
        node.after(*(nodes[name].committed() for name in step["after_commit"]))
        nodes[step["name"]] = node
    return nodes[steps[-1]["name"]]


def _options(step: dict[str, Any]) -> Any:
    effect = step["effect"]
    external: dict[str, Any] = {"external": True} if effect else {}
    if effect in ("idempotent", "both"):
        external["idempotent"] = True
    if effect in ("rollback", "both"):
        external["rollback"] = take_back
    compute = steady if step["deterministic"] else varying
    return ef.task(name=step["name"], deterministic=step["deterministic"], checkpoint=step["checkpoint"], **external)(
        compute
    )


def steady(directory: str, name: str, effect: str, size: int, seconds: float, *inputs: Any) -> Any:
    return compute(directory, name, effect, size, seconds, inputs, 0)


def varying(directory: str, name: str, effect: str, size: int, seconds: float, *inputs: Any) -> Any:
    return compute(directory, name, effect, size, seconds, inputs, secrets.randbits(40))


def compute(directory: str, name: str, effect: str, size: int, seconds: float, inputs: Any, nonce: int) -> Any:
    given = [one(directory, value) for value in inputs]
    value = digest(name, nonce, given)
    say(directory, "start", given=given, pid=os.getpid())
    time.sleep(seconds / 2)
    say(directory, "value", given=given, nonce=nonce, value=value)
    if effect:
        act(directory, name, effect, given, value)
    time.sleep(seconds / 2)
    say(directory, "end", pid=os.getpid())
    return np.full(size, value) if size else value


def digest(name: str, nonce: int, given: list[int]) -> int:
    """Return a task's value; sums of a few of them stay exact."""
    return int.from_bytes(hashlib.blake2b(repr((name, nonce, given)).encode(), digest_size=6).digest(), "big")


def one(directory: str, value: Any) -> int:
    """Return the number that an output is full of."""
    if isinstance(value, int):
        return value
    if not (value == value[0]).all():
        say(directory, "wrong", text=f"a torn input: {value.min()} to {value.max()}, of {len(value)}")
    return int(value[0])


def say(directory: str, what: str, **more: Any) -> None:
    """Append a line at once, so that it is whole whatever happens to this process then."""
    here = ef.context()
    line = {"what": what, "task": here.task_id, "epoch": here.epoch, "attempt": here.attempt, "life": here.incarnation}
    fd = os.open(os.path.join(directory, LOG), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(fd, (json.dumps(line | more) + "\n").encode())
    finally:
        os.close(fd)


# -- outside -----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def outside(directory: str) -> Iterator[sqlite3.Connection]:
    """Begin a transaction of the outside: all of it happens, or nothing."""
    db = sqlite3.connect(os.path.join(directory, OUTSIDE), timeout=60, isolation_level=None)
    try:
        db.execute("pragma synchronous = off")  # what dies here are processes, not the machine
        db.execute("begin immediate")
        db.execute(
            "create table if not exists effects (key text primary key, given text, value integer, epoch integer)"
        )
        db.execute("create table if not exists conflicts (key text, text text)")
        db.execute("create table if not exists undone (key text, epoch integer, had integer)")
        yield db
        db.execute("commit")
    finally:
        db.close()


def act(directory: str, name: str, effect: str, given: list[int], value: int) -> None:
    here = ef.context()
    key, text = here.idempotency_key, json.dumps(given)
    say(directory, "act", key=key)
    with outside(directory) as db:
        known = db.execute("select given, value, epoch from effects where key = ?", [key]).fetchone()
        if known is None:
            db.execute("insert into effects values (?, ?, ?, ?)", [key, text, value, here.epoch])
        elif effect == "rollback":  # it may not be repeated, so it has to be undone before it comes again
            db.execute("insert into conflicts values (?, ?)", [key, f"acts again in epoch {here.epoch}, after {known}"])
        elif known[0] != text:
            db.execute("insert into conflicts values (?, ?)", [key, f"acts on {text} after {known}"])
        if db.execute("select 1 from undone where key = ?", [key]).fetchone() is not None:
            db.execute("insert into conflicts values (?, ?)", [key, f"acts in epoch {here.epoch} after it was undone"])


def take_back(key: str, args: tuple[Any, ...], result: Any) -> None:
    directory, inputs = args[0], args[5:]
    given = json.dumps([one(directory, value) for value in inputs])
    say(directory, "undo", key=key)
    with outside(directory) as db:
        known = db.execute("select given, value from effects where key = ?", [key]).fetchone()
        if known is not None and known[0] != given:
            db.execute("insert into conflicts values (?, ?)", [key, f"undone as if it were given {given}, not {known}"])
        if result is not None and known is not None and args[2] == "rollback" and one(directory, result) != known[1]:
            db.execute("insert into conflicts values (?, ?)", [key, f"undone with another result than {known}"])
        db.execute("delete from effects where key = ?", [key])
        db.execute("insert into undone values (?, ?, ?)", [key, ef.context().epoch, known is not None])
