"""What a user builds a workflow from: tasks, nodes, inputs, control edges.

Building runs nothing and copies nothing; `compile_workflow` turns what was built into a `WorkflowSpec`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TypeVar, overload

from .errors import ExoFlowError
from .options import TaskOptions, make_options

__all__ = [
    "REDUCE_OPS",
    "BadWorkflowError",
    "Committed",
    "DAGNode",
    "InputItem",
    "InputNode",
    "ReduceNode",
    "StepNode",
    "Task",
    "TaskNode",
    "reduce",
    "require_step",
    "task",
]

_Step = TypeVar("_Step", bound="StepNode")

#: operations of `reduce`
REDUCE_OPS = ("sum", "prod", "min", "max")


class BadWorkflowError(ExoFlowError, ValueError):
    """What was given is not a workflow that can be run: *your* file, DAG, argument or input. Nothing has been run."""


class Task:
    """A function that can be a step of a workflow. Called directly it is still just that function."""

    #: the user's function, undecorated
    function: Callable[..., Any]
    task_options: TaskOptions
    #: what arguments it takes, once known; False if that can't be known, as for some built-ins
    _signature: inspect.Signature | bool | None = None

    def __init__(self, function: Callable[..., Any], options: TaskOptions) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.task_options = options

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def bind(self, *args: Any, **kwargs: Any) -> TaskNode:
        """Return a node that calls the function; nodes among the arguments, at any depth, stand for their outputs.

        TypeError at once if the function does not take such arguments.
        """
        if self._signature is None:
            try:
                self._signature = inspect.signature(self.function)
            except (TypeError, ValueError):
                self._signature = False
        if isinstance(self._signature, inspect.Signature):
            try:
                self._signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(
                    f"task {self.name!r} can't be bound: {error}; it is {self.name}{self._signature}"
                ) from None
        return TaskNode(self, args, kwargs)

    def options(self, **changes: Any) -> Task:
        """Return the same task with other options; errors as from `task`."""
        return Task(self.function, make_options(self.task_options, changes))

    @property
    def name(self) -> str:
        """Name of the task, before a suffix makes it unique in its workflow."""
        return self.task_options.name or function_name(self.function)

    def __getstate__(self) -> dict[str, Any]:
        # as state, not as constructor arguments: a recursive task refers to itself through its function's globals
        return {"function": self.function, "task_options": self.task_options}

    def __repr__(self) -> str:
        return f"<task {self.name}>"


class DAGNode:
    """Anything that stands for a value of a run."""

    __slots__ = ()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{self!r} is a node of a workflow, not a value, and can't be pickled: give it to .bind() as an argument; "
            "a task can't capture one; to go on with one, it returns exoflow_hpc.continuation(node)"
        )


class StepNode(DAGNode):
    """A node that does something: its output can be waited for, committed, and asked for by name."""

    __slots__ = ("__weakref__", "controls", "options")

    def __init__(self, options: TaskOptions) -> None:
        self.options = options
        #: (node, whether to wait for its commit) for each control edge, in the order in which they were added
        self.controls: list[tuple[StepNode, bool]] = []

    @property
    def name(self) -> str:
        """Name of the task, before a suffix makes it unique in its workflow."""
        raise NotImplementedError

    def after(self: _Step, *others: StepNode | Committed) -> _Step:
        """Start only after *others* have finished (``other.committed()``: are durable as well). Returns this node."""
        for other in others:
            if isinstance(other, Committed):
                self.controls.append((other.node, True))
            elif isinstance(other, StepNode):
                self.controls.append((other, False))
            else:
                raise TypeError(f".after() of {self!r} takes tasks' nodes or node.committed(), not {other!r}")
        return self

    def committed(self) -> Committed:
        """Return what `.after()` takes to wait until this node's output is durable."""
        return Committed(self)

    def __repr__(self) -> str:
        return f"<node {self.name}>"


class Committed:
    """The moment when a node's output is durable; for `.after()`."""

    __slots__ = ("node",)

    def __init__(self, node: StepNode) -> None:
        self.node = node

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self!r} can be given to .after() only, it has no value")

    def __repr__(self) -> str:
        return f"{self.node!r}.committed()"


class TaskNode(StepNode):
    """One call of a task in a workflow."""

    __slots__ = ("args", "kwargs", "task")

    def __init__(self, task: Task, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__(task.task_options)
        self.task = task
        self.args = args
        self.kwargs = kwargs

    @property
    def name(self) -> str:
        return self.task.name


class ReduceNode(StepNode):
    """The elementwise combination of the array outputs of other nodes, done by the ranks with a Hoplite reduce."""

    __slots__ = ("op", "sources")

    def __init__(self, sources: tuple[StepNode, ...], op: str, options: TaskOptions) -> None:
        super().__init__(options)
        self.sources = sources
        self.op = op

    @property
    def name(self) -> str:
        return self.options.name or "reduce"


class InputItem(DAGNode):
    """One named input of the run."""

    __slots__ = ("key",)

    def __init__(self, key: str) -> None:
        self.key = key

    def __repr__(self) -> str:
        return f"InputNode()[{self.key!r}]"


class InputNode(DAGNode):
    """The inputs of a run: ``InputNode()["x"]`` or ``InputNode().x`` is one by name, a bare one all that was given."""

    __slots__ = ()

    def __getitem__(self, key: str) -> InputItem:
        if not isinstance(key, str):
            raise TypeError(f"inputs have names: InputNode()[{key!r}] should be a str")
        return InputItem(key)

    def __getattr__(self, key: str) -> InputItem:
        # copy, pickle and IDEs probe for private names: those are never inputs (use ["_x"] for one that is)
        if key.startswith("_"):
            raise AttributeError(key)
        return InputItem(key)

    def __iter__(self) -> NoReturn:
        raise TypeError("the inputs of a run are not known yet: take them by name, InputNode()['x']")

    def __repr__(self) -> str:
        return "InputNode()"


@overload
def task(function: Callable[..., Any], /) -> Task: ...
@overload
def task(**options: Any) -> Callable[[Callable[..., Any]], Task]: ...
def task(function: Callable[..., Any] | None = None, /, **options: Any) -> Task | Callable[[Callable[..., Any]], Task]:
    """Make a task of a function: ``@task`` or ``@task(checkpoint="sync", ...)``, options as in `TaskOptions`.

    TypeError and ValueError for wrong options, IllegalAnnotationError for those that this version does not support.
    """
    checked = make_options(TaskOptions(), options)

    def decorate(function: Callable[..., Any]) -> Task:
        if isinstance(function, Task):
            raise TypeError(f"{function!r} is a task already: use .options() to change it")
        if inspect.isclass(function) or not callable(function):
            raise TypeError(f"@task goes on a function, not on {function!r}")
        if any(
            check(function)
            for check in (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
        ):
            raise TypeError(
                f"@task can't run the coroutine or generator function {function_name(function)!r}: return the value"
            )
        return Task(function, checked)

    return decorate if function is None else decorate(function)


def reduce(nodes: Iterable[StepNode], op: Any = "sum", name: str | None = None, checkpoint: str = "auto") -> ReduceNode:
    """Return a node that adds up the array outputs of *nodes*, all of one shape and dtype (Hoplite, section 4.3).

    op: ``"sum"``, ``"prod"``, ``"min"``, ``"max"``, or an operation of hoplite_mpi of such a name. It runs on the ranks
    and takes no worker. TypeError for what is not a task's node, ValueError for none or for one given twice.
    """
    sources = tuple(nodes)
    for source in sources:
        if not isinstance(source, StepNode):
            raise TypeError(f"reduce() takes a list of tasks' nodes; {source!r} is not one")
        if source.options.catch_exceptions:
            raise TypeError(f"reduce() adds arrays; {source!r} has catch_exceptions, so its output is (value, error)")
    if not sources:
        raise ValueError("reduce() of no nodes has no value: give it at least one")
    if len({id(source) for source in sources}) != len(sources):
        raise ValueError("reduce() was given a node twice, but counts each object once: bind a second task for it")
    text = str(op if isinstance(op, str) else getattr(op, "name", op)).lower()
    if text not in REDUCE_OPS:
        raise ValueError(f"reduce() with op={op!r}: there are {', '.join(REDUCE_OPS)}")
    return ReduceNode(sources, text, make_options(TaskOptions(), {"name": name, "checkpoint": checkpoint}))


def function_name(function: Callable[..., Any]) -> str:
    """Return a name for a task that runs *function*: one that `check_name` takes."""
    name = getattr(function, "__name__", None) or type(getattr(function, "func", function)).__name__
    plain = "".join("_" if one.isspace() or one == "/" or not one.isprintable() else one for one in str(name))
    plain = plain[:200].strip("<>")
    return "task" if plain in ("", ".", "..") else plain


def require_step(node: Any, what: str) -> StepNode:
    """Return *node* if a workflow can be run for it; BadWorkflowError, which begins with *what*, otherwise."""
    if isinstance(node, StepNode):
        return node
    if isinstance(node, Task):
        hint = f"the task {node.name!r} itself: bind its arguments, {node.name}.bind(...)"
    elif isinstance(node, DAGNode):
        hint = f"{node!r}, which runs nothing: bind a task to it"
    elif isinstance(node, (list, tuple, dict)):
        hint = f"a {type(node).__name__}: bind a task that takes what is in it, and return that task's node"
    elif node is None:
        hint = "None: is there a `return` missing?"
    else:
        hint = f"an object of type {type(node).__name__}"
    raise BadWorkflowError(f"{what} has to be a node of a DAG, such as f.bind(1), but is {hint}")
