"""Named points at which a test can make a process fail: ``fault.point("journal.before_fsync")``.

Which of them fire is said by the environment variable ``HOPLITE_FAULT``, or in one process by `enable`::

    [RANK:]NAME=ACTION[@K][#INCARNATION] [; ...]

ACTION is ``kill`` (SIGKILL itself), ``stop`` (SIGSTOP itself), ``exit`` (at once, with code 70), ``raise`` (`FaultInjected`) or, at a
point with a buffer, ``corrupt`` (a byte of it). It happens the K-th time that the process passes the point (default: the first; ``*``:
every time). RANK: only there.
INCARNATION: a number, or ``*`` for any; default 0, so that a replacement doesn't die of what killed the one before it.

If ``HOPLITE_FAULT_FIRED`` names a directory, each rule fires in one process only of all that have this directory: the first to come to
it, which first writes there who it is and when that was (see `fired`). So a rule without RANK takes whoever gets to the point first.

The points of `hoplite_mpi`, with the role that a process is in at each, are listed in `hoplite_mpi.testing.POINTS`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "FaultInjected",
    "Fired",
    "corrupt",
    "counts",
    "disable",
    "enable",
    "fired",
    "is_on",
    "passed",
    "point",
]

_RULE = re.compile(r"(?:(\d+):)?([\w.\-]+)=(kill|stop|exit|raise|corrupt)(?:@([1-9]\d*|\*))?(?:#(\d+|\*))?")
_EXIT_CODE = 70


class FaultInjected(RuntimeError):
    """Raised at a fault point with the action ``raise``."""


@dataclass(frozen=True)
class _Rule:
    action: str
    #: fires at this passing, counted from 1; 0: at each
    at: int
    text: str


@dataclass(frozen=True)
class Fired:
    """A rule that has fired."""

    rule: str
    point: str
    rank: int
    incarnation: int
    pid: int
    #: by `time.monotonic`, which is the same for all processes of a machine
    time: float


#: whether any rule is set, or passings are counted: the one thing that a point looks at when off
_on = False
#: point → what happens there, in this process
_rules: dict[str, list[_Rule]] = {}
#: point → how often it was passed since the rules were set
_passed: dict[str, int] = {}
_lock = threading.Lock()


def point(name: str) -> None:
    """Fail here if a test asked for it; otherwise do nothing."""
    if _on and _pass(name) == "corrupt":
        raise FaultInjected(f"fault point {name} has nothing that could be corrupted")


def corrupt(name: str, buffer: memoryview) -> None:
    """As `point`; *buffer*: writable bytes, one of which is changed if a test asked for ``corrupt``."""
    if _on and _pass(name) == "corrupt" and len(buffer):
        buffer[len(buffer) // 2] ^= 0xFF


def is_on() -> bool:
    """Return whether a point does more than nothing: asked before the name of a point is looked up."""
    return _on


def _pass(name: str) -> str | None:
    """Fail if that is asked for at this passing; return the action that is left to the caller."""
    with _lock:
        count = _passed[name] = _passed.get(name, 0) + 1
        rule = next((rule for rule in _rules.get(name, ()) if rule.at in (0, count)), None)
    if rule is None or not _is_first(rule, name):
        return None
    action = rule.action
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        # not os.kill: the signal would go to the main thread, and this one run on until that one has been scheduled
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
    elif action == "exit":
        os._exit(_EXIT_CODE)
    elif action == "raise":
        raise FaultInjected(f"fault point {name}, passing {count}")
    return action


def _is_first(rule: _Rule, name: str) -> bool:
    """Write down that the rule fires here; return False if it has fired in another process."""
    directory = os.environ.get("HOPLITE_FAULT_FIRED")
    if directory is None:
        return True
    rank, incarnation = (int(os.environ.get(f"HOPLITE_{what}", "0")) for what in ("RANK", "INCARNATION"))
    entry = Fired(rule.text, name, rank, incarnation, os.getpid(), time.monotonic())
    temporary = Path(directory, f".{os.getpid()}.{threading.get_ident()}")
    temporary.write_text(json.dumps(vars(entry)))
    try:
        os.link(temporary, Path(directory, rule.text))  # whole at once, and once only
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def fired(directory: str | os.PathLike[str]) -> list[Fired]:
    """Return the rules that have fired in the processes whose ``HOPLITE_FAULT_FIRED`` is *directory*, the first one first."""
    files = [path for path in Path(directory).iterdir() if not path.name.startswith(".")]
    return sorted((Fired(**json.loads(path.read_text())) for path in files), key=lambda entry: entry.time)


def counts() -> dict[str, int]:
    """Return point → how often this process passed it, of all that it has passed since rules were set."""
    with _lock:
        return dict(_passed)


def passed(name: str) -> int:
    """Return how often this process passed the point since rules were set; 0 while there are none."""
    with _lock:
        return _passed.get(name, 0)


def enable(spec: str, counting: bool = False) -> None:
    """Replace the rules of this process and begin counting anew; ValueError if *spec* isn't in the form above.

    counting: count passings also if no rule is for this process.
    """
    rules: dict[str, list[_Rule]] = {}
    rank, incarnation = os.environ.get("HOPLITE_RANK", "0"), os.environ.get("HOPLITE_INCARNATION", "0")
    for text in filter(None, (part.strip() for part in spec.split(";"))):
        match = _RULE.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{text!r} is not a fault: write [RANK:]NAME=kill|stop|exit|raise|corrupt[@K][#INCARNATION]"
            )
        only_rank, name, action, at, only_incarnation = match.groups()
        if (only_rank or rank) == rank and (only_incarnation or "0") in (incarnation, "*"):
            rules.setdefault(name, []).append(_Rule(action, 0 if at == "*" else int(at or 1), text))
    _set(rules, counting)


def disable() -> None:
    """Forget all rules and counts of this process."""
    _set({})


def _set(rules: dict[str, list[_Rule]], counting: bool = False) -> None:
    global _on
    with _lock:
        _rules.clear()
        _rules.update(rules)
        _passed.clear()
        _on = bool(rules) or counting


enable(os.environ.get("HOPLITE_FAULT", ""))
