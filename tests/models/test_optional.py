"""The errors of optional packages that are missing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fused_resnet.models import optional


def test_what_to_run_depends_on_where_the_package_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "fused_resnet" / "models" / "optional.py"
    file.parent.mkdir(parents=True)
    shutil.copy(optional.__file__, file)
    monkeypatch.setattr(optional, "__file__", str(file))
    monkeypatch.chdir(tmp_path)
    assert optional.install_line("train") == "pip install 'fused_resnet[train]'"
    (tmp_path / "setup.py").touch()
    expected = "pip install --no-build-isolation -e '.[train]'"
    assert optional.install_line("train") == expected
    assert str(optional.MissingPackageError("yaml", "train")) == (
        f"yaml is not installed; run: {expected}"
    )
