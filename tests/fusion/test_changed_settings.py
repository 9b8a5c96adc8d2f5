"""Settings that are assigned after ``fuse``: results and errors are those of the unfused module."""

from __future__ import annotations

import copy

import pytest
import torch.nn.functional as F
from networks import assert_same, image, results
from torch import Tensor, nn
from traced_modules import Stem, Unit, fused_as, ready, unfused_in

import fused_resnet as fr


class Block(Unit):
    """A residual block, whose own convolution has no other name than the one in front of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn2(self.conv2(super().forward(x))) + x)


def outcome(model: nn.Module) -> dict[str, Tensor] | tuple[type, str]:
    try:
        return results(model, image(2, 4, 9, 7))
    except Exception as error:
        return type(error), str(error)


def assert_as_eager(eager: nn.Module, fused: nn.Module) -> None:
    for training in (True, False):
        got, expected = outcome(fused.train(training)), outcome(eager.train(training))
        if isinstance(got, tuple) or isinstance(expected, tuple):
            assert got == expected
        else:
            assert_same(got, expected)


#: The layer, its setting, and the value: other types, and values that no constructor takes.
SETTINGS = [
    ("conv", "stride", 2.0),
    ("conv", "stride", (2.0, 2.0)),
    ("conv", "stride", 1),
    ("conv", "stride", True),
    ("conv", "stride", (1,)),
    ("conv", "stride", [1, 1]),
    ("conv", "padding", 1),
    ("conv", "padding", (1, 1.0)),
    ("conv", "padding", (1, -1)),
    ("conv", "dilation", 0),
    ("conv", "dilation", (True, True)),
    ("conv", "groups", 1.0),
    ("conv", "groups", 0),
    ("bn", "eps", "1e-5"),
    ("bn", "eps", None),
    ("bn", "momentum", "0.1"),
    ("bn", "momentum", True),
    ("bn", "running_mean", None),
    ("bn", "running_var", None),
    ("pool", "kernel_size", True),
    ("pool", "stride", None),
    ("pool", "stride", (2.0, 2)),
    ("pool", "padding", 1.0),
    ("pool", "dilation", 1.0),
]


@pytest.mark.parametrize(("layer", "setting", "value"), SETTINGS)
def test_a_setting_of_another_type_is_pytorchs(layer, setting, value) -> None:
    for make in [Stem] if layer == "pool" else [Unit, Block, Stem]:
        eager = ready(make())
        fused = fr.fuse(copy.deepcopy(eager))
        for model in (eager, fused):
            setattr(getattr(model, layer), setting, value)
        assert_as_eager(eager, fused)


def test_running_statistics_that_require_a_gradient_are_pytorchs_error() -> None:
    eager = ready(Unit())
    fused = fr.fuse(copy.deepcopy(eager))
    for model in (eager, fused):
        model.bn.running_mean.requires_grad_()
    assert_as_eager(eager, fused)
    assert unfused_in(fused)["conv"] == "running statistics that require a gradient"


def test_the_report_names_the_setting() -> None:
    fused = fr.fuse(ready(Unit()))
    fused.conv.stride = 2.0
    assert unfused_in(fused)["conv"] == "stride=2.0 is no pair of positive integers"
    fused.conv.stride = (2, 2)
    assert fused_as(fused) == {"conv": "conv_bn_add_relu"}


@pytest.mark.parametrize(("setting", "value"), [("padding", 1.0), ("stride", None)])
@pytest.mark.parametrize("pool", [nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1)])
def test_a_frozen_model_calls_a_pool_with_such_a_setting(pool, setting, value) -> None:
    eager = ready(Stem())
    eager.pool = copy.deepcopy(pool)
    setattr(eager.pool, setting, value)
    frozen = fr.freeze(copy.deepcopy(eager))
    outcomes = []
    for model in (eager, frozen):
        try:
            outcomes.append(model(image(2, 4, 9, 7)).detach().shape)
        except TypeError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


class Reads(Unit):
    """Reads settings of its own, and takes one as an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.size, self.sides = 2, (1, 1, 0, 0)

    def forward(self, x: Tensor, step: int = 1) -> Tensor:
        return F.avg_pool2d(F.pad(super().forward(x), self.sides), self.size, step)


@pytest.mark.parametrize(
    ("name", "value"), [("size", 2.0), ("size", True), ("sides", (1.0, 1, 0, 0)), ("sides", [2, 1])]
)
def test_an_attribute_that_is_equal_but_of_another_type(name, value) -> None:
    eager = ready(Reads())
    fused = fr.fuse(copy.deepcopy(eager))
    assert fused_as(fused) == {"conv": "conv_bn_add_relu"}
    assert_as_eager(eager, fused)
    for model in (eager, fused):
        setattr(model, name, value)
    assert_as_eager(eager, fused)


def test_an_argument_that_is_equal_to_its_default_but_of_another_type() -> None:
    eager = ready(Reads())
    fused = fr.fuse(copy.deepcopy(eager))
    x = image(2, 4, 9, 7)
    for step in (1.0, True):
        for model in (eager, fused):
            with pytest.raises(TypeError, match="avg_pool2d"):
                model(x, step)
