"""The checks of sources that `make lint` runs find what they look for."""

from __future__ import annotations

from pathlib import Path

import check_file_lengths
import check_root_imports
import pytest


def test_a_file_that_is_too_long_is_found(tmp_path: Path) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "long.h").write_text("//\n" * 501)
    (tmp_path / "csrc" / "right.h").write_text("//\n" * 500)
    assert check_file_lengths.too_long(tmp_path) == [(Path("csrc/long.h"), 501)]


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from ... import fuse", "fuse"),
        ("from ... import _C, report as r", "report"),
        ("from fused_resnet import *", "*"),
        ("import fused_resnet as fr", "import fused_resnet"),
        ("import fused_resnet.ops", "import fused_resnet.ops"),
        ("def f():\n    from ... import fuse", "fuse"),
        ("from ... import _C, ops", None),
        ("from fused_resnet.ops import checks", None),
        ("from .. import triton", None),
    ],
)
def test_an_import_of_the_root_is_found(tmp_path: Path, code: str, found: str | None) -> None:
    folder = tmp_path / "fused_resnet" / "backends" / "triton"
    for name in ("ops", "cli", "backends/triton"):
        (tmp_path / "fused_resnet" / name).mkdir(parents=True)
        (tmp_path / "fused_resnet" / name / "__init__.py").touch()
    (folder / "kernel.py").write_text(code)
    (tmp_path / "fused_resnet" / "cli" / "demo.py").write_text("import fused_resnet as fr")
    lines = check_root_imports.imports_of_root(tmp_path)
    place = f"fused_resnet/backends/triton/kernel.py:{code.count(chr(10)) + 1}"
    assert lines == ([f"{place}: {found}"] if found else [])
