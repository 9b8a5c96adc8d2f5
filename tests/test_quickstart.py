"""README's installation and examples, line by line, as a new user runs them in a fresh clone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="there is no repository to clone"),
]


def blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_readme_from_top_to_bottom(tmp_path: Path) -> None:
    """Without a network: pip finds what it would download among this environment's packages."""
    clone, empty = tmp_path / "clone", tmp_path / "empty"
    empty.mkdir()
    run = ["git", "clone", "--quiet", str(ROOT), str(clone)]
    subprocess.run(run, check=True)
    (install,) = (block for block in blocks("sh") if "pip install" in block)
    first, rest = install.split("\n", 1)
    assert "venv" in first
    packages = sysconfig.get_path("purelib")
    site = "$(python -c 'import sysconfig; print(sysconfig.get_path(\"purelib\"))')"
    script = f"set -e\n{first}\necho {packages} > {site}/packages.pth\n"
    # Up to Python 3.11 a new environment has an old setuptools, which pip would replace now.
    script += f"pip uninstall --quiet --yes setuptools 2>&1\n{rest}\n"
    for number, code in enumerate(blocks("python")):
        (tmp_path / f"example{number}.py").write_text(code)
        script += f"cd {empty} && python {tmp_path}/example{number}.py && cd -\n"
    # In the clone itself, whose folder Python searches first.
    script += "python -c 'import fused_resnet; print(fused_resnet.__file__)'\n"
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PIP_NO_INDEX": "1",
        # The slowest kernels compile in a fifth of the time, and CUDA's take the most.
        "FUSED_RESNET_ISAS": "portable",
        "FUSED_RESNET_CUDA": "0",
        "OMP_NUM_THREADS": "2",
    }
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        ["bash", "-c", script], cwd=clone, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.rstrip().endswith(str(clone / "fused_resnet" / "__init__.py"))
