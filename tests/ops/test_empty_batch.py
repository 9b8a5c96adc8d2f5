"""An empty batch in training updates no statistics; all gradients are zero, as in PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fused_resnet as fr

FORMATS = [torch.contiguous_format, torch.channels_last]


class Residual(nn.Module):
    """A residual block: the shortcut is added behind the second batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(h)) + x)


def step(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Everything that a training step leaves: gradients and buffers."""
    leaf = x.clone().requires_grad_()
    model(leaf).sum().backward()
    return [leaf.grad, *(p.grad for p in model.parameters()), *model.buffers()]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_training_step(backend, fmt, momentum):
    model = Residual().train()
    for bn in (model.bn1, model.bn2):
        bn.momentum = momentum
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
    fused = fr.fuse(copy.deepcopy(model))
    x = torch.empty(0, 6, 8, 8).contiguous(memory_format=fmt)
    with fr.use_backend(backend):
        for mine, eager in zip(step(fused, x), step(model, x), strict=True):
            torch.testing.assert_close(mine, eager, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(0, 6, 8, 8), (3, 6, 0, 8)], ids=str)
def test_the_operator_returns_finite_statistics(shape, dtype):
    x = torch.empty(shape, dtype=dtype)
    operators = torch.ops.fused_resnet
    y, mean, var = operators.bn_add_relu(x, None, None, None, None, None, True, 1e-5, True)
    results = operators.bn_add_relu_backward(x, x, y, None, mean, var, True, 1e-5, True, False)
    assert y.shape == results[0].shape == x.shape
    for t in (mean, var, *results[1:3]):
        assert t.shape == (6,)
        assert not t.any()
