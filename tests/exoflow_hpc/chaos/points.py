"""The fault points of `exoflow_hpc`, and what a process is at each of them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from hoplite_mpi.testing import Point

__all__ = ["POINTS", "ROLES", "TAKING_OVER"]

_LAUNCHER, _DELETER = "launcher", "deleter"
_CONTROLLER, _COMMITTER = "controller", "committer of the journal"
_AGENT, _WRITER = "agent", "checkpoint writer"

#: name → role and place
POINTS: Mapping[str, Point] = MappingProxyType(
    {
        "storage.before_format_rename": Point(_LAUNCHER, "the mark of a new storage is written and has no name"),
        "storage.before_rename": Point(_LAUNCHER, "all of a new workflow is written and it has no name"),
        "storage.after_rename": Point(_LAUNCHER, "a new workflow has its name, and that is not durable"),
        "storage.before_trash": Point(_DELETER, "about to take away the name of a workflow"),
        "storage.after_trash": Point(_DELETER, "a workflow has no name any more, and its files are there"),
        "journal.epoch_created": Point(_CONTROLLER, "its epoch is taken, older ones don't know"),
        "journal.sealed": Point(_CONTROLLER, "what older epochs wrote is sealed, nothing has begun"),
        "journal.before_write": Point(_COMMITTER, "a group of records is about to be written"),
        "journal.after_write": Point(_COMMITTER, "a group of records is written"),
        "journal.before_fsync": Point(_COMMITTER, "a group of records is about to become durable"),
        "journal.after_fsync": Point(_COMMITTER, "a group of records is durable, and nobody knows"),
        "controller.dispatch": Point(_CONTROLLER, "a task is about to be sent to a rank"),
        "controller.started": Point(
            _CONTROLLER, "the start of an effect is durable, and nobody has been told to begin"
        ),
        "controller.voided": Point(_CONTROLLER, "what came of a lost value is void, and nothing is undone yet"),
        "controller.roll_back": Point(_CONTROLLER, "an effect is about to be undone"),
        "controller.rollback_started": Point(_CONTROLLER, "it is durable that somebody is at it, and nobody is yet"),
        "controller.rolled_back": Point(_CONTROLLER, "an effect is undone, and has not come again"),
        "controller.committed": Point(_CONTROLLER, "a commit is durable, and nothing has come of it"),
        "controller.finished": Point(_CONTROLLER, "the end is durable, and nobody knows"),
        "controller.take_over": Point(_CONTROLLER, "the head is lost, and this one has done nothing yet"),
        "controller.taken_over": Point(_CONTROLLER, "it knows what the others have, and none was told to go on"),
        "agent.report": Point(_AGENT, "about to say what it has to one that takes over"),
        "agent.kept": Point(_AGENT, "it goes on with what counts for one that has taken over"),
        "agent.dispatched": Point(_AGENT, "a task has come, and its inputs have not"),
        "agent.task_done": Point(_AGENT, "a worker has done a task, and nobody knows"),
        "agent.written": Point(_AGENT, "an output is in a checkpoint, and the controller does not know"),
        "checkpoint.before_write": Point(_WRITER, "about to write a group of outputs"),
        "checkpoint.after_write": Point(_WRITER, "a group of outputs is written, not durable"),
        "checkpoint.before_rename": Point(_WRITER, "a checkpoint is about to get its name"),
        "checkpoint.after_rename": Point(_WRITER, "a checkpoint has its name, and nobody knows"),
    }
)
#: those that are passed only when the head was lost before
TAKING_OVER = ("controller.take_over", "controller.taken_over", "agent.report", "agent.kept")
#: as what a process is killed at some moment, wherever it is then
ROLES = ("rank", "head", "worker", _WRITER, "forkserver", _LAUNCHER, "everything")
