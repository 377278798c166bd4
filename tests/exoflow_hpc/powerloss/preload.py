"""Tells the library that takes a run's power away when to do so, and reads what it has logged (see recorder.c)."""

from __future__ import annotations

import enum
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from tests.exoflow_hpc.preloading.build import preloaded

__all__ = ["SOURCES", "Event", "Op", "Power"]

#: of the library
SOURCES = [Path(__file__).with_name(name) for name in ("recorder.c", "calls.c")]
_LINE = struct.Struct("<IIHHHHQQqq")


class Op(enum.IntEnum):
    """What was done; as in recorder.h."""

    CREATE = 1
    MKDIR = 2
    WRITE = 3
    TRUNCATE = 4
    ALLOCATE = 5
    RENAME = 6
    LINK = 7
    UNLINK = 8
    RMDIR = 9
    SYNC = 10
    NOTE = 11
    UNKNOWN = 12


@dataclass(frozen=True, slots=True)
class Event:
    """One call that was made, or one note."""

    op: Op
    pid: int
    #: the file or directory that it is about
    ino: int
    #: where its name is
    directory: int
    name: str
    #: new name, of a rename; path, of an unknown call
    name2: str
    offset: int
    length: int
    data: bytes

    def __str__(self) -> str:
        size = f" [{self.offset}, +{self.length}]" if self.op in (Op.WRITE, Op.ALLOCATE, Op.TRUNCATE) else ""
        return f"{self.op.name.lower()} {self.name or self.ino} {self.name2}".rstrip() + size


class Power:
    """The power of one run, or of several, one after the other, on the same disk.

    *root* is the disk: a directory that exists, without symbolic links in its path.
    """

    def __init__(self, library: Path, root: Path, scratch: Path) -> None:
        self.root = root.resolve(strict=True)
        self._library = library
        self._log = scratch / "powerloss.log"
        self._state = scratch / "powerloss.state"
        self._log.write_bytes(b"")
        self._state.write_bytes(bytes(4096))

    def environment(self, role: str = "", call: int = 0, mode: str = "power") -> dict[str, str]:
        """Return variables for processes that are to lose it before the *call*-th call of those with *role*.

        mode "kill": only the one that makes the call is killed, and the power stays. No role: nothing happens.
        """
        return {
            "LD_PRELOAD": preloaded(self._library),
            "POWERLOSS_ROOT": str(self.root),
            "POWERLOSS_LOG": str(self._log),
            "POWERLOSS_STATE": str(self._state),
            "POWERLOSS_ROLE": role,
            "POWERLOSS_CALL": str(call),
            "POWERLOSS_MODE": mode,
        }

    @property
    def lost(self) -> bool:
        """Whether it is gone: nothing is written any more."""
        return self._numbers()[0] != 0

    @property
    def calls(self) -> int:
        """How many calls processes with the role have made, the fatal one included."""
        return self._numbers()[1]

    def _numbers(self) -> tuple[int, int]:
        lost, calls = struct.unpack_from("<II", self._state.read_bytes())
        return lost, calls

    def events(self) -> list[Event]:
        """Return all that was done so far, in order. AssertionError if something was that the log can't express."""
        data, position, found = self._log.read_bytes(), 0, []
        while position < len(data):
            size, pid, op, _, n1, n2, ino, directory, offset, length = _LINE.unpack_from(data, position)
            body = data[position + _LINE.size : position + size]
            name, name2 = os.fsdecode(body[:n1]), os.fsdecode(body[n1 : n1 + n2])
            assert op != Op.UNKNOWN, f"{name} of {name2}: teach recorder.h and disk.py what that does"
            found.append(Event(Op(op), pid, ino, directory, name, name2, offset, length, body[n1 + n2 :]))
            position += size
        return found
