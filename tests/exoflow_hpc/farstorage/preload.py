"""Hosts that see a directory as a network file system far away would show it, and have clocks of their own (see farstorage.c)."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path

from tests.exoflow_hpc.preloading.build import preloaded

__all__ = ["SOURCES", "FarHost"]

#: of the library
SOURCES = [Path(__file__).with_name("farstorage.c")]


@dataclass(frozen=True)
class FarHost:
    """What one host sees of *root*, which exists and has no symbolic links in its path, and what it remembers, in *cache*."""

    library: Path
    root: Path
    cache: Path
    #: seconds for which it believes what it once saw
    stale: float = 0.0
    #: milliseconds that an answer takes
    delay: int = 0
    #: seconds by which its wall clock is wrong
    clock: int = 0

    def environment(self) -> dict[str, str]:
        """Return variables for the processes of this host."""
        self.cache.mkdir(exist_ok=True)
        return {
            "LD_PRELOAD": preloaded(self.library),
            "FARSTORAGE_ROOT": str(self.root),
            "FARSTORAGE_CACHE": str(self.cache),
            "FARSTORAGE_STALE": str(self.stale),
            "FARSTORAGE_DELAY": str(self.delay),
            "FARSTORAGE_CLOCK": str(self.clock),
        }

    def forget(self, kinds: str = "nad") -> None:
        """Forget what was seen: names that weren't there ("n"), attributes ("a"), listings ("d")."""
        for path in list(self.cache.iterdir()):
            if path.name[0] in kinds:
                path.rename(self.cache / f"forgotten-{uuid.uuid4().hex}")
