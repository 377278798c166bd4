"""Stores for the tests on live ranks: opening one is collective, so all tests share two."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from hoplite_mpi import Config, ObjectID

if TYPE_CHECKING:
    from hoplite_mpi.store import ObjectStore

#: strictly inside the deadline of a test, so that a rank without the others says what it waited for
PATIENCE = 40.0


def _open_store(apart: bool, **settings: float | str | None) -> ObjectStore:
    """Open a store; *apart*: with each rank on a node of its own, so that bytes really travel."""
    import hoplite_mpi as hm

    node = f"node{os.environ.get('PMI_RANK') or os.environ.get('OMPI_COMM_WORLD_RANK') or 0}" if apart else None
    with pytest.MonkeyPatch.context() as patch:
        if node is None:
            patch.delenv("HOPLITE_NODE", raising=False)
        else:
            patch.setenv("HOPLITE_NODE", node)
        config = Config(**{"default_timeout": PATIENCE, **settings})  # type: ignore[arg-type]
        return hm.init(config=config)


@pytest.fixture(scope="session")
def _shared_store() -> Iterator[ObjectStore]:
    with _open_store(False) as store:
        yield store


@pytest.fixture(scope="session")
def _apart_store() -> Iterator[ObjectStore]:
    with _open_store(True) as store:
        yield store


def _leave_together(store: ObjectStore, test: str) -> None:
    """Wait for the others: not by `barrier`, whose calls a test that failed on one rank would have left out of step."""
    store.put(b"", ObjectID.from_name(f"{test} is over/{store.rank}"))
    end = time.monotonic() + PATIENCE
    # who has left after the last test has taken its objects along
    while store.wait(over := [ObjectID.from_name(f"{test} is over/{r}") for r in store.ranks], len(over), timeout=0.5)[
        1
    ]:
        assert time.monotonic() < end, (
            f"only ranks {store.ranks} are left, and not all of them have come to the end of {test}"
        )


@pytest.fixture
def open_store() -> Callable[..., ObjectStore]:
    """Return what opens a store of this test's own: ``open_store(apart, **settings)``, on all ranks."""
    return _open_store


@pytest.fixture
def shared_store(_shared_store: ObjectStore, request: pytest.FixtureRequest) -> Iterator[ObjectStore]:
    """A store whose ranks are on one node. All ranks leave a test together."""
    yield _shared_store
    _leave_together(_shared_store, request.node.nodeid)


@pytest.fixture
def apart_store(_apart_store: ObjectStore, request: pytest.FixtureRequest) -> Iterator[ObjectStore]:
    """A store each of whose ranks is on a node of its own. All ranks leave a test together."""
    yield _apart_store
    _leave_together(_apart_store, request.node.nodeid)


@pytest.fixture(params=["shared", "apart"])
def store(request: pytest.FixtureRequest) -> ObjectStore:
    """Both kinds of store, one after the other."""
    return request.getfixturevalue(f"{request.param}_store")  # type: ignore[no-any-return]


@pytest.fixture
def name(request: pytest.FixtureRequest) -> Callable[[object], ObjectID]:
    """Names of objects that are the same on all ranks and belong to this test alone."""
    return lambda what="": ObjectID.from_name(f"{request.node.nodeid}/{what}")
