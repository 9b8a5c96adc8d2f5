"""Training ResNet-18 on crops of a photograph: fused and unfused walk the same path.

Training amplifies rounding: a ReLU or a max-pool that falls the other way once changes everything
after it. So the sharp comparison is in float64, where 8 steps leave 1e-13, and float32 is held to
the noise that PyTorch itself has, measured as the distance between three unfused runs: one thread,
two threads, and float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_resnet as fr

STEPS, BATCH, SIZE = 8, 8, 48


@pytest.fixture(scope="module")
def batches() -> list[tuple[Tensor, Tensor]]:
    """Crops of the photograph that matplotlib ships; the label is the quadrant they are from."""
    cbook = pytest.importorskip("matplotlib.cbook", reason="matplotlib ships the photograph")
    pil = pytest.importorskip("PIL.Image", reason="the photograph is a JPEG")
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        pixels = np.asarray(pil.open(file).convert("RGB"))
    photo = torch.from_numpy(pixels.copy()).permute(2, 0, 1).double() / 255
    _, height, width = photo.shape
    g = torch.Generator().manual_seed(0)
    result = []
    for _ in range(STEPS):
        top = torch.randint(0, height - SIZE, (BATCH,), generator=g)
        left = torch.randint(0, width - SIZE, (BATCH,), generator=g)
        crops = [photo[:, t : t + SIZE, x : x + SIZE] for t, x in zip(top, left, strict=True)]
        quadrant = 2 * (top + SIZE // 2 > height // 2) + (left + SIZE // 2 > width // 2).long()
        result.append(((torch.stack(crops) - 0.45) / 0.225, quadrant))
    return result


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def train(
    batches: list[tuple[Tensor, Tensor]], fused: bool, threads: int, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of every step, and the state after the last one, always from the same seed."""
    models = pytest.importorskip("torchvision.models", reason="torchvision's ResNet-18 is trained")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model: nn.Module = models.resnet18(num_classes=4, zero_init_residual=True)
    model = model.to(dtype, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003, momentum=0.9, weight_decay=1e-4)
    runs = fr.fuse(model) if fused else model  # the optimizer is the unfused model's
    losses = []
    for x, labels in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(runs(x.to(dtype, memory_format=torch.channels_last)), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64), model.state_dict()


def test_loss_curve_stays_within_pytorchs_own_noise(
    batches: list[tuple[Tensor, Tensor]],
) -> None:
    exact, exact_state = train(batches, False, 1, torch.float64)
    fused_exact, fused_state = train(batches, True, 1, torch.float64)
    torch.testing.assert_close(fused_exact, exact, rtol=1e-9, atol=1e-9)
    for key, value in exact_state.items():
        torch.testing.assert_close(fused_state[key], value, rtol=1e-7, atol=1e-9, msg=key)

    one, _ = train(batches, False, 1, torch.float32)
    two, _ = train(batches, False, 2, torch.float32)
    fused, _ = train(batches, True, 2, torch.float32)
    noise = torch.stack([(one - two).abs(), (one - exact).abs(), (two - exact).abs()]).amax(0)
    for other in (one, two, exact):
        distance = (fused - other).abs()
        assert distance[0] < 1e-5
        assert distance.max() <= 2 * noise.max() + 1e-5
        assert distance.median() <= 2 * noise.median() + 1e-5
