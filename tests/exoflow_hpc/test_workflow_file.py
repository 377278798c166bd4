from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exoflow_hpc.compile import compile_workflow
from exoflow_hpc.workflow_file import BadWorkflowError, load, parse_inputs, split_target

ROOT = Path(__file__).parents[2]
HEAD = "import exoflow_hpc.dag as ef\n@ef.task\ndef f(x): return x\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(text: str) -> str:
        (tmp_path / "wf.py").write_text(text)
        return str(tmp_path / "wf.py")

    return write


def test_the_node_comes_back(write: Callable[[str], str]) -> None:
    path = write(
        HEAD + "def workflow(n=3): return f.options(name=f'n{n}').bind(n)\ndef other(**inputs): return f.bind(inputs)\n"
    )
    assert load(path).name == "n3"
    assert load(path, {"n": 4}).name == "n4"
    assert load(Path(path)).name == "n3"
    assert load(path + ":other", {"q": 1}).name == "f"
    assert not (Path(path).parent / "__pycache__").exists()


def test_a_file_that_was_changed_is_read_again(write: Callable[[str], str]) -> None:
    for name in ("a", "b", "c"):
        assert load(write(HEAD + f"def workflow(): return f.options(name='{name}').bind(1)\n")).name == name


def test_a_name_with_a_colon_is_a_file_if_there_is_one(tmp_path: Path) -> None:
    path = tmp_path / "a:b"
    path.write_text("")
    assert split_target(path) == (str(path), "workflow")


@pytest.mark.parametrize(
    ("text", "inputs", "message"),
    [
        ("", {}, r"has no function workflow\(\): its functions are: none"),
        (HEAD + "def workfow(): pass\n", {}, "did you mean .*wf.py:workfow"),
        (HEAD + "workflow = 3\n", {}, "not a function but of type int"),
        (HEAD + "workflow = f\n", {}, "remove its @task"),
        (
            HEAD + "def workflow(): f.bind(1)\n",
            {},
            r"what workflow\(\) in .* has to be a node .* None: is there a `return` missing",
        ),
        (HEAD + "def workflow(): return 3\n", {}, "type int"),
        (HEAD + "def workflow(): return f\n", {}, r"the task 'f' itself: bind its arguments, f\.bind"),
        (HEAD + "async def workflow(): return f.bind(1)\n", {}, "remove its async"),
        (
            HEAD + "def workflow(a, b, c=1): return f.bind(1)\n",
            {"b": 1, "z": 2},
            "missing: a; unexpected: z. It takes: a, b, c .default 1",
        ),
        (HEAD + "def workflow(): return f.bind(1)\n", {"z": 2}, "unexpected: z. It takes: none"),
    ],
)
def test_a_file_that_is_no_workflow(
    write: Callable[[str], str], text: str, inputs: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadWorkflowError, match=message):
        load(write(text), inputs)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (
            "def deep():\n    return 1 / 0\ndeep()\n",
            ["while it was imported", "line 3", "line 2, in deep", "ZeroDivisionError"],
        ),
        ("def broken(:\n", ["while it was imported", "line 1", "SyntaxError"]),
        ("import no_such_module_at_all\n", ["while it was imported", "line 1", "ModuleNotFoundError"]),
        ("raise SystemExit(3)\n", ["while it was imported", "SystemExit: 3"]),
        (
            HEAD + "def workflow(): return f.bind()\n",
            ["raised", "line 4, in workflow", "TypeError: task 'f' can't be bound"],
        ),
        (
            HEAD + "def workflow():\n    return ef.task(num_returns=2)(f)\n",
            ["line 5, in workflow", "IllegalAnnotationError"],
        ),
    ],
)
def test_the_traceback_is_the_users(write: Callable[[str], str], text: str, lines: list[str]) -> None:
    path = write(text)
    before, known = list(sys.path), sys.modules.get("exoflow_workflow_wf")
    with pytest.raises(BadWorkflowError) as caught:
        load(path)
    message = str(caught.value)
    assert all(line in message for line in lines), message
    assert message.count("Traceback") <= 1
    assert f"{ROOT / 'exoflow_hpc'}{os.sep}" not in message
    assert "importlib" not in message
    if "imported" in message:
        assert sys.path == before
        assert sys.modules.get("exoflow_workflow_wf") is known, "a file that failed leaves no module"


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadWorkflowError, match=r"no workflow file .*no\.py"):
        load(tmp_path / "no.py")
    with pytest.raises(BadWorkflowError, match="no workflow file"):
        load(f"{tmp_path / 'no.py'}:main")
    with pytest.raises(BadWorkflowError, match="a directory"):
        load(tmp_path)
    (tmp_path / "wf.py").write_text("")
    with pytest.raises(BadWorkflowError, match="after the colon"):
        load(f"{tmp_path / 'wf.py'}:")


def test_a_worker_needs_the_helpers_but_not_the_file(write: Callable[[str], str], tmp_path: Path) -> None:
    (tmp_path / "helper_beside.py").write_text("def triple(x): return 3 * x\n")
    path = write(
        "import exoflow_hpc.dag as ef\nfrom helper_beside import triple\nimport helper_beside\n"
        "class Box:\n    def __init__(self, x): self.x = x\n"
        "def local(x): return Box(triple(x.x))\n"
        "@ef.task\ndef f(x): return helper_beside.triple(local(x).x)\n"
        "def workflow(): return f.bind(Box(2))\n"
    )
    spec = compile_workflow(load(path))
    assert spec.sys_path[0] == str(tmp_path)
    (tmp_path / "spec").write_bytes(spec.to_bytes())
    (tmp_path / "wf.py").unlink()
    program = (
        "import sys\nfrom exoflow_hpc.spec import WorkflowSpec\n"
        "spec = WorkflowSpec.from_bytes(open(sys.argv[1], 'rb').read())\n"
        "sys.path[:0] = spec.sys_path\n"
        "args, kwargs = spec.tasks[0].arguments(None, spec.blob)\nprint(spec.function(0)(*args, **kwargs))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "spec"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
    )
    assert done.stdout.strip() == "18", done.stderr


def test_a_change_in_a_helper_changes_the_fingerprint(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom exoflow_hpc.workflow_file import load\nfrom exoflow_hpc.compile import compile_workflow\n"
        "print(compile_workflow(load(sys.argv[1])).fingerprint)\n"
    )
    prints = []
    for factor in (3, 3, 4):
        directory = tmp_path / str(len(prints))
        directory.mkdir()
        (directory / "helper.py").write_text(f"def scale(x): return {factor} * x\n")
        (directory / "wf.py").write_text(
            HEAD.replace("return x", "return helper.scale(x)") + "import helper\ndef workflow(): return f.bind(1)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, directory / "wf.py"],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        prints.append(done.stdout)
    assert prints[0] == prints[1] != prints[2]


def test_inputs_of_a_command_line() -> None:
    given = ["n=3", 'l=[1, "a"]', "s=text", "e=", "eq=a=b", "t=true", "q='x'", 'j="x"']
    assert parse_inputs(given) == {
        "n": 3,
        "l": [1, "a"],
        "s": "text",
        "e": "",
        "eq": "a=b",
        "t": True,
        "q": "'x'",
        "j": "x",
    }
    for wrong, message in (
        (["n"], "KEY=VALUE"),
        (["=3"], "KEY=VALUE"),
        (["a b=3"], "Python name"),
        (["n=1", "n=2"], "twice"),
    ):
        with pytest.raises(BadWorkflowError, match=message):
            parse_inputs(wrong)
