"""The journal of a workflow: what is committed, and who may commit (see *Journal* in architecture.md; R1, R10, R11).

One append-only file for each epoch. A new controller takes the next epoch by exclusive creation, says so in FENCE, only
then reads the older files, and seals them: nobody ever reads past a seal, so what a controller that was taken over
appends later does not exist. This module doesn't know what the records mean: see `exoflow_hpc.records`.

Where two hosts don't see the same (see `_epochs` for what is trusted), these are the windows:

- *Between an fsync and its acknowledgement* a newer epoch may come. FENCE is opened anew in between: if it names none, whoever comes
  later reads the files after that, and so what was fsynced. That the file of the next epoch isn't there proves nothing: that
  name is looked for at each commit, so its absence may be remembered.
- *While the files are read* a newer epoch may seal less than is accepted. FENCE is opened anew after the last one was read.
- *An epoch that isn't seen* but that FENCE names, or that comes before one that is seen, is opened by its name. Whoever can't
  do so refuses, as its seal may be what ends the files that are seen.
- *An epoch whose controller died or stopped before it wrote FENCE* has no records, as the seal comes later: to overlook its file
  changes nothing.
- *What was cached of a file* is dropped before the file is read without a seal, and again before it is called damaged.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack

from exoflow_hpc._epochs import announce, epoch_name, known_epochs, newest_announced, take_epoch
from exoflow_hpc._frames import MAX_PAYLOAD, Scan, frame, prefix_digest, scan
from exoflow_hpc.durable import fsync_ancestors, storage_errors, write_all
from exoflow_hpc.errors import CorruptJournalError, ExoFlowError, FencedError, JournalBrokenError, StorageError
from hoplite_mpi.testing import fault

__all__ = ["History", "Journal", "TornTail", "inspect", "read"]

#: type of the record that begins each file
_SEAL = "seal"
#: bytes that the file grows by ahead of its records, so that most commits change no file size
_PREALLOCATE = 1 << 20
#: bytes of records that one fsync waits for at most
_GROUP_LIMIT = 64 << 20
#: how often a reader begins again since there was a new epoch meanwhile
_LOOKS = 10
#: to whoever doesn't find a file that has to be there
_MISSING = (
    "restore it from a backup; if another host has just made it, this one may show an old state of the directory: "
    "try again in a minute"
)


@dataclass(frozen=True, slots=True)
class TornTail:
    """Bytes at the end of a file that a kill or power cut left: dropped, as they were never acknowledged."""

    file: str
    offset: int
    nbytes: int


@dataclass(slots=True)
class History:
    """What the journal says."""

    #: committed records, oldest first, without seals
    records: list[dict[str, Any]] = field(default_factory=list)
    #: epoch of the newest file that was read; 0: there was none
    epoch: int = 0
    torn: list[TornTail] = field(default_factory=list)
    #: for the next seal: [epoch, accepted bytes, checksum of them, records], for each file that was read
    seals: list[list[Any]] = field(default_factory=list)


def read(workflow_dir: str | os.PathLike[str]) -> History:
    """Return what is committed, without taking an epoch or disturbing a controller at work; blocks on storage.

    What it returns stays: a record that was written and not yet fsynced is fsynced here. CorruptJournalError,
    StorageError.
    """
    directory, fence = Path(workflow_dir) / "journal", Path(workflow_dir) / "FENCE"
    with storage_errors("read the journal in", directory):
        for _ in range(_LOOKS):
            newest = known_epochs(directory, fence)
            history = _read(directory, newest)
            if known_epochs(directory, fence) == newest:  # else a new controller may have sealed less than we accepted
                return history
    raise StorageError(
        f"{directory}: one controller after the other takes over: try again", errno.EAGAIN, str(directory)
    )


def inspect(workflow_dir: str | os.PathLike[str]) -> tuple[History, list[tuple[str, str]]]:
    """Return as much as can be read, and (path, what is wrong) for each file that is damaged or missing. StorageError."""
    directory, fence = Path(workflow_dir) / "journal", Path(workflow_dir) / "FENCE"
    problems: list[tuple[str, str]] = []
    with storage_errors("read the journal in", directory):
        for _ in range(_LOOKS):
            newest = known_epochs(directory, fence)
            problems.clear()
            history = _read(directory, newest, problems)
            if known_epochs(directory, fence) == newest:
                break
    return history, problems


def _read(directory: Path, newest: int, problems: list[tuple[str, str]] | None = None) -> History:
    """Read the files of all epochs up to *newest*, that one first, since the newest seal says how much of all older ones exists.

    With *problems*, damage is added to it and not raised, and what can be read of such a file counts.
    """

    def damaged(path: Path, text: str) -> None:
        if problems is None:
            raise CorruptJournalError(f"{path} {text}")
        problems.append((str(path), text))

    history = History(epoch=newest)
    limits: dict[int, list[Any]] | None = None
    parts: list[list[dict[str, Any]]] = []
    for epoch in range(newest, 0, -1):
        path = directory / epoch_name(epoch)
        try:
            if limits is None:
                found, data = _scan_open_end(epoch, path, damaged)
                if found.torn:
                    history.torn.append(TornTail(str(path), found.accepted, found.torn))
            elif epoch not in limits:
                damaged(path, "is not named by the seal of a newer epoch")
                continue
            else:
                found, data = _scan_sealed(epoch, path, limits[epoch], damaged)
        except FileNotFoundError:
            if problems is None and epoch == newest:  # nothing proves that it isn't only not seen
                raise _not_seen(path) from None
            damaged(path, f"is missing: {_MISSING}")
            continue
        records = found.records
        history.seals.append([epoch, found.accepted, prefix_digest(memoryview(data)[: found.accepted]), len(records)])
        if records:
            if records[0].get("type") != _SEAL or records[0].get("epoch") != epoch:
                damaged(path, f"at offset 0: the file doesn't begin with the seal of epoch {epoch}")
            elif limits is None:
                limits = {seal[0]: seal for seal in records[0]["files"]}
        parts.append(records[1:])
    history.seals.reverse()
    for part in reversed(parts):
        history.records.extend(part)
    return history


def _not_seen(path: str | os.PathLike[str]) -> StorageError:
    return StorageError(f"{path} was begun and is not there: {_MISSING}", errno.ENOENT, os.fspath(path))


def _scan_open_end(epoch: int, path: Path, damaged: Callable[[Path, str], None]) -> tuple[Scan, bytes]:
    """Scan a file that no seal limits; its writer may still be at work. What is found is durable."""
    data = _read_file(path, True)
    found = scan(epoch, data)
    if found.valid_after is not None:
        # A frame seen half-written, and a later one whole, can come from reading while it grew. Then a second look
        # finds the first one whole.
        again = _read_file(path, True)
        second = scan(epoch, again)
        if second.valid_after is not None and second.accepted == found.accepted:
            damaged(
                path,
                f"is corrupt at offset {second.accepted}: a valid record follows at {second.valid_after}; "
                "restore it from a backup",
            )
        found, data = second, again
    return found, data


def _scan_sealed(epoch: int, path: Path, seal: list[Any], damaged: Callable[[Path, str], None]) -> tuple[Scan, bytes]:
    _, nbytes, digest, count = seal
    for durably in (False, True):  # what isn't as it was may only have been cached before it was
        data = _read_file(path, durably)[:nbytes]
        found = scan(epoch, data)
        if found.accepted == len(data) == nbytes and len(found.records) == count and prefix_digest(data) == digest:
            return found, data
    damaged(
        path,
        f"is corrupt at offset {found.accepted}: {nbytes} bytes with {count} records were sealed, and not "
        "all are there as they were; restore it from a backup",
    )
    return found, data


def _read_file(path: Path, durably: bool) -> bytes:
    """Return a file's bytes; *durably*: those that a power cut can't take back."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if durably:
            # After a failed fsync the kernel may keep pages as clean that never got to the disk: flush, forget, and
            # read what is there.
            _flush(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        parts = []
        while part := os.read(fd, 16 << 20):
            parts.append(part)
        if durably:
            _flush(fd)  # for what was appended between the flush and the read
        return b"".join(parts)
    finally:
        os.close(fd)


def _flush(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EROFS):  # where nothing can be written, all that is there is durable
            raise


class Journal:
    """The journal of one workflow, held by one epoch. Get one by `Journal.open`. Thread-safe.

    `append` returns at once; a committer thread writes all that came during the last fsync in one frame.
    """

    def __init__(self, workflow_dir: Path, epoch: int, fd: int) -> None:
        self.epoch = epoch
        self.path = workflow_dir / "journal" / epoch_name(epoch)
        self._fence = workflow_dir / "FENCE"
        self._fd = fd
        #: device and inode of the file: a workflow that was deleted and made anew has the same path and epoch
        self._identity = os.fstat(fd)[1:3]
        #: bytes written, all of them in valid frames as long as `_error` is None
        self._size = 0
        self._allocated = 0
        self._preallocate = _PREALLOCATE
        self._wakeup = threading.Condition()
        self._queue: deque[tuple[bytes, Future[None]]] = deque()
        #: records given to `append` and not yet acknowledged
        self._unfinished = 0
        #: once set it stays: nothing is committed in this epoch any more
        self._error: ExoFlowError | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._commit_forever, name=f"journal-{epoch}", daemon=True)

    @classmethod
    def open(cls, workflow_dir: str | os.PathLike[str], after: int | None = None) -> tuple[Journal, History]:
        """Take the next epoch and return its journal with all that is committed; blocks on storage.

        From here on every older epoch gets FencedError. FencedError: a yet newer one has come already, or one newer
        than *after*. CorruptJournalError, StorageError.
        """
        workflow_dir = Path(workflow_dir)
        directory, fence = workflow_dir / "journal", workflow_dir / "FENCE"
        with storage_errors("take over the journal in", directory):
            try:
                epoch, fd = take_epoch(directory, fence, after)
            except FileNotFoundError as error:
                if not directory.exists():
                    raise
                raise _not_seen(error.filename) from None
            try:
                fault.point("journal.epoch_created")
                announce(fence, epoch)
                # whoever created the workflow may have been killed before it could, and nothing that is committed may
                # be lost by the name of a directory above it
                fsync_ancestors(directory)
                # only now: whatever an older epoch makes durable after this moment, it finds the fence before it
                # acknowledges it
                history = _read(directory, epoch - 1)
                self = cls(workflow_dir, epoch, fd)
            except BaseException:
                os.close(fd)
                raise
        self._thread.start()
        try:
            self.append({"type": _SEAL, "epoch": epoch, "files": history.seals}).result()
        except BaseException:
            self.close()
            raise
        fault.point("journal.sealed")
        history.epoch = epoch
        return self, history

    def append(self, record: dict[str, Any]) -> Future[None]:
        """Queue a record (msgpack-able, with a "type"); done once it is durable *and* the epoch was still ours after
        that.

        The future fails with FencedError or JournalBrokenError; so does this call once either has happened.
        Callbacks of the future run in the committer thread: they have to be short.
        ExoFlowError after `close`; TypeError if it can't be packed.
        """
        packed: bytes = msgpack.packb(record)
        if len(packed) > MAX_PAYLOAD - 16:
            raise ValueError(f"a record of {len(packed)} bytes is too large for the journal")
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()  # what is queued can't be taken back
        with self._wakeup:
            self._raise_if_unusable()
            self._queue.append((packed, future))
            self._unfinished += 1
            self._wakeup.notify_all()
        return future

    def flush(self, timeout: float | None = None) -> None:
        """Wait until all is acknowledged. FencedError, JournalBrokenError; TimeoutError after *timeout* seconds."""
        with self._wakeup:
            if not self._wakeup.wait_for(lambda: self._unfinished == 0 or self._error is not None, timeout):
                raise TimeoutError(f"{self.path}: the storage didn't finish a commit within {timeout} s")
            if self._error is not None:
                raise self._error

    def check(self) -> None:
        """Raise FencedError if another controller has taken over (looks at the storage)."""
        with self._wakeup:
            self._raise_if_unusable()
        try:
            self._check_epoch()
        except ExoFlowError as error:
            self._fail(error, [])
            raise

    def close(self) -> None:
        """Commit what was appended, then stop; blocks on storage. What can't be committed has failed its futures."""
        with self._wakeup:
            self._closed = True
            self._wakeup.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        with self._wakeup:
            if self._fd >= 0:
                if self._error is None:  # what was reserved ahead is given back
                    with contextlib.suppress(OSError):
                        os.ftruncate(self._fd, self._size)
                os.close(self._fd)
                self._fd = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _raise_if_unusable(self) -> None:
        if self._error is not None:
            raise self._error
        if self._closed:
            raise ExoFlowError(f"{self.path}: the journal was closed, open it again to commit more")

    def _commit_forever(self) -> None:
        while True:
            with self._wakeup:
                self._wakeup.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
                group = [self._queue.popleft()]
                size = len(group[0][0])
                while self._queue and size + len(self._queue[0][0]) <= _GROUP_LIMIT:
                    group.append(self._queue.popleft())
                    size += len(group[-1][0])
            self._commit(group)

    def _commit(self, group: list[tuple[bytes, Future[None]]]) -> None:
        try:
            if self._error is not None:
                raise self._error
            with storage_errors("commit to the journal", self.path, JournalBrokenError):
                self._write(frame(self.epoch, self._size, [packed for packed, _ in group]))
            self._check_epoch()
        except ExoFlowError as error:
            self._fail(error, group)
            return
        except BaseException as error:  # no memory, or a fault injected by a test: nobody may wait for a dead thread
            self._fail(JournalBrokenError(f"{self.path}: the commit failed unexpectedly: {error!r}"), group)
            return
        for _, future in group:
            future.set_result(None)
        with self._wakeup:
            self._unfinished -= len(group)
            self._wakeup.notify_all()

    def _write(self, data: bytes) -> None:
        fault.point("journal.before_write")
        self._reserve(self._size + len(data))
        write_all(self._fd, data, self._size)
        fault.point("journal.after_write")
        fault.point("journal.before_fsync")
        os.fdatasync(self._fd)
        fault.point("journal.after_fsync")
        self._size += len(data)

    def _reserve(self, nbytes: int) -> None:
        """Let the file grow in large steps, so that a full disk is found before a frame is begun. ENOSPC."""
        if nbytes <= self._allocated or not self._preallocate:
            return
        goal = nbytes + self._preallocate
        try:
            os.posix_fallocate(self._fd, self._allocated, goal - self._allocated)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                self._preallocate = 0  # this file system can't
                return
            # no room for the whole step; what is there may still do for this frame
            os.posix_fallocate(self._fd, self._allocated, nbytes - self._allocated)
            goal = nbytes
        self._allocated = goal

    def _check_epoch(self) -> None:
        """Raise FencedError unless this epoch is the newest of this very workflow."""
        with storage_errors("check the epoch of", self.path, JournalBrokenError):
            try:
                # Opening a file is what makes a network file system ask its server (close-to-open); looking for a name
                # may be answered from a cache, so both are done.
                newest = newest_announced(self._fence, self.epoch)
                ours = os.stat(self.path)[1:3] == self._identity
            except FileNotFoundError:
                raise FencedError(f"{self.path}: the workflow was deleted while this controller ran it") from None
            if not ours:
                raise FencedError(f"{self.path}: the workflow was deleted and made anew while this controller ran it")
            if newest > self.epoch or self.path.with_name(epoch_name(self.epoch + 1)).exists():
                raise FencedError(
                    f"{self.path}: a newer controller (epoch {max(newest, self.epoch + 1)}) has taken over this "
                    f"workflow from epoch {self.epoch}; this one commits nothing more"
                )

    def _fail(self, error: ExoFlowError, group: list[tuple[bytes, Future[None]]]) -> None:
        with self._wakeup:
            self._error = self._error or error
            error = self._error
            group = [*group, *self._queue]
            self._queue.clear()
            self._unfinished -= len(group)
            self._wakeup.notify_all()
        for _, future in group:
            future.set_exception(error)
