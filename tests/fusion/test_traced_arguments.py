"""Traced modules: arguments, several results, and conditions on shapes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import image
from torch import Tensor
from traced_modules import (
    TwoSides,
    Unit,
    check,
    fused_as,
    ready,
)

import fused_resnet as fr


class Many(TwoSides):
    """Optional arguments, several results."""

    def forward(self, x: Tensor, shortcut: Tensor | None = None, flag: bool = False):
        y = self.bn1(self.conv1(x))
        if shortcut is None:
            shortcut = self.bn2(self.conv2(x))
        y = F.relu(y + shortcut)
        return {"y": y, "shortcut": shortcut} if flag else (y, [shortcut, y.shape[1]])


def test_optional_arguments_and_several_results() -> None:
    model, x = ready(Many()), image(2, 4, 9, 7)
    fused = fr.fuse(model)
    y = model(x)[1][0] * 2
    for call in ({}, {"shortcut": y}, {"flag": True}, {"shortcut": y, "flag": True}):
        torch.testing.assert_close(fused(x, **call), model(x, **call))
        torch.testing.assert_close(fr.freeze(model)(x, **call), model(x, **call))
    torch.testing.assert_close(fused(x, y), model(x, y))


class Sized(Unit):
    """Checks the shape of its argument, as transformers' embeddings do."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 4:
            raise ValueError("expected 4 channels")
        if x.shape[2] > 20:
            x = x[:, :, :20]
        return self.act(self.bn(self.conv(x)))


def test_conditions_on_shapes_are_evaluated_at_every_call() -> None:
    model = ready(Sized())
    fused = check(model)
    assert fused_as(fused) == {"conv": "conv_bn_add_relu"}
    x = image(1, 4, 25, 7)
    fused = fr.fuse(model)
    torch.testing.assert_close(fused(x), model(x))
    torch.testing.assert_close(fr.freeze(model)(x), model(x))
    with pytest.raises(ValueError, match="4 channels"):
        fused(image(1, 3, 9, 7))
