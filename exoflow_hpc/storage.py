"""The storage directory: which workflows there are, and what each of them is.

Layout (see docs/design.md)::

    <storage>/FORMAT
    <storage>/workflows/<id>/{spec,FENCE,heartbeat,journal/,checkpoints/}
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
from pathlib import Path

from exoflow_hpc.durable import fsync_ancestors, fsync_directory, storage_errors, write_atomically, write_new
from exoflow_hpc.errors import (
    CorruptCheckpointError,
    InvalidWorkflowIdError,
    StorageError,
    WorkflowExistsError,
    WorkflowNotFoundError,
)
from hoplite_mpi.testing import fault

__all__ = ["FORMAT_VERSION", "Storage", "check_workflow_id"]

FORMAT_VERSION = 1
_FORMAT = "exoflow_hpc storage"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SPEC_MAGIC = b"EXOSPEC1"
#: directories being built or removed; an id can't begin with a dot, so none of them is ever taken for a workflow
_NEW, _TRASH = ".new-", ".trash-"
#: a directory still being built after this many seconds belongs to a process that was killed (building takes
#: milliseconds)
_ABANDONED = 3600.0


def check_workflow_id(workflow_id: str) -> str:
    """Return *workflow_id*; InvalidWorkflowIdError if it can't be a directory's name."""
    if not isinstance(workflow_id, str) or not _ID.fullmatch(workflow_id):
        raise InvalidWorkflowIdError(
            f"{workflow_id!r} can't be a workflow id: use 1 to 128 letters, digits, '.', '_' and '-', "
            "and begin with a letter or digit"
        )
    return workflow_id


class Storage:
    """A storage directory, created unless `create` is false. Opening it finishes removals that were interrupted.

    StorageError: it can't be created or read, isn't a directory, or has the format of another version.
    """

    def __init__(self, path: str | os.PathLike[str], *, create: bool = True) -> None:
        #: absolute, so that a later chdir changes nothing
        self.path = Path(path).absolute()
        #: (files, bytes) of the leftovers that were removed when this was opened
        self.swept = (0, 0)
        self._workflows = self.path / "workflows"
        with storage_errors("use the storage directory", self.path):
            if self.path.exists() and not self.path.is_dir():
                raise StorageError(
                    f"{self.path} is a file: a storage has to be a directory", errno.ENOTDIR, str(self.path)
                )
            if not (self.path / "FORMAT").exists():
                self._create(create)
            self._check_format()
        self._sweep()

    @classmethod
    def locate(cls, path: str | os.PathLike[str] | None = None, *, create: bool = True) -> Storage:
        """Open the storage at *path*, else at ``EXOFLOW_STORAGE``, else at ``./.exoflow``."""
        return cls(path or os.environ.get("EXOFLOW_STORAGE") or ".exoflow", create=create)

    def _create(self, create: bool) -> None:
        if not create:
            raise StorageError(
                f"there is no storage at {self.path}: give the right one by --storage", errno.ENOENT, str(self.path)
            )
        # our own directories may be there already: a kill between the two steps, or another process doing the same
        if self.path.is_dir() and any(
            name != "workflows" and not name.startswith(".tmp-FORMAT") for name in os.listdir(self.path)
        ):
            if (self.path / "FORMAT").exists():
                return
            raise StorageError(
                f"{self.path} holds other files and no FORMAT: give an empty or a new directory",
                errno.ENOTEMPTY,
                str(self.path),
            )
        self._workflows.mkdir(parents=True, exist_ok=True)
        write_atomically(
            self.path / "FORMAT",
            f"{_FORMAT} {FORMAT_VERSION}\n".encode(),
            before_rename=lambda: fault.point("storage.before_format_rename"),
        )

    def _check_format(self) -> None:
        text = (self.path / "FORMAT").read_bytes()[:100].decode(errors="replace").strip()
        name, _, version = text.rpartition(" ")
        if name != _FORMAT:
            raise StorageError(
                f"{self.path / 'FORMAT'} is not one of exoflow_hpc: give another directory",
                errno.EINVAL,
                str(self.path),
            )
        if version != str(FORMAT_VERSION):
            raise StorageError(
                f"{self.path} has storage format {version}, not {FORMAT_VERSION}: use the version that wrote it",
                errno.EINVAL,
                str(self.path),
            )

    def _sweep(self) -> None:
        """Finish interrupted removals and drop what killed creators left. A read-only storage stays as it is."""
        with contextlib.suppress(OSError):
            leftovers = [entry for entry in os.scandir(self._workflows) if entry.name.startswith((_NEW, _TRASH))]
            if leftovers:
                # a process killed between its rename and its fsync left only the name changed, and not for sure: a
                # power cut could bring the workflow back without what is removed here
                fsync_directory(self._workflows)
            now = max((os.stat(self._workflows).st_mtime, *(e.stat().st_mtime for e in leftovers)))
            for entry in leftovers:
                path = Path(entry.path)
                if entry.name.startswith(_NEW):
                    # ages by the file system's own clock; renamed first, so that a creator that only slept finds it
                    # gone, not torn
                    if now - entry.stat().st_mtime < _ABANDONED:
                        continue
                    path = path.rename(self._workflows / f"{_TRASH}{secrets.token_hex(8)}")
                sizes = [each.lstat().st_size for each in path.rglob("*") if not each.is_dir()]
                self.swept = self.swept[0] + len(sizes), self.swept[1] + sum(sizes)
                shutil.rmtree(path, ignore_errors=True)
            for path in self.path.glob(
                ".tmp-FORMAT-*"
            ):  # once there is a FORMAT, only who still writes one can want it
                if now - path.stat().st_mtime >= _ABANDONED:
                    path.unlink()

    def create(self, workflow_id: str, spec: bytes) -> Path:
        """Create a workflow with its *spec* and return its directory: all or nothing, durable on return; blocks.

        WorkflowExistsError: the id is taken, also when another process took it at the same moment. StorageError.
        """
        path = self._workflows / check_workflow_id(workflow_id)
        new = self._workflows / f"{_NEW}{secrets.token_hex(8)}"
        with storage_errors("create", path):
            if path.exists():
                raise self._exists(workflow_id)
            try:
                os.mkdir(new)
                os.mkdir(new / "journal")
                os.mkdir(new / "checkpoints")
                write_new(new / "FENCE")
                write_new(new / "spec", _SPEC_MAGIC, _digest(spec), spec)
                fsync_directory(new)
                fault.point("storage.before_rename")
                try:
                    os.rename(new, path)  # fails if somebody else's is there, since that isn't empty
                except OSError as error:
                    if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                        raise self._exists(workflow_id) from None
                    raise
            except BaseException:
                shutil.rmtree(new, ignore_errors=True)
                raise
            fault.point("storage.after_rename")
            fsync_ancestors(path)
        return path

    def _exists(self, workflow_id: str) -> WorkflowExistsError:
        return WorkflowExistsError(
            f"{self.path} has a workflow {workflow_id!r} already: resume it, delete it, or use another id"
        )

    def directory(self, workflow_id: str) -> Path:
        """Return the directory of a workflow. WorkflowNotFoundError."""
        path = self._workflows / check_workflow_id(workflow_id)
        if not path.is_dir():
            raise WorkflowNotFoundError(
                f"{self.path} has no workflow {workflow_id!r}: `python -m exoflow_hpc list` shows those it has"
            )
        return path

    def spec(self, workflow_id: str) -> bytes:
        """Return the spec that `create` was given. WorkflowNotFoundError, CorruptCheckpointError, StorageError."""
        path = self.directory(workflow_id) / "spec"
        try:
            with storage_errors("read", path):
                data = path.read_bytes()
        except StorageError as error:
            if error.errno != errno.ENOENT:
                raise
            data = b""
        start = len(_SPEC_MAGIC) + 16
        if data[:start] != _SPEC_MAGIC + _digest(data[start:]):
            raise CorruptCheckpointError(
                f"{path} is missing or not what was written: restore it from a backup, or delete the workflow"
            )
        return data[start:]

    def list(self) -> list[str]:
        """Return the ids of all workflows, sorted. StorageError."""
        with storage_errors("list", self._workflows):
            return sorted(
                entry.name for entry in os.scandir(self._workflows) if _ID.fullmatch(entry.name) and entry.is_dir()
            )

    def delete(self, workflow_id: str) -> None:
        """Delete a workflow; blocks. A kill in the middle leaves it whole, or gone for everybody.

        A controller that still runs it gets FencedError at its next commit. WorkflowNotFoundError, StorageError.
        """
        path = self.directory(workflow_id)
        trash = self._workflows / f"{_TRASH}{secrets.token_hex(8)}"
        with storage_errors("delete", path):
            fault.point("storage.before_trash")
            os.rename(path, trash)
            fsync_directory(self._workflows)
            fault.point("storage.after_trash")
        shutil.rmtree(trash, ignore_errors=True)  # what can't be removed now is removed when the storage is next opened


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
