"""An extension that is missing or can't be loaded: one line that says what to do."""

from __future__ import annotations

import importlib.machinery
import os
import shutil
from pathlib import Path

import pytest
import warm_process

import fused_resnet as fr
from fused_resnet import _extension


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The package's Python files alone, as in a fresh clone."""
    package = Path(fr.__file__).parent
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(package, tmp_path / "clone" / "fused_resnet", ignore=ignored)
    (tmp_path / "clone" / "setup.py").touch()
    return tmp_path / "clone"


def import_error(folder: Path, *more: Path) -> str:
    """The last line of what Python prints for ``import fused_resnet`` in a folder."""
    path = "".join(f"sys.path.append({str(entry)!r});" for entry in more)
    # An editable installation would find its own extension for the clone's package.
    plain = "sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in repr(f)];"
    if not (Path(fr.__file__).parents[1] / "setup.py").exists():  # and so would an installed wheel
        plain += f"sys.path.remove({str(Path(fr.__file__).parents[1])!r});"
    script = f"import sys; {plain} {path} import fused_resnet"
    done = warm_process.run(["-c", script], cwd=folder, env={"PATH": os.defpath})
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: fused_resnet: ")
    return last


def test_an_extension_that_is_not_built(clone: Path, tmp_path: Path) -> None:
    built = tmp_path / "site" / "fused_resnet"
    assert f"not built in the source folder {clone}; build it: pip install" in import_error(clone)
    built.mkdir(parents=True)
    (built / "_C.cpython-311-x86_64-linux-gnu.so").touch()
    line = import_error(clone, built.parent)
    assert (
        f"Python finds it before the installed package in {built.parent}; start Python in" in line
    )
    (clone / "fused_resnet" / "_C.cpython-27-x86_64-linux-gnu.so").touch()
    assert "was built for another Python (_C.cpython-27" in import_error(clone)


def test_an_extension_that_is_damaged(clone: Path) -> None:
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (clone / "fused_resnet" / f"_C{suffix}").write_bytes(b"\x7fELF")
    assert "its file is damaged or of another processor" in import_error(clone)
    (clone / "fused_resnet" / f"_C{suffix}").write_text("no library" * 100)
    assert "its file is damaged or of another processor" in import_error(clone)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            "/x/libfused_resnet.so: undefined symbol: torch_from_blob",
            "torch 2.11 and newer, and this is",
        ),
        ("libfused_resnet.so: cannot open shared object file: No such file", "has no libfused_res"),
        ("libcudart.so.13: cannot open shared object file: No such file or directory",
         "it needs libcudart.so.13 of CUDA 13, and torch 9.0 has CUDA 12.8; build it again"),
        ("libc10_cuda.so: cannot open shared object file: No such file", "has CUDA 12.8"),
        ("libgomp.so.1: cannot open shared object file: No such file", "has no libgomp.so.1"),
        ("/lib/libstdc++.so.6: version `GLIBCXX_3.4.32' not found (required by x)", "newer Linux"),
        ("something else\nand more", "can't be loaded: something else; build it again"),
    ],
)  # fmt: skip
def test_what_errors_of_the_loader_mean(error: str, says: str) -> None:
    line = _extension.explain(error, "9.0", "12.8")
    assert says in line
    assert "\n" not in line
    assert line.startswith("fused_resnet: the extension can't be loaded: ")
    assert "no CUDA" in _extension.explain("libcudart.so.13: cannot open shared object", "9", None)
