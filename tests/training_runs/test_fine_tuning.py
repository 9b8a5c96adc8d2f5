"""From trained weights to a served file: torchvision's ResNet-18 on real images of ten classes."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
import tiny_data
import torch
import warm_process

import fused_resnet as fr
from fused_resnet.cli import main
from fused_resnet.training import batches, checkpoint, data, resumed
from fused_resnet.training.engine import started
from fused_resnet.training.steps import Inputs

models = pytest.importorskip("torchvision.models", reason="its ResNet-18 is what is fine-tuned")
pytest.importorskip("yaml", reason="a run writes RUN/recipe.yaml")

#: Images of the slice that are trained on and validated on, and the batch.
TRAIN, VAL, BATCH = 320, 200, 32

#: Runs the command, and kills itself after some training steps.
PROGRAM = """
import os, signal, sys
from fused_resnet import cli
from fused_resnet.training import run
step, left = run.train_step, int(sys.argv[1])
def counted(*arguments):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*arguments)
run.train_step = counted
sys.exit(cli.main(sys.argv[2:]))
"""


def part_of_the_slice(source: Path, target: Path) -> None:
    with np.load(source) as found:
        arrays = {"classes": found["classes"]}
        for part, count in (("train", TRAIN), ("test", VAL)):
            offsets = found[f"{part}_offsets"][: count + 1]
            arrays[f"{part}_offsets"] = offsets
            arrays[f"{part}_jpeg"] = found[f"{part}_jpeg"][: offsets[-1]]
            arrays[f"{part}_labels"] = found[f"{part}_labels"][:count]
    np.savez(target, **arrays)


@pytest.mark.slow
def test_killed_resumed_and_served(
    test_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """1000 classes' weights; the same bits after SIGKILL; the frozen file's own accuracy."""
    part_of_the_slice(test_data / "cifar10_slice.npz", tmp_path / "slice.npz")
    torch.save(models.resnet18().state_dict(), tmp_path / "trained.pth")
    options = f"--data {tmp_path / 'slice.npz'} --weights {tmp_path / 'trained.pth'} --device cpu"
    options += f" --recipe fine-tune --epochs 2 --batch {BATCH} --save-every 4"
    run = ["train", "resnet18", *options.split(), "--out"]
    for out, steps, code in (("straight", 0, 0), ("killed", 16, -signal.SIGKILL)):
        done = warm_process.run(["-c", PROGRAM, str(steps), *run, str(tmp_path / out)])
        assert done.returncode == code, done.stderr
    assert "The weights have 1000 classes and the data 10" in done.stderr
    killed = tmp_path / "killed"
    found = checkpoint.read(killed / "last")
    assert (found["epoch"], found["step"]) == (1, 2)
    assert main(["train", "--out", str(killed), "--resume"]) == 0
    best, following = capsys.readouterr().out.split("; next: ")
    tiny_data.same_bits(
        checkpoint.read(killed / "last"), checkpoint.read(tmp_path / "straight" / "last")
    )

    assert following.startswith("fused-resnet freeze resnet18 --weights")
    assert main(following.split()[1:]) == 0
    served = fr.load_frozen(killed / "served.safetensors")
    settings = resumed(killed)
    images = data.load(settings)
    right = 0
    with started(settings) as engine, torch.inference_mode():
        inputs = Inputs(settings, images, engine)
        sampler = batches.ValBatches(len(images.val), 50, 0, 1)
        for batch in batches.loader(images.val, sampler, 0):
            x, labels = inputs(batch)
            right += int((served(x).argmax(1) == labels).sum())
    assert f"best validation accuracy {right / VAL:.2%}" == best
