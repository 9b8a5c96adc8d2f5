"""Residual blocks for the tests of training, in float64, and their unfused twins."""

from __future__ import annotations

import copy
from typing import Any

import torch
from networks import assert_same, image, randomize, results
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import fused_resnet as fr


def projection(c: int, k: int, stride: int, norm: Any = nn.BatchNorm2d) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c, k, 1, stride, bias=False), norm(k))


def basic(stride: int = 1, norm: Any = nn.BatchNorm2d) -> nn.Module:
    """8 channels to 8, or to 12 through a projection."""
    torch.manual_seed(0)
    k = 8 if stride == 1 else 12
    side = None if stride == 1 else projection(8, k, stride, norm)
    return randomize(BasicBlock(8, k, stride, side, norm_layer=norm)).double().train()


def bottleneck(stride: int = 1, norm: Any = nn.BatchNorm2d, **kwargs: Any) -> nn.Module:
    """8 channels to 8, or to 16 through a projection."""
    torch.manual_seed(0)
    planes = 2 if stride == 1 else 4
    side = None if stride == 1 else projection(8, 16, stride, norm)
    block = Bottleneck(8, planes, stride, side, norm_layer=norm, **kwargs)
    return randomize(block).double().train()


#: Odd sizes, so that a stride of 2 ends inside the map.
X = (3, 8, 9, 7)


def pair(block: nn.Module, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """The unfused block and a fused one with parameters and buffers of its own."""
    return block, fr.fuse(copy.deepcopy(block), **settings)


def assert_trains_the_same(block: nn.Module, x: Tensor | None = None, **settings: Any) -> nn.Module:
    """Two steps: outputs, gradients and buffers within 1e-9. Returns the fused block."""
    eager, fused = pair(block, **settings)
    x = image(*X) if x is None else x
    for _ in range(2):
        assert_same(results(fused, x), results(eager, x))
    return fused


def assert_one_unit(model: nn.Module, count: int = 1) -> None:
    """Whether that many blocks run whole, and no other."""
    assert [reason for _, reason in fr.report(model).blocks] == [""] * count


def state(model: nn.Module) -> dict[str, Tensor]:
    """Gradients and buffers."""
    gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    return {**gradients, **{k: b.clone() for k, b in model.named_buffers()}}
