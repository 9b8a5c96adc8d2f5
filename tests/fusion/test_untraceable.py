"""Modules that cannot be traced: they are left unfused with a reason."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import image
from torch import Tensor, nn
from traced_modules import (
    Between,
    DropPath,
    Unit,
    ready,
    unfused_in,
)

import fused_resnet as fr

calls: list[int] = []


class WritesAttribute(Unit):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return super().forward(x)


class WritesGlobal(Unit):
    def forward(self, x: Tensor) -> Tensor:
        calls.append(1)
        return super().forward(x)


class Prints(Unit):
    def forward(self, x: Tensor) -> Tensor:
        print("called")
        return super().forward(x)


class NoGrad(Unit):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.bn(self.conv(x))
        return self.act(y) * x


class Decorated(Unit):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class RandomConstant(Unit):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.rand(1).to(x)


class OnValues(Unit):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


class Catches(Unit):
    def forward(self, x: Tensor) -> Tensor:
        try:
            return super().forward(x)
        except ValueError:
            return x


class GradMode(Unit):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if torch.is_grad_enabled() else y * 2


class ChangesList(Unit):
    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(1)
        return super().forward(x) * len(self.sizes)


UNTRACEABLE = {
    WritesAttribute: "writes",
    WritesGlobal: "global calls",
    Prints: "print",
    NoGrad: "with",
    Decorated: "torch",
    RandomConstant: "makes a tensor",
    OnValues: "values of a tensor",
    Catches: "exceptions",
    GradMode: "is_grad_enabled",
    ChangesList: "writes",
}


@pytest.mark.parametrize("cls", UNTRACEABLE, ids=lambda c: c.__name__)
def test_untraceable_modules_are_reported_with_the_reason(cls: type[nn.Module]) -> None:
    model = ready(cls())
    before = copy.deepcopy(vars(model))
    fused = fr.fuse(model)
    assert type(fused) is cls
    (why,) = unfused_in(fused).values()
    assert UNTRACEABLE[cls] in why
    assert vars(model).keys() == before.keys()
    x = image(2, 4, 9, 7)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    torch.testing.assert_close(fused(x), expected)


def test_tracing_does_not_change_the_model() -> None:
    model = ready(nn.Sequential(ChangesList(), Between(DropPath(0.5)))).train()
    model[1].middle.eval()
    fr.fuse(model)
    assert model[0].sizes == []
    assert [m.training for m in model[1].modules()] == [True, True, True, True, False]
    assert "__getattribute__" not in vars(nn.Module)
    fr.report(model)
    assert model[0].sizes == []
