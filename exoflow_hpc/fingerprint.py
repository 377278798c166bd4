"""Digests of values and functions that are the same in every process: no ids, hash order, line numbers or file names.

Pickles won't do: their bytes depend on which equal objects are one object, on the order of sets, and (cloudpickle) on
random
class ids. So values are walked. Functions and classes of installed packages count by name; those of users by what they
do.
"""

from __future__ import annotations

import copyreg
import enum
import hashlib
import os
import site
import struct
import sys
import sysconfig
import types
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["Fingerprint", "is_installed", "is_installed_path"]

_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, type(Ellipsis), type(NotImplemented)})
_CLASS_NOISE = frozenset(
    {
        "__dict__",
        "__weakref__",
        "__module__",
        "__doc__",
        "__firstlineno__",
        "__static_attributes__",
        "__abstractmethods__",
        "_abc_impl",
    }
)
_FIELDS_OF_CODE = (
    "co_argcount", "co_posonlyargcount", "co_kwonlyargcount", "co_flags", "co_name", "co_code", "co_names",
    "co_varnames", "co_freevars", "co_cellvars",
)  # fmt: skip


class Fingerprint:
    """A running digest: `add` values to it in a fixed order, then ask for `hexdigest`.

    node: digest of a DAG node that is found inside of a value, or None for what is not a node.
    """

    def __init__(self, node: Callable[[Any], bytes | None] = lambda value: None) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._node = node
        #: id → depth of what is being walked now, for values that refer to themselves
        self._open: dict[int, int] = {}
        #: id → (object, digest) of functions and classes
        self._known: dict[int, tuple[Any, bytes]] = {}

    def hexdigest(self) -> str:
        """Return 32 hexadecimal digits for all that was added so far."""
        return self._hash.hexdigest()

    def add(self, value: Any) -> None:
        """Take *value* into account: any value that can be pickled, with nodes and functions anywhere in it."""
        kind = type(value)
        if kind in _ATOMS:
            self._token(kind.__name__, _atom(value))
            return
        digest = self._node(value)
        if digest is not None:
            self._token("node", digest)
            return
        if id(value) in self._open:
            self._token("loop", str(len(self._open) - self._open[id(value)]).encode())
            return
        self._open[id(value)] = len(self._open)
        try:
            _WALKERS.get(kind, _walk_other)(self, value)
        finally:
            del self._open[id(value)]

    def digest(self, *values: Any) -> bytes:
        """Return the digest of *values* apart from the running one."""
        outer, self._hash = self._hash, hashlib.blake2b(digest_size=16)
        try:
            for value in values:
                self.add(value)
            return self._hash.digest()
        finally:
            self._hash = outer

    def add_once(self, value: Any, walk: Callable[[Fingerprint, Any], None]) -> None:
        """Take *value* into account with *walk*, which is called only the first time that this object comes along."""
        known = self._known.get(id(value))
        if known is None:
            outer, self._hash = self._hash, hashlib.blake2b(digest_size=16)
            try:
                walk(self, value)
                known = (value, self._hash.digest())
            finally:
                self._hash = outer
            self._known[id(value)] = known
        self._token("once", known[1])

    def _token(self, kind: str, data: bytes | memoryview) -> None:
        # lengths keep ("ab", "c") and ("a", "bc") apart
        self._hash.update(b"%s:%d:" % (kind.encode(), len(data)))
        self._hash.update(data)


def _atom(value: Any) -> bytes:
    kind = type(value)
    if kind is bytes:
        return bytes(value)
    if kind is str:
        return str(value).encode("utf-8", "surrogatepass")
    if kind is float:
        return struct.pack("<d", value)
    return (hex(value) if kind is int else repr(value)).encode()


def _walk_sequence(into: Fingerprint, value: Any) -> None:
    name = type(value).__name__
    if all(type(item) in _ATOMS for item in value) and len(value) > 8:
        try:
            into._token(
                f"{name} repr", repr(value).encode("utf-8", "surrogatepass")
            )  # one call for a long list of numbers
            return
        except ValueError:  # an int with more digits than Python is willing to print
            pass
    into._token(name, str(len(value)).encode())
    for item in value:
        into.add(item)


def _walk_dict(into: Fingerprint, value: dict[Any, Any]) -> None:
    into._token("dict", str(len(value)).encode())
    for key, item in value.items():  # in its order, which a task can see
        into.add(key)
        into.add(item)


def _walk_set(into: Fingerprint, value: Any) -> None:
    into._token(type(value).__name__, b"".join(sorted(into.digest(item) for item in value)))


def _walk_array(into: Fingerprint, value: np.ndarray[Any, Any]) -> None:
    into._token("ndarray", f"{value.dtype.descr if value.dtype.names else value.dtype.str} {value.shape}".encode())
    if value.dtype.hasobject:
        into.add(value.tolist())
    else:
        into._token("data", np.ascontiguousarray(value).reshape(-1).view(np.uint8).data if value.size else b"")


def _walk_function(into: Fingerprint, value: types.FunctionType) -> None:
    into.add_once(value, _walk_function_body)


def _walk_function_body(into: Fingerprint, value: types.FunctionType) -> None:
    if is_installed(value.__module__):
        into._token("function", f"{value.__module__}.{value.__qualname__}".encode())
        return
    into.add(value.__code__)
    into.add(value.__defaults__)
    into.add(value.__kwdefaults__)
    for cell in value.__closure__ or ():
        try:
            into.add(cell.cell_contents)
        except ValueError:
            into._token("cell", b"empty")
    for name in _global_names(value.__code__):
        if name not in value.__globals__:
            continue  # a builtin, or not there (yet): the name itself is in the code
        found = value.__globals__[name]
        into.add(found)
        if isinstance(found, types.ModuleType) and not is_installed(found.__name__):
            for attribute in sorted(set(value.__code__.co_names)):
                if attribute in vars(found):
                    into.add(vars(found)[attribute])


def _global_names(code: types.CodeType) -> list[str]:
    """Return all names that *code*, or code inside it, may look up among the globals, sorted."""
    names: set[str] = set()
    pending = [code]
    while pending:
        one = pending.pop()
        names.update(one.co_names)
        pending.extend(constant for constant in one.co_consts if isinstance(constant, types.CodeType))
    return sorted(names)


def _walk_code(into: Fingerprint, value: types.CodeType) -> None:
    for name in _FIELDS_OF_CODE:
        into.add(getattr(value, name))
    into.add(getattr(value, "co_exceptiontable", b""))
    into.add(value.co_consts)


def _walk_class(into: Fingerprint, value: type) -> None:
    into.add_once(value, _walk_class_body)


def _walk_class_body(into: Fingerprint, value: type) -> None:
    if is_installed(value.__module__):
        into._token("class", f"{value.__module__}.{value.__qualname__}".encode())
        return
    into._token("class", value.__qualname__.encode())
    for base in value.__bases__:
        into.add(base)
    for name, member in sorted(vars(value).items()):
        if name in _CLASS_NOISE:
            continue
        into._token("member", name.encode())
        into.add(member)


def _walk_wrapped(into: Fingerprint, value: Any) -> None:
    into._token(type(value).__name__, b"")
    into.add(value.__func__)


def _walk_property(into: Fingerprint, value: property) -> None:
    for part in (value.fget, value.fset, value.fdel):
        into.add(part)


def _walk_module(into: Fingerprint, value: types.ModuleType) -> None:
    into._token("module", value.__name__.encode())


def _walk_other(into: Fingerprint, value: Any) -> None:
    if isinstance(value, type):
        _walk_class(into, value)
    elif isinstance(value, enum.Enum):
        into.add((type(value), value.name))
    else:
        _walk_by_reduce(into, value)


def _walk_by_reduce(into: Fingerprint, value: Any) -> None:
    """Walk what pickle would be told; for what pickle can't do, only the type counts."""
    into._token("object", type(value).__qualname__.encode())
    reducer = copyreg.dispatch_table.get(type(value))
    try:
        parts = reducer(value) if reducer is not None else value.__reduce_ex__(4)
    except Exception:  # a lock, a socket, a generator, …: as a global of a function it may still be fine
        into.add(type(value))
        return
    if isinstance(parts, str):
        into._token("name", parts.encode())
        return
    # pieces 3 and 4 are iterators over a list's and a dict's items
    for position, part in enumerate(parts):
        into.add(list(part) if position >= 3 and part is not None and hasattr(part, "__next__") else part)


_WALKERS: dict[type, Callable[[Fingerprint, Any], None]] = {
    list: _walk_sequence,
    tuple: _walk_sequence,
    dict: _walk_dict,
    set: _walk_set,
    frozenset: _walk_set,
    np.ndarray: _walk_array,
    types.FunctionType: _walk_function,
    types.CodeType: _walk_code,
    type: _walk_class,
    staticmethod: _walk_wrapped,
    classmethod: _walk_wrapped,
    property: _walk_property,
    types.ModuleType: _walk_module,
}


def _installed_roots() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    roots = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    roots.update(site.getsitepackages())
    if site.ENABLE_USER_SITE:
        roots.add(site.getusersitepackages())
    return tuple(os.path.realpath(root) + os.sep for root in roots)


_ROOTS = _installed_roots()
_STDLIB_ZIP = f"python{sys.version_info[0]}{sys.version_info[1]}.zip"
_installed: dict[str, bool] = {}


def is_installed_path(path: str) -> bool:
    """Whether *path* lies where Python or installed packages live."""
    return (os.path.realpath(path) + os.sep).startswith(_ROOTS) or path.endswith(_STDLIB_ZIP)


def is_installed(module: str | None) -> bool:
    """Whether *module* belongs to Python, an installed package or this one, rather than to the user's program."""
    if module is None or module == "__main__":
        return False
    known = _installed.get(module)
    if known is None:
        found = sys.modules.get(module)
        file = getattr(found, "__file__", None)
        origin = getattr(getattr(found, "__spec__", None), "origin", None)
        known = (
            module.partition(".")[0] in ("exoflow_hpc", "hoplite_mpi")
            or origin in ("built-in", "frozen")
            or (file is not None and is_installed_path(file))
        )
        if found is not None:
            _installed[module] = known
    return known
