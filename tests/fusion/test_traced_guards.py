"""Changes of a module after it was fused: guards notice them, results follow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from traced_modules import (
    Residual,
    both,
    check,
    close,
    fused_as,
    ready,
    unfused_in,
)

import fused_resnet as fr


@pytest.mark.parametrize("child", ["conv", "bn", "act", "middle", ""])
def test_hooks_on_any_child_of_a_group(child: str) -> None:
    model, fused = both()
    seen: list[list[Tensor]] = [[], []]
    for target, values in zip((model, fused), seen, strict=True):
        target.get_submodule(child).register_forward_hook(lambda m, a, y, v=values: v.append(y))
    close(fused, model)
    torch.testing.assert_close(seen[1], seen[0])
    assert len(seen[0]) == 1
    if child:
        assert any("hook" in why for why in unfused_in(fused).values())


CHANGES = {
    "redilated": lambda m: (
        setattr(m.conv, "dilation", (2, 2)),
        setattr(m.conv, "padding", (2, 2)),
    ),
    "weight norm": lambda m: torch.nn.utils.parametrizations.weight_norm(m.conv),
    "old weight norm": lambda m: torch.nn.utils.weight_norm(m.conv),
    "batch norm in training alone": lambda m: m.bn.train(),
    "batch norm of one image": lambda m: setattr(m.bn, "track_running_stats", False),
    "frozen parameters": lambda m: m.conv.requires_grad_(False),
    "frozen batch norm": lambda m: m.bn.requires_grad_(False),
    "identity became something": lambda m: setattr(m, "middle", nn.Sigmoid()),
    "activation became another": lambda m: setattr(m, "act", nn.Tanh()),
    "batch norm became another": lambda m: setattr(m, "bn", nn.Sequential(m.bn, nn.Tanh())),
    "convolution became a chain": lambda m: setattr(m, "conv", nn.Sequential(m.conv)),
    "a child more": lambda m: setattr(m, "extra", nn.Linear(1, 1).double()),
    "a forward of its own": lambda m: setattr(m, "forward", lambda x: x * 2),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_fusing_take_effect(change: str) -> None:
    model, fused = both()
    CHANGES[change](model)
    CHANGES[change](fused)
    close(fused, model)


class Reads(Residual):
    """A forward that reads its own attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.skip, self.scale, self.names = True, 1.0, ["act"]

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        if self.skip:
            y = y + x * self.scale
        return self.act(y) if "act" in self.names else y


def test_attributes_that_a_forward_reads_are_checked_at_every_call() -> None:
    for change in (
        lambda m: None,
        lambda m: setattr(m, "skip", False),
        lambda m: setattr(m, "scale", 3.0),
        lambda m: m.names.clear(),
    ):
        model, fused = ready(Reads()), fr.fuse(ready(Reads()))
        assert fused_as(fused) == {"conv": "conv_bn_add_relu"}
        change(model)
        change(fused)
        close(fused, model)


def test_partial_train_and_eval() -> None:
    model, fused = both()
    for m in (model, fused):
        m.train()
        m.bn.eval()
    close(fused, model)


class Modes(Residual):
    """Another forward in training."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return self.act(y + x) if self.training else self.act(y)


def test_both_modes_are_fused() -> None:
    fused = check(ready(Modes()))
    assert fused_as(fused.train()) == fused_as(fused.eval()) == {"conv": "conv_bn_add_relu"}
