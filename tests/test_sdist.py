"""The source distribution: it has every file of the repository, and its tests run."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import warm_process

ROOT = Path(__file__).resolve().parent.parent
#: What only a repository needs.
LEFT_OUT = (".github/", ".gitignore")

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="there is no list of its files"),
]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.split():  # a copy: an sdist is written through the source folder
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder / 'dist')!r})"
    done = warm_process.run(["-c", code], cwd=folder, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    (archive,) = (folder / "dist").iterdir()
    with tarfile.open(archive) as opened:
        opened.extraction_filter = getattr(tarfile, "data_filter", None)
        opened.extractall(folder / "unpacked")
    (root,) = (folder / "unpacked").iterdir()
    return root


def test_it_has_every_file(unpacked: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    wanted = [name for name in listed.stdout.split() if not name.startswith(LEFT_OUT)]
    assert len(wanted) > 500
    assert [name for name in wanted if (ROOT / name).exists() > (unpacked / name).exists()] == []


def test_its_tests_run(unpacked: Path) -> None:
    """Some of each kind, with the extension of this checkout in place of a build of minutes."""
    for library in (ROOT / "fused_resnet").glob("*.so"):
        shutil.copy2(library, unpacked / "fused_resnet")
    tests = ["tests/test_extension_stub.py", "tests/test_planted_bugs.py", "tests/nn"]
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", *tests]
    variables = {**os.environ, "PYTHONPATH": str(unpacked)}
    done = warm_process.run(arguments, cwd=unpacked, env=variables)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
