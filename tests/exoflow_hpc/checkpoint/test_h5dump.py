"""The HDF5 group's own tool reads what is written, of every kind."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exoflow_hpc import serialize
from exoflow_hpc.checkpoint.group import Item, write_group
from exoflow_hpc.checkpoint.known import Known
from exoflow_hpc.checksums import LEAF

pytestmark = pytest.mark.skipif(shutil.which("h5dump") is None, reason="needs h5dump (Debian: hdf5-tools)")

NAME = "00000001-0.0-000000000.h5"


def dump(path: Path, *options: str) -> str:
    """Return what h5dump says; it may neither fail nor complain."""
    done = subprocess.run(["h5dump", *options, path.name], cwd=path.parent, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout[-2000:]
    return done.stdout


def write(directory: Path, *values: Any, name: str = NAME, known: Known | None = None, direct: int = 0) -> Path:
    items = []
    for index, value in enumerate(values):
        plan = serialize.pack(value)
        items.append(Item(f"task[{index}]", f"x{index}", plan.meta, plan.to_bytes()))
    write_group(directory, name, items, known, direct)
    return directory / name


def numbers(text: str) -> list[float]:
    """Return the numbers of a DATA block printed with -y."""
    block = text[text.index("DATA {") + 6 : text.index("}", text.index("DATA {"))]
    return [float(word) for word in block.replace(",", " ").split()]


@pytest.mark.parametrize(
    ("dtype", "type_name"),
    [
        ("f8", "H5T_IEEE_F64LE"),
        (">f8", "H5T_IEEE_F64BE"),
        ("f4", "H5T_IEEE_F32LE"),
        ("f2", "16-bit little-endian floating-point"),
        ("i1", "H5T_STD_I8LE"),
        ("u2", "H5T_STD_U16LE"),
        (">i4", "H5T_STD_I32BE"),
        ("u8", "H5T_STD_U64LE"),
    ],
)
def test_numbers(tmp_path: Path, dtype: str, type_name: str) -> None:
    array = np.arange(6).astype(dtype).reshape(2, 3)
    text = dump(write(tmp_path, array), "-y", "-d", "/x0")
    assert type_name in text
    assert "( 2, 3 )" in text
    assert numbers(text) == [0, 1, 2, 3, 4, 5]
    assert '"task[0]"' in text


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([True, False]), "TRUE, FALSE"),
        (np.array([1 + 2j]), "2"),
        (np.array([b"abc", b"de"]), '"abc"'),
        (np.zeros(2, [("mass", "f8"), ("place", "i4", (3,))]), '"mass"'),
        (np.array(["2020-01-01"], "M8[D]"), "H5T_STD_U8LE"),
        (np.array(["text"]), "H5T_STD_U8LE"),
        (np.zeros((0, 3)), "( 0, 3 )"),
        (np.float64(2.5), "pickle"),
        (np.array(7.25), "7.25"),
        (np.zeros((1,) * 33), "H5T_STD_U8LE"),
        (np.arange(4, dtype="u1").view("V2"), "OPAQUE"),
    ],
    ids=["bool", "complex", "bytes", "struct", "date", "str", "empty", "scalar", "0d", "33d", "void"],
)
def test_other_arrays(tmp_path: Path, array: Any, expected: str) -> None:
    assert expected in dump(write(tmp_path, array))


def test_containers(tmp_path: Path) -> None:
    text = dump(write(tmp_path, {"weights": np.arange(3.0), "name": "x"}, [1, "two"], b"plain bytes", None))
    assert text.count('DATASET "pickle"') == 4
    assert text.count('DATASET "buffer_0"') == 1
    assert text.count('ATTRIBUTE "exoflow_checksum"') == 4


def test_a_large_array_by_direct_io(tmp_path: Path) -> None:
    array = np.arange(300_000, dtype=np.int32)
    path = write(tmp_path, array, direct=1 << 20)
    assert numbers(dump(path, "-y", "-d", "/x0", "-s", "299998", "-c", "2")) == [299_998, 299_999]


def test_linked_buffers(tmp_path: Path) -> None:
    """They are followed, with the data where they are."""
    known = Known()
    write(tmp_path, [np.full(LEAF, 1, np.uint8), np.full(LEAF, 2, np.uint8), 1], known=known)
    path = write(
        tmp_path, [np.full(LEAF, 3, np.uint8), np.full(LEAF, 2, np.uint8), 2], name=f"2{NAME[1:]}", known=known
    )
    assert path.stat().st_size > 2 * LEAF, "the names are of another epoch: nothing is linked"
    path = write(
        tmp_path, [np.full(LEAF, 3, np.uint8), np.full(LEAF, 2, np.uint8), 2], name=f"{NAME[:-4]}1.h5", known=known
    )
    assert path.stat().st_size < 2 * LEAF
    text = dump(path, "-H")
    assert 'EXTERNAL_LINK "buffer_1"' in text
    assert f'TARGETFILE "{NAME}"' in text
    assert numbers(dump(path, "-y", "-d", "/x0/buffer_1", "-s", str(LEAF - 2), "-c", "2")) == [2, 2]
    assert numbers(dump(path, "-y", "-d", "/x0/buffer_0", "-c", "2")) == [3, 3]
