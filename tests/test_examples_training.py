"""The examples about training run as they are, and print what they should."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from pathlib import Path

import pytest
import warm_process

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

#: What each prints, as a pattern, and the packages that it needs.
PRINTED = {
    "activation_checkpointing": (r"the same loss with checkpointing: True", ["torchvision"]),
    "autocast": (r"bfloat16: loss [\d.]+\n.*float16: loss [\d.]+", ["torchvision"]),
    "compiled": (r"step 0: loss ([\d.]+)\nstep 1: loss [\d.]+", []),
    "ddp": (r"the same parameters in every process: True", ["torchvision"]),
    "ema": (r"loss of the average: [\d.]+", []),
    "fine_tune": (
        r"base, epoch 2: accuracy [\d.]+%\n(.*\n)+run, epoch 2: accuracy [\d.]+%\nbest accuracy",
        ["torchvision", "yaml", "matplotlib", "safetensors"],
    ),
    "lightning_module": (r"2 steps", ["lightning"]),
    "own_loop": (r"step 3: loss [\d.]+", ["torchvision"]),
    "transformers_trainer": (r"loss [\d.]+\n$", ["transformers", "accelerate"]),
}

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(
        not EXAMPLES.is_dir(), reason="the package is tested without its repository: no examples/"
    ),
]


def test_every_example_of_the_documentation_is_run() -> None:
    text = (EXAMPLES.parent / "docs" / "examples.md").read_text()
    section = text.partition("## Training")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)\.py`", section, re.MULTILINE)) == set(PRINTED)


@pytest.mark.parametrize("name", PRINTED)
def test_example(name: str, tmp_path: Path) -> None:
    pattern, packages = PRINTED[name]
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed, which examples/{name}.py needs")
    line = []
    if name == "ddp":
        line = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    root = str(EXAMPLES.parent)
    environment["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    done = warm_process.run([*line, str(EXAMPLES / f"{name}.py")], cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert re.search(pattern, done.stdout), done.stdout
    losses = [
        float(text) for text in re.findall(r"loss (?:of the average: )?([\d.]+)", done.stdout)
    ]
    assert all(0 < loss < 3 * math.log(10) for loss in losses), done.stdout
