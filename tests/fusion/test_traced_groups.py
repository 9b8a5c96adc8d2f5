"""Traced modules: which groups are found, and that results do not change."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import assert_same, image, results
from torch import Tensor, nn
from traced_modules import (
    Between,
    BlurPool,
    DropPath,
    Residual,
    Stem,
    TwoSides,
    Unit,
    check,
    fused_as,
    ready,
    unfused_in,
)

import fused_resnet as fr
from fused_resnet.backends.activation import Activation


def test_keys_paths_parameters_and_classes_are_unchanged() -> None:
    model = ready(nn.ModuleDict({"a": Unit(), "b": Residual()})["b"])
    fused = fr.fuse(model)
    assert list(fused.state_dict()) == list(model.state_dict())
    assert fused.get_submodule("conv").weight is model.conv.weight
    assert isinstance(fused, Residual)
    assert fused_as(fused) == {"conv": "conv_bn_add_relu"}


RELUS = {
    "module": "self.act(self.bn(self.conv(x)))",
    "functional": "F.relu(self.bn(self.conv(x)))",
    "functional in place": "F.relu(self.bn(self.conv(x)), inplace=True)",
    "torch": "torch.relu(self.bn(self.conv(x)))",
    "torch in place": "torch.relu_(self.bn(self.conv(x)))",
    "method": "self.bn(self.conv(x)).relu()",
    "method in place": "self.bn(self.conv(x)).relu_()",
}


@pytest.mark.parametrize("form", RELUS)
def test_every_form_of_relu(form: str) -> None:
    fused = check(ready(written(RELUS[form])))
    (group,) = fused.fused_groups()
    assert (group.operation, group.activation) == ("conv_bn_add_relu", Activation.RELU)
    assert unfused_in(fused) == {}


def written(expression: str, base: type[nn.Module] = Unit) -> nn.Module:
    """A module whose forward is this code."""
    namespace = {"torch": torch, "F": F, "base": base}
    lines = expression.splitlines()
    body = [*lines[:-1], f"return {lines[-1]}"]
    source = "class Model(base):\n    def forward(self, x):\n" + "".join(
        f"        {line}\n" for line in body
    )
    exec(source, namespace)
    return namespace["Model"]()


ADDITIONS = {
    "operator": "y = self.bn(self.conv(x))\nself.act(y + x)",
    "operator, other order": "y = self.bn(self.conv(x))\nself.act(x + y)",
    "in place": "y = self.bn(self.conv(x))\ny += x\nself.act(y)",
    "method": "self.act(self.bn(self.conv(x)).add(x))",
    "method in place": "self.act(self.bn(self.conv(x)).add_(x))",
    "torch.add": "self.act(torch.add(self.bn(self.conv(x)), x))",
    "no activation": "self.bn(self.conv(x)) + x",
}


@pytest.mark.parametrize("form", ADDITIONS)
def test_every_form_of_addition(form: str) -> None:
    model = ready(written(ADDITIONS[form]))
    fused = check(model)
    assert fused_as(fused) == {"conv": "conv_bn_add_relu"}
    calls: list[bool] = []
    original = fr.ops.conv_bn_add_relu

    def counted(*args, **kwargs):
        calls.append(kwargs["residual"] is not None)
        return original(*args, **kwargs)

    fr.ops.conv_bn_add_relu = counted
    try:
        fused(image(2, 4, 9, 7))
    finally:
        fr.ops.conv_bn_add_relu = original
    assert calls == [True], "the addition is part of the operation"


OTHERS = {
    "scaled": "0.5 * self.bn(self.conv(x)) + x",
    "alpha": "torch.add(self.bn(self.conv(x)), x, alpha=2)",
    "subtraction": "self.act(self.bn(self.conv(x)) - x)",
    "after the activation": "self.act(self.bn(self.conv(x))) + x",
    "itself twice": "y = self.bn(self.conv(x))\nself.act(y + y)",
    "a number": "self.act(self.bn(self.conv(x)) + 1.5)",
    "broadcast": "self.act(self.bn(self.conv(x)) + x.mean((2, 3), keepdim=True))",
    "clamp": "self.bn(self.conv(x)).clamp_min(0)",
    "result kept": "y = self.bn(self.conv(x))\nz = self.act(y + x)\nz + self.conv(y)",
    "pre-activation": "self.conv(self.act(self.bn(x))) + x",
    "convolution twice": "self.act(self.bn(self.conv(self.conv(x))))",
    "batch norm twice": "self.act(self.bn(self.conv(self.bn(x))))",
    "unit twice": "y = self.act(self.bn(self.conv(x)))\nself.act(self.bn(self.conv(y)) + x)",
    "two batch norms": "y = self.conv(x)\nself.act(self.bn(y)) + self.bn(y)",
    "shape": "y = self.act(self.bn(self.conv(x)))\nn, c, h, w = y.shape\ny.reshape(n, c, h * w)",
}


@pytest.mark.parametrize("form", OTHERS)
def test_other_expressions_give_the_same_results(form: str) -> None:
    check(ready(written(OTHERS[form])))


def test_conv_relu_bn_is_not_fused() -> None:
    fused = check(ready(written("self.bn(self.act(self.conv(x)))")))
    assert fused_as(fused) == {}
    assert unfused_in(fused) == {"bn": "no convolution before it, and no ReLU or addition after it"}
    fused = check(ready(written("self.bn(F.max_pool2d(self.conv(x), 2))")))
    assert fused_as(fused) == {}


def test_clamp_is_not_relu() -> None:
    """Its gradient at zero differs from ReLU's in some versions of PyTorch."""
    model = ready(written("self.bn(self.conv(x)).clamp_min(0)"))
    nn.init.zeros_(model.bn.weight)
    nn.init.zeros_(model.bn.bias)
    (group,) = check(model).fused_groups()
    assert not group.activation


def test_a_residual_that_is_itself_conv_bn() -> None:
    fused = check(ready(TwoSides()))
    assert fused_as(fused) == {"conv1": "conv_bn_add_relu", "conv2": "conv_bn_add_relu"}


def test_the_stem_with_its_pool() -> None:
    assert fused_as(check(ready(Stem()), image(2, 4, 17, 15))) == {"conv": "conv_bn_relu_maxpool"}


class PreActivation(nn.Module):
    """BN -> ReLU -> convolution, and BN -> add -> ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(F.relu(self.bn1(x)))
        return F.relu(self.bn2(y * 2) + x)


def test_batch_norm_without_a_convolution() -> None:
    assert fused_as(check(ready(PreActivation()))) == {"bn1": "bn_add_relu", "bn2": "bn_add_relu"}


class Excitation(nn.Module):
    """Squeeze and excite."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()


MIDDLES = {
    "identity": (nn.Identity, True),
    "squeeze and excite": (Excitation, False),
    "blur-pool": (BlurPool, False),
    "drop-path at rate 0": (lambda: DropPath(0.0), True),
    "dropout": (lambda: nn.Dropout(0.0), False),
    "another activation": (nn.SiLU, False),
}


@pytest.mark.parametrize("name", MIDDLES)
def test_modules_inside_a_group(name: str) -> None:
    middle, joined = MIDDLES[name]
    model = ready(Between(middle()))
    fused = check(model)
    assert fused_as(fused) == {"conv": "conv_bn_add_relu"}
    assert fr.report(fused).left == []
    (group,) = fused.fused_groups()
    assert bool(group.activation) is joined


def test_drop_path_draws_the_same_random_numbers() -> None:
    model = ready(Between(DropPath(0.5)))
    fused = fr.fuse(model)
    x = image(8, 4, 9, 7)
    torch.testing.assert_close(fused(x), model(x))
    model.train(), fused.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(7)
    expected = results(model, x)
    model.load_state_dict(before)
    torch.manual_seed(7)
    assert_same(results(fused, x), expected)


CONVOLUTIONS = {
    "reflect": {"padding_mode": "reflect"},
    "circular": {"padding_mode": "circular"},
    "same": {"padding": "same", "dilation": 2},
    "valid": {"padding": "valid"},
    "oblong": {"kernel_size": (3, 1), "padding": (1, 0)},
    "bias, stride, groups": {"bias": True, "stride": 2, "groups": 2},
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_settings_of_the_convolution(name: str) -> None:
    settings = dict(CONVOLUTIONS[name])
    kernel = settings.pop("kernel_size", 3)
    model = Unit(**settings)
    model.conv = nn.Conv2d(4, 4, kernel, **{"padding": 1, "bias": False, **settings})
    fused = check(ready(model))
    operation = "bn_add_relu" if name in ("reflect", "circular") else "conv_bn_add_relu"
    assert operation in fused_as(fused).values()


NORMS = {
    "eps and momentum": lambda: nn.BatchNorm2d(4, eps=1e-3, momentum=0.3),
    "no affine": lambda: nn.BatchNorm2d(4, affine=False),
    "no statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "average": lambda: nn.BatchNorm2d(4, momentum=None),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "instance norm": lambda: nn.InstanceNorm2d(4, affine=True),
}


@pytest.mark.parametrize("name", NORMS)
def test_settings_and_classes_of_normalisation(name: str) -> None:
    model = Residual()
    model.bn = NORMS[name]()
    fused = check(ready(model))
    assert bool(fused_as(fused)) is (name not in ("group norm", "instance norm"))


class Centred(nn.BatchNorm2d):
    """An unknown subclass."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_unknown_subclasses_are_not_fused() -> None:
    model = Residual()
    model.bn = Centred(4)
    fused = check(ready(model))
    assert unfused_in(fused) == {"bn": "Centred is not a plain BatchNorm2d"}


def test_other_activations_are_called() -> None:
    model = Unit()
    model.act = nn.SiLU(inplace=True)
    fused = check(ready(model))
    (group,) = fused.fused_groups()
    assert (group.operation, group.activation) == ("conv_bn_add_relu", Activation.NONE)
