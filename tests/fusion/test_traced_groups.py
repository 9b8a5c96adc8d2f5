"""The general swapper: what a module means survives, one test for each thing it may mean."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from networks import assert_same, image, randomize, results
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.inference.frozen_conv import FrozenConv


class Unit(nn.Module):
    """Convolution, batch norm and ReLU as children, and whatever follows."""

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
    """Random weights and statistics, the same at every call, float64, eval."""
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


def left_of(model: nn.Module) -> dict[str, str]:
    return dict(fr.report(model).left)


# Groups


def test_keys_paths_parameters_and_classes_stay() -> None:
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
    assert (group.operation, group.relu) == ("conv_bn_add_relu", True)
    assert left_of(fused) == {}


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
def test_what_is_no_group_keeps_its_meaning(form: str) -> None:
    check(ready(written(OTHERS[form])))


def test_conv_relu_bn_is_left_alone() -> None:
    fused = check(ready(written("self.bn(self.act(self.conv(x)))")))
    assert fused_as(fused) == {}
    assert left_of(fused) == {"bn": "no convolution before it, and no ReLU or addition behind it"}
    fused = check(ready(written("self.bn(F.max_pool2d(self.conv(x), 2))")))
    assert fused_as(fused) == {}


def test_clamp_is_not_relu() -> None:
    """At zero its gradient is not that of ReLU in every version of PyTorch."""
    model = ready(written("self.bn(self.conv(x)).clamp_min(0)"))
    nn.init.zeros_(model.bn.weight)
    nn.init.zeros_(model.bn.bias)
    (group,) = check(model).fused_groups()
    assert not group.relu


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


def test_a_residual_that_is_itself_conv_bn() -> None:
    fused = check(ready(TwoSides()))
    assert fused_as(fused) == {"conv1": "conv_bn_add_relu", "conv2": "conv_bn_add_relu"}


class Stem(Unit):
    """With a max-pool."""

    def __init__(self) -> None:
        super().__init__(stride=2)
        self.pool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.act(self.bn(self.conv(x))))


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


# Between the pieces


class Between(Residual):
    """Something between the batch norm and the addition, or before the activation."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        y = self.middle(self.bn(self.conv(x)))
        return self.act(y + x)


class Excitation(nn.Module):
    """Squeeze and excite."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()


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


MIDDLES = {
    "identity": (nn.Identity, True),
    "squeeze and excite": (Excitation, False),
    "blur-pool": (BlurPool, False),
    "drop-path at rate 0": (lambda: DropPath(0.0), True),
    "dropout": (lambda: nn.Dropout(0.0), False),
    "another activation": (nn.SiLU, False),
}


@pytest.mark.parametrize("name", MIDDLES)
def test_between_the_pieces(name: str) -> None:
    middle, joined = MIDDLES[name]
    model = ready(Between(middle()))
    fused = check(model)
    assert fused_as(fused) == {"conv": "conv_bn_add_relu"}
    assert fr.report(fused).left == []
    (group,) = fused.fused_groups()
    assert group.relu is joined


def test_drop_path_draws_what_it_drew() -> None:
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


# Settings


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
def test_settings_and_kinds_of_normalisation(name: str) -> None:
    model = Residual()
    model.bn = NORMS[name]()
    fused = check(ready(model))
    assert bool(fused_as(fused)) is (name not in ("group norm", "instance norm"))


class Centred(nn.BatchNorm2d):
    """An unknown subclass."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_unknown_subclasses_are_left() -> None:
    model = Residual()
    model.bn = Centred(4)
    fused = check(ready(model))
    assert left_of(fused) == {"bn": "Centred is not a plain BatchNorm2d"}


def test_other_activations_are_called() -> None:
    model = Unit()
    model.act = nn.SiLU(inplace=True)
    fused = check(ready(model))
    (group,) = fused.fused_groups()
    assert (group.operation, group.relu) == ("conv_bn_add_relu", False)


# What changes after the swap


def both() -> tuple[nn.Module, nn.Module]:
    return ready(Between(nn.Identity())), fr.fuse(ready(Between(nn.Identity())))


def close(fused: nn.Module, model: nn.Module) -> None:
    x = image(2, 4, 9, 7)
    assert_same(results(fused, x), results(model, x))


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
        assert any("hook" in why for why in left_of(fused).values())


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
def test_changes_after_the_swap_are_noticed(change: str) -> None:
    model, fused = both()
    CHANGES[change](model)
    CHANGES[change](fused)
    close(fused, model)


class Reads(Residual):
    """A forward that asks for its own attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.skip, self.scale, self.names = True, 1.0, ["act"]

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        if self.skip:
            y = y + x * self.scale
        return self.act(y) if "act" in self.names else y


def test_attributes_that_a_forward_reads_are_asked_for_at_every_call() -> None:
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


# Arguments and results


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


def test_questions_about_shapes_are_asked_at_every_call() -> None:
    model = ready(Sized())
    fused = check(model)
    assert fused_as(fused) == {"conv": "conv_bn_add_relu"}
    x = image(1, 4, 25, 7)
    fused = fr.fuse(model)
    torch.testing.assert_close(fused(x), model(x))
    torch.testing.assert_close(fr.freeze(model)(x), model(x))
    with pytest.raises(ValueError, match="4 channels"):
        fused(image(1, 3, 9, 7))


# What children give: classes of results, and lists


class Stage(nn.Module):
    """A child with code of its own, which gives a tensor, or a tuple where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.unit, self.both = Unit(), False

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.unit(x)
        return (y * 3, y) if self.both else y


class Taps(Unit):
    """Asks for the class of what its children give, as timm's feature extractors do."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Sequential(Unit(), Stage())

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        x = self.act(self.bn(self.conv(x)))
        outputs.append(x[0] if isinstance(x, (tuple, list)) else x)
        x = self.stage(x)
        outputs.append(x[0] if isinstance(x, (tuple, list)) else x)
        return outputs


class Summed(nn.Module):
    """The sum of what a child gives, so that it can be compared and has a gradient."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return sum(part * (index + 2) for index, part in enumerate(self.inner(x)))


class Pair(nn.Module):
    """Gives a tensor and a number, whatever it is called on."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 5, x


def test_a_forward_may_ask_for_the_class_of_a_result() -> None:
    fused = check(ready(Summed(Taps())))
    assert left_of(fused) == {}
    paths = [f"inner.{path}" for path in ("conv", "stage.0.conv", "stage.1.unit.conv")]
    assert list(fused_as(fused)) == paths
    assert fused_as(fr.freeze(ready(Summed(Taps())))).keys() == fused_as(fused).keys()


RESULT_CHANGES = {
    "another result": lambda m: setattr(m.inner.stage[1], "both", True),
    "another child": lambda m: m.inner.stage.__setitem__(1, Pair()),
    "one child more": lambda m: m.inner.stage.append(Pair()),
    "one child fewer": lambda m: m.inner.stage.pop(1),
    "no code at all": lambda m: setattr(m.inner, "stage", Pair()),
    "a hook on the child": lambda m: m.inner.stage.register_forward_hook(lambda *a: (a[2] * 7,)),
    "a hook inside": lambda m: m.inner.stage[1].register_forward_hook(lambda *a: [a[2] * 7]),
    "a hook on a layer": lambda m: m.inner.act.register_forward_hook(lambda *a: [a[2] * 7]),
    "another activation": lambda m: setattr(m.inner, "act", Pair()),
    "a forward of its own": lambda m: setattr(m.inner.stage[1], "forward", lambda x: [x * 7]),
}


@pytest.mark.parametrize("change", RESULT_CHANGES)
def test_what_a_child_gives_may_change(change: str) -> None:
    """The class that was found is asked for at every call, and before anything is computed."""
    if change in ("a hook on a layer", "another activation"):
        change_both = RESULT_CHANGES[change]
        models = [ready(Summed(Tapped())), fr.fuse(ready(Summed(Tapped())))]
    else:
        change_both = RESULT_CHANGES[change]
        models = [ready(Summed(Taps())), fr.fuse(ready(Summed(Taps())))]
    for model in models:
        change_both(model)
    close(models[1], models[0])
    for model in models:
        model.train()
    close(models[1], models[0])


class Tapped(Taps):
    """The class of the stem's result alone decides."""

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.act(self.bn(self.conv(x)))
        return [x[0] * 2 if isinstance(x, (tuple, list)) else x]


class GivesEither(nn.Module):
    """What it gives depends on what it gets."""

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        return [x, x] if x.shape[1] > 100 else x


class AsksEither(Unit):
    """Nobody can know before the call what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.child = GivesEither()

    def forward(self, x: Tensor) -> Tensor:
        y = self.child(self.act(self.bn(self.conv(x))))
        return y[0] if isinstance(y, list) else y


def test_a_result_whose_class_depends_on_values_is_not_guessed() -> None:
    assert list(left_of(check(ready(AsksEither())))) == ["AsksEither"]


class Branches(nn.Module):
    """Writes into the list it is given, as HRNet's modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([Unit(), Unit()])
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        for i, branch in enumerate(self.branches):
            x[i] = branch(x[i])
        y = x[1] + self.bn(self.conv(x[0]))
        return [F.relu(y), x[0]]


class Two(nn.Module):
    """Gives the list, and looks at it afterwards."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        xs = [x + 1, x - 1]
        ys = self.inner(xs)
        return sum(part * (index + 2) for index, part in enumerate([*ys, *xs]))


def test_the_callers_list_is_written_to() -> None:
    fused = check(ready(Two(Branches())))
    assert fused_as(fused)["inner.conv"] == "conv_bn_add_relu"
    assert left_of(fused) == {}
    given = [image(2, 4, 9, 7), image(2, 4, 9, 7, seed=3)]
    eager, mine = list(given), list(given)
    expected, got = ready(Two(Branches())).inner(eager), fr.fuse(ready(Two(Branches()))).inner(mine)
    torch.testing.assert_close([*got, *mine], [*expected, *eager])


class ListReadAgain(Unit):
    """Reads a list that a child has changed."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = Branches()

    def forward(self, x: Tensor) -> Tensor:
        xs = [x, x * 2]
        ys = self.branches(xs)
        return self.act(self.bn(self.conv(xs[0]))) + ys[0]


def test_a_list_that_a_child_may_have_changed_is_not_read() -> None:
    fused = check(ready(ListReadAgain()))
    assert left_of(fused) == {
        "ListReadAgain": "its forward reads a list that a child may have changed"
    }


class Loops(Unit):
    """Goes through a list that a child gives."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = Branches()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.conv(x)))
        return sum(y * (i + 2) for i, y in enumerate(self.branches([x, x * 2])))


class Longer(Branches):
    """Gives three."""

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        return [*super().forward(x), x[0] * 4]


def test_a_list_that_a_child_gives_can_be_gone_through() -> None:
    fused = check(ready(Loops()))
    assert fused_as(fused)["conv"] == "conv_bn_add_relu"
    model, fused = ready(Loops()), fr.fuse(ready(Loops()))
    for each in (model, fused):
        each.branches.__class__ = Longer
    close(fused, model)


class OwnChain(nn.Sequential):
    """A chain with a forward of its own, as torchvision's pooling that upsamples."""

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        for module in self:
            x = module(x)
        return F.interpolate(x, size=size, mode="nearest")


def test_a_chain_with_a_forward_of_its_own_is_traced() -> None:
    fused = check(ready(OwnChain(nn.Conv2d(4, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU())))
    assert fused_as(fused) == {"0": "conv_bn_add_relu"}
    assert left_of(fused) == {}


class Nested(nn.Module):
    """Its shortcut's batch norm is two levels down, and part of its own group."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.short = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.short(x) + self.conv(x))


@pytest.mark.parametrize("path", ["short", "short.0"])
def test_children_that_were_traced_may_go(path: str) -> None:
    model, fused = ready(Nested()), fr.fuse(ready(Nested()))
    for each in (model, fused):
        parent, _, name = path.rpartition(".")
        setattr(each.get_submodule(parent), name, nn.Identity())
    close(fused, model)


# What cannot be known from one trace


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
def test_what_cannot_be_traced_is_left_with_the_reason(cls: type[nn.Module]) -> None:
    model = ready(cls())
    before = copy.deepcopy(vars(model))
    fused = fr.fuse(model)
    assert type(fused) is cls
    (why,) = left_of(fused).values()
    assert UNTRACEABLE[cls] in why
    assert vars(model).keys() == before.keys()
    x = image(2, 4, 9, 7)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    torch.testing.assert_close(fused(x), expected)


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = ready(nn.Sequential(ChangesList(), Between(DropPath(0.5)))).train()
    model[1].middle.eval()
    fr.fuse(model)
    assert model[0].sizes == []
    assert [m.training for m in model[1].modules()] == [True, True, True, True, False]
    assert "__getattribute__" not in vars(nn.Module)
    fr.report(model)
    assert model[0].sizes == []


# What PyTorch does with models


def network() -> nn.Module:
    """Every kind of group, none of a class that the package knows."""
    return ready(nn.Sequential(Stem(), Residual(), Between(DropPath(0.0)), TwoSides()))


def test_autocast() -> None:
    model, x = network().float(), image(2, 4, 17, 15, dtype=torch.float32)
    fused = fr.fuse(model)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = fused(x), model(x)
    assert y.dtype is expected.dtype
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)


def test_channels_last() -> None:
    fused = fr.fuse(network()).to(memory_format=torch.channels_last)
    x = image(2, 4, 17, 15).to(memory_format=torch.channels_last)
    assert fused(x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(fused(x), network()(x))


@pytest.mark.parametrize("training", [True, False])
def test_compile_in_one_graph(training: bool) -> None:
    torch._dynamo.reset()
    model, x = network().train(training), image(2, 4, 17, 15)
    fused = fr.fuse(copy.deepcopy(model))
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert_same(
        {k.replace("_orig_mod.", ""): v for k, v in results(compiled, x).items()},
        results(model, x),
    )


@pytest.mark.parametrize("prepare", [fr.fuse, fr.freeze])
def test_export(prepare) -> None:
    model, x = network(), image(2, 4, 17, 15)
    program = torch.export.export(prepare(model), (x,))
    torch.testing.assert_close(program.module()(x), model(x))
    assert "torch.ops.fused_resnet" in str(program)


def test_export_keeps_the_names_of_arguments() -> None:
    batch = torch.export.Dim("batch", min=1, max=8)
    fused, x = fr.fuse(ready(Residual())), image(2, 4, 9, 7)
    program = torch.export.export(fused, (x,), dynamic_shapes={"x": {0: batch}})
    torch.testing.assert_close(program.module()(image(5, 4, 9, 7)), fused(image(5, 4, 9, 7)))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("prepare", [fr.fuse, fr.freeze])
def test_jit_trace(prepare) -> None:
    model, x = network(), image(2, 4, 17, 15)
    with torch.no_grad():
        traced = torch.jit.trace(prepare(model), x)
        torch.testing.assert_close(traced(x), model(x))


def test_fx_trace_sees_the_modules_that_were() -> None:
    model, x = network(), image(2, 4, 17, 15)
    graph = torch.fx.symbolic_trace(fr.fuse(model))
    torch.testing.assert_close(graph(x), model(x))
    assert {"0.conv", "1.bn"} <= {str(n.target) for n in graph.graph.nodes}


@pytest.mark.parametrize("prepare", [fr.fuse, fr.freeze])
def test_copies_pickles_and_files(prepare) -> None:
    model, x = prepare(network()), image(2, 4, 17, 15)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(other(x), model(x))
        assert fr.report(other) == fr.report(model)
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]


def test_a_moving_average_of_a_fused_model() -> None:
    fused, x = fr.fuse(network()), image(2, 4, 17, 15)
    average = torch.optim.swa_utils.AveragedModel(
        fused, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    average.update_parameters(fused)
    torch.testing.assert_close(average.eval()(x), fused(x))
    assert fr.report(average.module) == fr.report(fused)


def test_checkpoints_go_both_ways() -> None:
    old, fused = network(), fr.fuse(network())
    randomize(old, seed=9)
    x = image(2, 4, 17, 15)
    assert not torch.allclose(fused(x), old(x))
    fused.load_state_dict(old.state_dict())
    torch.testing.assert_close(fused(x), old(x))
    fresh = fr.fuse(network())
    old.load_state_dict(fresh.state_dict())
    torch.testing.assert_close(fresh(x), old(x))


def test_an_optimizer_built_before_goes_on() -> None:
    model = network().train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    fused, x = fr.fuse(model), image(2, 4, 17, 15)
    before = model[1].conv.weight.detach().clone()
    fused(x).sum().backward()
    optimizer.step()
    assert not torch.equal(model[1].conv.weight, before)
    assert model[1].conv.weight is fused[1].conv.weight


def test_a_frozen_model_still_notices_what_changes() -> None:
    model, x = ready(Between(nn.Identity())), image(2, 4, 9, 7)
    frozen = fr.freeze(model)
    assert isinstance(frozen.conv, FrozenConv)
    seen: list[Tensor] = []
    frozen.middle.register_forward_hook(lambda m, a, y: seen.append(y))
    torch.testing.assert_close(frozen(x), model(x))
    torch.testing.assert_close(seen, [model.bn(model.conv(x))])
