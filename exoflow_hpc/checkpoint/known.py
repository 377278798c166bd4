"""What a writer process has made durable, so that what is the same is not written again (E19). Runs in the writer process."""

from __future__ import annotations

import os
from collections import Counter, OrderedDict
from dataclasses import dataclass
from pathlib import Path

from exoflow_hpc.checkpoint.layout import Link
from exoflow_hpc.checksums import Tree

__all__ = ["LINK_MIN", "Known", "Stamp"]

#: bytes of the smallest buffer that is linked and not written: a reader opens one file more for it
LINK_MIN = 64 * 1024
#: datasets that are remembered; the oldest are forgotten first
_LIMIT = 10_000


@dataclass(frozen=True, slots=True)
class Stamp:
    """Which file a name stood for: a workflow that was deleted and made anew may have another of the same name."""

    device: int
    inode: int
    nbytes: int
    mtime: int

    @classmethod
    def of(cls, path: Path) -> Stamp | None:
        """Return that of a file; None: it isn't there."""
        try:
            found = os.stat(path)
        except OSError:
            return None
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


#: directory, epoch, type and bytes
_Like = tuple[str, str, str, int]


@dataclass(frozen=True, slots=True)
class _Dataset:
    link: Link
    stamp: Stamp
    leaves: tuple[bytes, ...]


class Known:
    """Datasets that this process has written, with the digests of their leaves.

    Each is known for its own workflow and epoch only: a file never links to one of another epoch, so that the files of an
    epoch that is over can be judged by what names them in that epoch alone.
    """

    def __init__(self, limit: int = _LIMIT) -> None:
        self._limit = limit
        #: what they are like and the digest of their first leaf → datasets; the newest are the last, within a list too
        self._found: OrderedDict[tuple[_Like, bytes], list[_Dataset]] = OrderedDict()
        #: how many there are that are like this
        self._counts: Counter[_Like] = Counter()
        self._count = 0

    def find(self, directory: Path, epoch: str, kind: str, nbytes: int, tree: Tree, part: int) -> Link | None:
        """Return where the same bytes are, as a dataset of the same *kind*, or None.

        Waits for the checksum only while what it has seen is the same as one that is known: mostly that is one leaf.
        """
        like = (str(directory), epoch, kind, nbytes)
        if not self._counts[like]:
            return None
        leaves = tree.leaves(part)
        known = self._found.get((like, next(leaves)), [])
        for index, leaf in enumerate(leaves, 1):
            known = [one for one in known if one.leaves[index] == leaf]
            if not known:
                return None
        known = [one for one in known if Stamp.of(directory / one.link.file) == one.stamp]
        return known[-1].link if known else None

    def add(
        self, directory: Path, epoch: str, kind: str, nbytes: int, tree: Tree, part: int, link: Link, stamp: Stamp
    ) -> None:
        """Remember a dataset that is durable now."""
        like = (str(directory), epoch, kind, nbytes)
        leaves = tuple(tree.leaves(part))
        self._found.setdefault((like, leaves[0]), []).append(_Dataset(link, stamp, leaves))
        self._found.move_to_end((like, leaves[0]))
        self._counts[like] += 1
        self._count += 1
        while self._count > self._limit:
            oldest = next(iter(self._found))
            del self._found[oldest][0]
            if not self._found[oldest]:
                del self._found[oldest]
            self._counts[oldest[0]] -= 1
            self._count -= 1
            if not self._counts[oldest[0]]:
                del self._counts[oldest[0]]
