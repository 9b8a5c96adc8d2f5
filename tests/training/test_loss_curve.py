"""The loss of a ResNet-18 on real images, fused and unfused.

Two runs of one network that round differently part after some dozen steps, whatever rounds them: so
PyTorch's own run on another number of threads says how far apart two right ones may be.
"""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerances import RATIO
from torch import Tensor, nn
from torch.nn import functional

import fused_resnet as fr

torchvision = pytest.importorskip("torchvision", reason="its ResNet-18 is what is trained here")

pytestmark = pytest.mark.slow

STEPS, BATCH, WINDOW = 200, 16, 20
SEEDS = (0, 1)


@pytest.fixture(scope="module")
def images(test_data: Path) -> tuple[Tensor, Tensor]:
    """1,600 images, about normal, and their labels."""
    pil = pytest.importorskip("PIL.Image", reason="the images are JPEG")
    with np.load(test_data / "cifar10_slice.npz") as data:
        jpeg, offsets, labels = (data[f"train_{k}"] for k in ("jpeg", "offsets", "labels"))
    pairs = list(itertools.pairwise(offsets[: STEPS * BATCH // 2 + 1]))
    pixels = np.stack([np.asarray(pil.open(io.BytesIO(jpeg[a:b].tobytes()))) for a, b in pairs])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 64 - 2
    return x, torch.from_numpy(labels[: len(x)]).long()


def losses(images: tuple[Tensor, Tensor], seed: int, threads: int, fused: bool) -> Tensor:
    """Means over windows of steps."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    model: nn.Module = torchvision.models.resnet18(num_classes=10).train()
    model = model.to(memory_format=torch.channels_last)
    if fused:
        model = fr.fuse(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.002, momentum=0.9)
    x, labels = images
    found = []
    for at in torch.randint(len(x), (STEPS, BATCH)):
        batch = x[at].contiguous(memory_format=torch.channels_last)
        loss = functional.cross_entropy(model(batch), labels[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found).view(-1, WINDOW).mean(1)


def distance(a: Tensor, b: Tensor) -> float:
    """Mean distance of two curves."""
    return (a - b).abs().mean().item()


def test_the_loss_falls_as_unfused(images: tuple[Tensor, Tensor]) -> None:
    """Distances of the fused curve to the nearer unfused one, and of those to each other."""
    spread, ours = [], []
    for seed in SEEDS:
        eager, other = (losses(images, seed, threads, False) for threads in (1, 2))
        fused = losses(images, seed, 1, True)
        spread.append(distance(eager, other))
        ours.append(min(distance(fused, eager), distance(fused, other)))
        assert fused[-1] < 0.85 * fused[0]
    assert max(ours) <= RATIO * max(spread), f"fused {ours}, unfused {spread}"
