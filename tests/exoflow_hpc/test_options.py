from __future__ import annotations

from typing import Any

import pytest

from exoflow_hpc.dag import task
from exoflow_hpc.errors import IllegalAnnotationError
from exoflow_hpc.options import TaskOptions, make_options


def test_defaults_and_changes() -> None:
    options = make_options(
        TaskOptions(), {"name": "x", "checkpoint": "sync", "max_retries": 0, "retry_exceptions": True}
    )
    assert options == TaskOptions("x", "sync", 0, (Exception,))
    assert make_options(options, {"retry_exceptions": [OSError, KeyError]}).retry_exceptions == (OSError, KeyError)
    assert make_options(options, {"retry_exceptions": False}).retry_exceptions == ()
    assert make_options(options, {"name": None}).checkpoint == "sync"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"chekpoint": "sync"}, TypeError, "did you mean 'checkpoint'"),
        ({"zzz": 1}, TypeError, "there are"),
        ({"checkpoint": "never"}, ValueError, "none of 'sync'"),
        ({"checkpoint": True}, TypeError, "one of"),
        ({"max_retries": -1}, ValueError, "0 or more"),
        ({"max_retries": 1.0}, TypeError, "an int"),
        ({"max_retries": True}, TypeError, "an int"),
        ({"retry_exceptions": (OSError, "KeyError")}, TypeError, "'KeyError'"),
        ({"retry_exceptions": 3}, TypeError, "3 is not one"),
        ({"name": ""}, ValueError, "1 to 200"),
        ({"name": "a/b"}, ValueError, "no '/'"),
        ({"name": ".."}, ValueError, "not"),
        ({"name": "a b"}, ValueError, "white space"),
        ({"name": 3}, TypeError, "a str"),
        ({"deterministic": 1}, TypeError, "True or False"),
        ({"external": None}, TypeError, "True or False"),
        ({"idempotent": "yes"}, TypeError, "True or False"),
        ({"rollback": "undo"}, TypeError, "a function"),
        ({"rollback": lambda key: None}, TypeError, "can't be called as"),
        ({"timeout": 0}, ValueError, "above 0"),
        ({"timeout": float("nan")}, ValueError, "finite"),
        ({"timeout": float("inf")}, ValueError, "finite"),
        ({"timeout": "5"}, TypeError, "a number of seconds"),
        ({"timeout": True}, TypeError, "a number of seconds"),
        ({"retry_delay": -1}, ValueError, "0 or more"),
        ({"retry_delay": [1]}, TypeError, "a number of seconds"),
        ({"memory": 0}, ValueError, "more than 0"),
        ({"memory": -1}, ValueError, "more than 0"),
        ({"memory": 1.5}, TypeError, "a number of bytes"),
        ({"memory": True}, TypeError, "a number of bytes"),
        ({"memory": "lots"}, ValueError, "no size"),
        ({"memory": "2 GiBit"}, ValueError, "no size"),
        ({"memory": "0 MB"}, ValueError, "more than 0"),
        ({"memory": "99999999 TiB"}, ValueError, "than there can be"),
        ({"catch_exceptions": 1}, TypeError, "True or False"),
    ],
)
def test_wrong_options_are_refused_at_once(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        task(**changes)
    with pytest.raises(error, match=message):
        task(len).options(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_returns": 2},
        {"cpus": 2},
        {"gpus": 1},
        {"tags": ("big",)},
        {"ranks": 2},
        {"isolation": "inline"},
    ],
)
def test_what_is_not_enforced_yet_is_refused_and_not_ignored(changes: dict[str, Any]) -> None:
    with pytest.raises(IllegalAnnotationError, match=f"{next(iter(changes))}=.*not supported"):
        task(**changes)


def test_limits() -> None:
    options = make_options(TaskOptions(), {"timeout": 5, "retry_delay": 0, "memory": 1000, "catch_exceptions": True})
    assert (options.timeout, options.retry_delay, options.memory, options.catch_exceptions) == (5.0, 0.0, 1000, True)
    cleared = make_options(options, {"timeout": None, "retry_delay": None, "memory": None, "catch_exceptions": False})
    assert cleared == TaskOptions()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2 << 30),
        ("512 MiB", 512 << 20),
        ("1.5gib", 3 << 29),
        ("2 GB", 2 * 10**9),
        ("3k", 3000),
        ("7", 7),
        (" 10 B ", 10),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert make_options(TaskOptions(), {"memory": text}).memory == size


def test_asking_for_what_is_there_anyway_is_fine() -> None:
    neutral = {
        "deterministic": True,
        "external": False,
        "idempotent": False,
        "rollback": None,
        "num_returns": 1,
        "tags": (),
    }
    assert (
        make_options(TaskOptions(), {**neutral, "timeout": None, "cpus": 1, "gpus": 0, "isolation": "process"})
        == TaskOptions()
    )
