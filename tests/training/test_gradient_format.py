"""The memory formats of a training step: results and gradients have those of eager PyTorch."""

from __future__ import annotations

import itertools

import pytest
import torch
from networks import image
from torch import Tensor, nn

pytest.importorskip("torchvision", reason="torchvision's blocks are what is trained here")
from test_block_in_place import stem
from training_blocks import X, basic, bottleneck, pair


def layer() -> nn.Module:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU()).double().train()


def strides(model: nn.Module, x: Tensor, channels_last: bool) -> dict[str, tuple[int, ...]]:
    """Of the result, and of the gradients of a leaf and of a tensor computed from it."""
    leaf = x.detach().requires_grad_()
    source, found = 1 * leaf, {}
    source.register_hook(lambda g: found.update(source=g.stride()))
    y = model(source)
    g = image(*y.shape, seed=3)
    y.backward(g.contiguous(memory_format=torch.channels_last) if channels_last else g)
    weights = {k: p.grad.stride() for k, p in model.named_parameters()}
    return {**found, **weights, "y": y.stride(), "leaf": leaf.grad.stride()}


@pytest.mark.parametrize("make", [basic, lambda: basic(2), lambda: bottleneck(2), layer, stem])
def test_memory_formats_are_those_of_eager(make) -> None:
    for of_weights, of_x, of_g in itertools.product((False, True), repeat=3):
        eager, fused = pair(make())
        if of_weights:
            eager, fused = [m.to(memory_format=torch.channels_last) for m in (eager, fused)]
        x = image(*X)
        if of_x:
            x = x.contiguous(memory_format=torch.channels_last)
        assert strides(fused, x, of_g) == strides(eager, x, of_g), (of_weights, of_x, of_g)
