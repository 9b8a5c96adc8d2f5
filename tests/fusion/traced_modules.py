"""Modules that are traced, and comparisons of eager, fused and frozen models."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from networks import assert_same, image, randomize, results
from torch import Tensor, nn

import fused_resnet as fr


class Unit(nn.Module):
    """Convolution, batch norm and ReLU as children."""

    def __init__(self, channels: int = 4, **conv) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, **{"padding": 1, "bias": False, **conv})
        self.bn = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Residual(Unit):
    """``relu(bn(conv(x)) + x)``."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)) + x)


def ready(model: nn.Module) -> nn.Module:
    """The model with random weights and statistics, equal at every call; float64, eval mode."""
    g = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g) * 0.4
    return randomize(model).double().eval()


def check(model: nn.Module, *inputs: Tensor, frozen: bool = True) -> nn.Module:
    """Eager, fused and frozen agree in eval, eager and fused in two training steps."""
    inputs = inputs or (image(2, 4, 9, 7),)
    eager, fused = copy.deepcopy(model), fr.fuse(copy.deepcopy(model))
    assert_same(results(fused.eval(), *inputs), results(eager.eval(), *inputs))
    if frozen:
        with torch.no_grad():
            torch.testing.assert_close(
                fr.freeze(copy.deepcopy(model))(*inputs), eager(*inputs), rtol=1e-9, atol=1e-9
            )
    for _ in range(2):
        assert_same(results(fused.train(), *inputs), results(eager.train(), *inputs))
    return fused


def fused_as(model: nn.Module) -> dict[str, str]:
    return dict(fr.report(model).fused)


def unfused_in(model: nn.Module) -> dict[str, str]:
    return dict(fr.report(model).left)


class TwoSides(nn.Module):
    """``relu(bn(conv(x)) + bn(conv(x)))``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(4, 6, 1, 2), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        y += self.bn2(self.conv2(x))
        return F.relu(y)


class Stem(Unit):
    """With a max-pool."""

    def __init__(self) -> None:
        super().__init__(stride=2)
        self.pool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.act(self.bn(self.conv(x))))


class Between(Residual):
    """A module between the batch norm and the addition."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        y = self.middle(self.bn(self.conv(x)))
        return self.act(y + x)


class DropPath(nn.Module):
    """Drops whole images, and scales the others."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = torch.rand(x.shape[0], 1, 1, 1, dtype=x.dtype) >= self.rate
        return x * keep / (1 - self.rate)


class BlurPool(nn.Module):
    """Blurs by a fixed filter, reflected at the borders."""

    def __init__(self) -> None:
        super().__init__()
        row = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("filter", (row[:, None] * row).expand(4, 1, 3, 3).clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.filter, groups=4)


def both() -> tuple[nn.Module, nn.Module]:
    return ready(Between(nn.Identity())), fr.fuse(ready(Between(nn.Identity())))


def close(fused: nn.Module, model: nn.Module) -> None:
    x = image(2, 4, 9, 7)
    assert_same(results(fused, x), results(model, x))
