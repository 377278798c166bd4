"""From the nodes that a user bound to a `WorkflowSpec`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .dag import BadWorkflowError, InputItem, InputNode, ReduceNode, StepNode, TaskNode, require_step
from .errors import IllegalAnnotationError
from .fingerprint import Fingerprint, is_installed_path
from .options import check_checkpoint
from .payload import Blobs, dump_arguments, dump_function
from .pickling import dumps
from .semantics import check_annotations
from .settings import Settings
from .spec import TaskSpec, WorkflowSpec

__all__ = ["compile_workflow"]


def compile_workflow(
    output: Any,
    inputs: Any = None,
    *,
    checkpoint: str = "auto",
    unused_inputs: bool = False,
    settings: Settings | None = None,
) -> WorkflowSpec:
    """Return the spec of the DAG that ends in node *output*, with *inputs* (a dict by name, or one value) filled in.

    checkpoint: what tasks with ``"auto"`` use. unused_inputs: inputs that no node takes are fine, as for a workflow
    file,
    whose function has taken them. Each argument is pickled here and now: what the program changes later has no effect.
    BadWorkflowError: no DAG, a cycle, a missing or unused input, what can't be pickled. IllegalAnnotationError: a wait
    for a commit that will never be, or an effect that could be neither repeated nor undone.
    """
    compiler = _Compiler(inputs, check_checkpoint(checkpoint), settings or Settings.from_environment())
    return compiler.compile(require_step(output, "the output of a workflow"), unused_inputs)


class _Compiler:
    """One compilation: nodes are visited depth first, without recursion, and each is pickled when it is first seen."""

    def __init__(self, inputs: Any, checkpoint: str, settings: Settings) -> None:
        self.inputs = {} if inputs is None else inputs
        self.checkpoint = checkpoint
        self.blobs = Blobs(settings.shared_constant_size)
        #: id of a node → what was pickled for it; the nodes are kept alive by the output
        self.payloads: dict[int, _Payload] = {}
        self.used_inputs: set[str] = set()
        self.uses_all_inputs = False

    def compile(self, output: StepNode, unused_inputs: bool) -> WorkflowSpec:
        order = self._order(output)
        index = {id(node): position for position, node in enumerate(order)}
        if not unused_inputs:
            self._check_inputs()
        names = unique_names(order)
        tasks = tuple(self._task(position, node, names[position], index) for position, node in enumerate(order))
        check_annotations(tasks)
        _check_barriers(tasks)
        return WorkflowSpec(
            tasks=tasks,
            output=index[id(output)],
            fingerprint=self._fingerprint(order, tasks, index),
            blobs=self.blobs.data,
            inputs=tuple(sorted(self.inputs)) if isinstance(self.inputs, Mapping) else (),
            sys_path=user_sys_path(),
        )

    def _order(self, output: StepNode) -> list[StepNode]:
        """Return all nodes, each after those it depends on, in the order of arguments: the same in each process."""
        order: list[StepNode] = []
        #: id → whether it is finished; one that is not is on the path from the output to here
        seen: dict[int, bool] = {id(output): False}
        path: list[tuple[StepNode, Iterator[StepNode]]] = [(output, iter(self._visit(output)))]
        while path:
            node, following = path[-1]
            below = next(following, None)
            if below is None:
                path.pop()
                seen[id(node)] = True
                order.append(node)
            elif id(below) not in seen:
                seen[id(below)] = False
                path.append((below, iter(self._visit(below))))
            elif not seen[id(below)]:
                cycle = [step for step, _ in path]
                cycle = cycle[[id(step) for step in cycle].index(id(below)) :]
                names = " ← ".join(step.name for step in [*cycle, cycle[0]])
                raise BadWorkflowError(
                    f"the tasks of the workflow wait for each other in a circle: {names}; remove an .after()"
                )
        return order

    def _visit(self, node: StepNode) -> list[StepNode]:
        """Pickle the arguments of *node* and return the nodes it depends on."""
        payload = self.payloads[id(node)] = _Payload()
        if isinstance(node, ReduceNode):
            payload.data = {id(source): source for source in node.sources}
        elif isinstance(node, TaskNode):

            def number(source: StepNode) -> int:
                if id(source) not in positions:
                    positions[id(source)] = len(positions)
                    payload.data[id(source)] = source
                return positions[id(source)]

            positions: dict[int, int] = {}
            payload.args, payload.blobs = dump_arguments(
                node.args, node.kwargs, self.blobs, node.name, number, self._input
            )
        return [*payload.data.values(), *(other for other, _ in node.controls)]

    def _input(self, key: str | None) -> str:
        """Return the key of the blob with one input, or with all of them."""
        if key is None:
            self.uses_all_inputs = True
            return self._add_input("the inputs", self.inputs)
        if not isinstance(self.inputs, Mapping):
            raise BadWorkflowError(
                f"the workflow takes an input {key!r} by name, but was given one of type {type(self.inputs).__name__}: "
                f"use inputs={{{key!r}: ...}}"
            )
        if key not in self.inputs:
            given = ", ".join(map(str, sorted(self.inputs))) or "none"
            raise BadWorkflowError(f"the workflow needs an input {key!r}, which is missing; given: {given}")
        self.used_inputs.add(key)
        return self._add_input(f"input {key!r}", self.inputs[key])

    def _add_input(self, what: str, value: Any) -> str:
        try:
            return self.blobs.add_object(value, dumps)
        except Exception as error:  # whatever a user's __reduce__ raises
            raise BadWorkflowError(f"{what} can't be pickled: {type(error).__name__}: {error}") from error

    def _check_inputs(self) -> None:
        if self.uses_all_inputs:
            return
        if not isinstance(self.inputs, Mapping):
            raise BadWorkflowError("an input was given that no task of the workflow takes: bind InputNode() to one")
        unused = sorted(str(key) for key in self.inputs if key not in self.used_inputs)
        if unused:
            taken = ", ".join(sorted(self.used_inputs)) or "none"
            raise BadWorkflowError(
                f"no task of the workflow takes the input {', '.join(map(repr, unused))}; it takes: {taken}"
            )

    def _task(self, position: int, node: StepNode, name: str, index: dict[int, int]) -> TaskSpec:
        payload = self.payloads[id(node)]
        mode = node.options.checkpoint if node.options.checkpoint != "auto" else self.checkpoint
        function = ""
        if isinstance(node, TaskNode):
            function = self.blobs.add_object(node.task.function, lambda value: dump_function(value, name))
        kinds = node.options.retry_exceptions
        return TaskSpec(
            index=position,
            name=name,
            kind="reduce" if isinstance(node, ReduceNode) else "task",
            function=function,
            args=payload.args,
            data=tuple(index[key] for key in payload.data),
            after=_unique(index[id(other)] for other, committed in node.controls if not committed),
            barriers=_unique(index[id(other)] for other, committed in node.controls if committed),
            checkpoint=mode,
            max_retries=node.options.max_retries,
            retry=self.blobs.add_object(kinds, lambda value: self._dump_retry(value, name)) if kinds else "",
            op=node.op if isinstance(node, ReduceNode) else "",
            blobs=payload.blobs,
            # whether a failure is caught can depend on what else happens: on a crash, on how long something takes
            deterministic=node.options.deterministic and not node.options.catch_exceptions,
            external=node.options.external,
            idempotent=node.options.idempotent,
            rollback=self._rollback(node, name),
            timeout=node.options.timeout,
            memory=node.options.memory,
            catch_exceptions=node.options.catch_exceptions,
            retry_delay=node.options.retry_delay,
        )

    def _rollback(self, node: StepNode, name: str) -> str:
        function = node.options.rollback
        if function is None:
            return ""
        return self.blobs.add_object(function, lambda value: dump_function(value, f"{name} (rollback)"))

    @staticmethod
    def _dump_retry(kinds: Any, name: str) -> bytes:
        try:
            return dumps(kinds)
        except Exception as error:  # a class whose body holds what can't be pickled
            raise BadWorkflowError(f"retry_exceptions of task {name!r} can't be pickled: {error}") from error

    def _fingerprint(self, order: list[StepNode], tasks: tuple[TaskSpec, ...], index: dict[int, int]) -> str:
        def node_digest(value: Any) -> bytes | None:
            if isinstance(value, StepNode):
                return b"%d" % index[id(value)] if id(value) in index else b"foreign"
            if isinstance(value, (InputNode, InputItem)):
                return repr(value).encode()
            return None

        digest = Fingerprint(node_digest)
        digest.add(
            sorted(self.inputs.items(), key=lambda item: str(item[0]))
            if isinstance(self.inputs, Mapping)
            else self.inputs
        )
        for node, task in zip(order, tasks, strict=True):
            digest.add(
                (task.name, task.kind, task.data, task.after, task.barriers, task.checkpoint, task.max_retries, task.op)
            )
            digest.add((task.deterministic, task.external, task.idempotent))
            digest.add((task.timeout, task.memory, task.catch_exceptions, task.retry_delay))
            digest.add(node.options.retry_exceptions)
            digest.add(node.options.rollback)
            if isinstance(node, TaskNode):
                digest.add(node.task.function)
                try:
                    digest.add((node.args, node.kwargs))
                except RecursionError:
                    raise BadWorkflowError(f"an argument of task {task.name!r} is nested too deeply") from None
        return digest.hexdigest()


class _Payload:
    """What was pickled for a node."""

    __slots__ = ("args", "blobs", "data")

    def __init__(self) -> None:
        self.args = b""
        self.blobs: tuple[str, ...] = ()
        #: id → node, in the order of the numbers in `args`
        self.data: dict[int, StepNode] = {}


def unique_names(order: Iterable[StepNode]) -> list[str]:
    """Return a name for each node: its own, with ``_1``, ``_2``, … for the second and further ones of a name.

    The first of a name that was given explicitly gets just that, even where it looks like another's suffix.
    """
    nodes = list(order)
    names: list[str | None] = [None] * len(nodes)
    taken: set[str] = set()
    for position, node in enumerate(nodes):
        if node.options.name is not None and node.options.name not in taken:
            taken.add(node.options.name)
            names[position] = node.options.name
    following: dict[str, int] = {}
    for position, node in enumerate(nodes):
        if names[position] is not None:
            continue
        own = name = node.name
        while name in taken:
            following[own] = following.get(own, 0) + 1
            name = f"{own}_{following[own]}"
        taken.add(name)
        names[position] = name
    return [name for name in names if name is not None]


def user_sys_path() -> tuple[str, ...]:
    """Return the directories of `sys.path` that are the user's: all but those of Python and of installed packages."""
    entries = (os.path.abspath(entry) for entry in sys.path)
    return tuple(dict.fromkeys(entry for entry in entries if os.path.exists(entry) and not is_installed_path(entry)))


def _unique(indices: Iterable[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(indices))


def _check_barriers(tasks: tuple[TaskSpec, ...]) -> None:
    for task in tasks:
        for target in task.barriers:
            if tasks[target].checkpoint == "skip":
                raise IllegalAnnotationError(
                    f"task {task.name!r} waits for the commit of {tasks[target].name!r}, whose checkpoint is "
                    f"'skip', so it would wait for ever: use checkpoint='sync' or 'async' "
                    f"there, or .after(node) without .committed()"
                )
