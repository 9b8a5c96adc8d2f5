"""Small networks of torchvision, and the comparison of a fused model with its original."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import assert_same, randomize, results
from torch import Tensor, nn

import fused_resnet as fr

tv = pytest.importorskip("torchvision", reason="torchvision's networks are what is fused here")
from torchvision.models import resnet as tv_resnet  # noqa: E402


class Slim(tv_resnet.ResNet):
    """torchvision's ResNet, its stages an eighth as wide, to be quick in float64."""

    def _make_layer(self, block, planes, *args, **kwargs) -> nn.Sequential:
        return super()._make_layer(block, planes // 8, *args, **kwargs)

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.fc = nn.Linear(self.inplanes, 10)


def small(
    block: type[nn.Module] = tv_resnet.Bottleneck,
    layers: tuple[int, ...] = (1, 1, 1, 1),
    kind: type[nn.Module] = Slim,
    **kwargs,
) -> nn.Module:
    """The same network at every call, with random statistics, in float64 and eval mode."""
    torch.manual_seed(0)
    return randomize(kind(block, list(layers), **kwargs)).double().eval()


def assert_fused_equals_eager(model: nn.Module, x: Tensor, limit: float = 1e-9) -> nn.Module:
    """Compare one call in eval mode and two in training; returns the fused model."""
    untouched = copy.deepcopy(model)
    fused = fr.fuse(copy.deepcopy(model))
    assert_same(results(fused.eval(), x), results(untouched.eval(), x), limit)
    for _ in range(2):
        assert_same(results(fused.train(), x), results(untouched.train(), x), limit)
    return fused


class PostAdd(tv_resnet.BasicBlock):
    """Adds after the activation: not torchvision's block."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return y + (x if self.downsample is None else self.downsample(x))
