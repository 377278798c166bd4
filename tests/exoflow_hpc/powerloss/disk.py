"""What a disk can hold after a loss of power, as strict as POSIX allows it to be.

The bytes of a file last once that file was fsynced, a name once its directory was. All that was done since may be there
or not, each write and each change of a name for itself, and of a write any of its sectors.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .preload import Event, Op

__all__ = ["SECTOR", "Disk", "Image", "read_image", "write_image"]

#: bytes that a disk writes whole or not at all
SECTOR = 512

#: path → content, None for a directory
Image = dict[str, bytes | None]


@dataclass(slots=True)
class _File:
    #: what is safe
    content: bytearray = field(default_factory=bytearray)
    #: what was done to it since, oldest first
    pending: list[Event] = field(default_factory=list)

    def sync(self) -> None:
        for event in self.pending:
            _change(self.content, event)
        self.pending.clear()

    def image(self, chance: random.Random | None, everything: bool) -> bytes:
        if not self.pending or (chance is None and not everything):
            return bytes(self.content)
        whole = bytearray(self.content)
        for event in self.pending:
            _change(whole, event)
        if chance is None:
            return bytes(whole)
        content = bytearray(self.content)
        for event in self.pending:
            fate = chance.choice(("kept", "dropped", "torn"))
            if fate == "kept":
                _change(content, event)
            elif fate == "torn" and event.op == Op.WRITE:
                _tear(content, event, chance)
        if len(content) < len(whole) and chance.random() < 0.5:  # the size lasted and the blocks did not
            content.extend(bytes(len(whole) - len(content)))
        return bytes(content)


@dataclass(slots=True)
class _Directory:
    entries: dict[str, _File | _Directory] = field(default_factory=dict)
    #: names since the last fsync: what each became (None: it went), those of a rename in one step
    pending: list[dict[str, _File | _Directory | None]] = field(default_factory=list)

    def now(self) -> dict[str, _File | _Directory]:
        entries = dict(self.entries)
        for names in self.pending:
            _rename(entries, names)
        return entries

    def sync(self) -> None:
        self.entries = self.now()
        self.pending.clear()

    def chosen(self, chance: random.Random | None, everything: bool) -> dict[str, _File | _Directory]:
        if chance is None:
            return self.now() if everything else self.entries
        entries = dict(self.entries)
        for names in self.pending:
            if chance.random() < 0.5:
                _rename(entries, names)
        return entries


def _rename(entries: dict[str, _File | _Directory], names: dict[str, _File | _Directory | None]) -> None:
    for name, what in names.items():
        if what is None:
            entries.pop(name, None)
        else:
            entries[name] = what


def _change(content: bytearray, event: Event) -> None:
    if event.op == Op.WRITE:
        end = event.offset + len(event.data)
        content.extend(bytes(max(0, event.offset - len(content))))
        content[event.offset : end] = event.data
    elif event.op == Op.ALLOCATE:
        content.extend(bytes(max(0, event.offset + event.length - len(content))))
    elif event.length < len(content):
        del content[event.length :]
    else:
        content.extend(bytes(event.length - len(content)))


def _tear(content: bytearray, event: Event, chance: random.Random) -> None:
    """Do a part of a write: any of its sectors, or those before one."""
    first, end = event.offset // SECTOR, -(-(event.offset + len(event.data)) // SECTOR)
    if chance.random() < 0.5:
        sectors = [number for number in range(first, end) if chance.random() < 0.5]
    else:
        sectors = list(range(first, chance.randint(first, end)))
    for number in sectors:
        start = max(number * SECTOR, event.offset)
        part = event.data[start - event.offset : (number + 1) * SECTOR - event.offset]
        content.extend(bytes(max(0, start - len(content))))
        content[start : start + len(part)] = part


class Disk:
    """A disk that held nothing but an empty directory, *root*, and what *events* made of it. See also `holding`."""

    def __init__(self, root: Path, events: Iterable[Event] = ()) -> None:
        self._root = _Directory()
        #: inode → what has it now: the system gives the number of what is gone to something new
        self._inodes: dict[int, _File | _Directory] = {root.stat().st_ino: self._root}
        for event in events:
            self.apply(event)

    @classmethod
    def holding(cls, root: Path) -> Disk:
        """Return a disk that has, durably, what is in a directory now; what comes next is to be given to `apply`."""
        disk = cls(root)
        for path in sorted(root.rglob("*")):  # a directory sorts before what is in it
            what = _Directory() if path.is_dir() else _File(bytearray(path.read_bytes()))
            parent = disk._inodes[path.parent.stat().st_ino]
            assert isinstance(parent, _Directory)
            parent.entries[path.name] = disk._inodes[path.stat().st_ino] = what
        return disk

    def apply(self, event: Event) -> None:
        """Let one more call happen."""
        if event.op in (Op.CREATE, Op.MKDIR):
            self._inodes[event.ino] = _File() if event.op == Op.CREATE else _Directory()
            self._names(event.directory, {event.name: self._inodes[event.ino]})
        elif event.op in (Op.WRITE, Op.TRUNCATE, Op.ALLOCATE):
            file = self._inodes[event.ino]
            assert isinstance(file, _File)
            file.pending.append(event)
        elif event.op == Op.LINK:
            self._names(event.directory, {event.name: self._inodes[event.ino]})
        elif event.op == Op.RENAME:
            self._names(event.directory, {event.name: None, event.name2: self._inodes[event.ino]})
        elif event.op in (Op.UNLINK, Op.RMDIR):
            self._names(event.directory, {event.name: None})
        elif event.op == Op.SYNC:
            self._inodes[event.ino].sync()

    def _names(self, directory: int, names: dict[str, _File | _Directory | None]) -> None:
        where = self._inodes[directory]
        assert isinstance(where, _Directory)
        where.pending.append(names)

    def nothing(self) -> Image:
        """Return what is left if nothing lasted that didn't have to."""
        return self._image(None, False)

    def everything(self) -> Image:
        """Return what is left if all lasted, as after kill -9."""
        return self._image(None, True)

    def mixture(self, seed: int) -> Image:
        """Return one of the other cases, the same for the same seed."""
        return self._image(random.Random(seed), False)

    def _image(self, chance: random.Random | None, everything: bool) -> Image:
        image: Image = {}
        directories = [("", self._root)]
        while directories:
            path, directory = directories.pop()
            for name, what in sorted(directory.chosen(chance, everything).items()):
                below = f"{path}/{name}" if path else name
                if isinstance(what, _Directory):
                    image[below] = None
                    directories.append((below, what))
                else:
                    image[below] = what.image(chance, everything)
        return image


def write_image(image: Image, directory: Path) -> None:
    """Make an empty directory hold an image."""
    for path, content in sorted(image.items()):  # a directory sorts before what is in it
        if content is None:
            os.mkdir(directory / path)
        else:
            with open(directory / path, "wb") as file:
                file.write(content.rstrip(b"\0"))  # zeros at the end, of which a journal has many, take no time so
                file.truncate(len(content))


def read_image(directory: Path) -> Image:
    """Return what a directory holds."""
    return {
        str(path.relative_to(directory)): None if path.is_dir() else path.read_bytes() for path in directory.rglob("*")
    }
