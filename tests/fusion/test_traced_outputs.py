"""Traced modules that inspect the class of a child's result, or pass lists to a child."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import image
from torch import Tensor, nn
from traced_modules import (
    Unit,
    check,
    close,
    fused_as,
    ready,
    unfused_in,
)

import fused_resnet as fr


class Stage(nn.Module):
    """A child with a forward of its own that returns a tensor, or a tuple if ``both`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.unit, self.both = Unit(), False

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.unit(x)
        return (y * 3, y) if self.both else y


class Taps(Unit):
    """Inspects the class of its children's results, as timm's feature extractors do."""

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
    """Sums a child's results, so that there is one result with a gradient."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return sum(part * (index + 2) for index, part in enumerate(self.inner(x)))


class Pair(nn.Module):
    """Returns two tensors."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 5, x


def test_a_forward_may_inspect_the_class_of_a_result() -> None:
    fused = check(ready(Summed(Taps())))
    assert unfused_in(fused) == {}
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
def test_the_class_of_a_childs_result_may_change(change: str) -> None:
    """The guard checks that class at every call, before anything is computed."""
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
    """Depends on the class of the stem's result only."""

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.act(self.bn(self.conv(x)))
        return [x[0] * 2 if isinstance(x, (tuple, list)) else x]


class ReturnsEither(nn.Module):
    """The class of its result depends on the shape of its input."""

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        return [x, x] if x.shape[1] > 100 else x


class InspectsEither(Unit):
    """Inspects a result whose class is unknown before the call."""

    def __init__(self) -> None:
        super().__init__()
        self.child = ReturnsEither()

    def forward(self, x: Tensor) -> Tensor:
        y = self.child(self.act(self.bn(self.conv(x))))
        return y[0] if isinstance(y, list) else y


def test_a_result_whose_class_depends_on_a_shape_is_not_fused() -> None:
    assert list(unfused_in(check(ready(InspectsEither())))) == ["InspectsEither"]


class Branches(nn.Module):
    """Writes to the list that it is called with, as HRNet's modules do."""

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
    """Passes a list to its child and reads it afterwards."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        xs = [x + 1, x - 1]
        ys = self.inner(xs)
        return sum(part * (index + 2) for index, part in enumerate([*ys, *xs]))


def test_writes_to_the_callers_list_are_kept() -> None:
    fused = check(ready(Two(Branches())))
    assert fused_as(fused)["inner.conv"] == "conv_bn_add_relu"
    assert unfused_in(fused) == {}
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
    assert unfused_in(fused) == {
        "ListReadAgain": "its forward reads a list that a child may have changed"
    }


class Loops(Unit):
    """Iterates over a list that a child returns."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = Branches()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.conv(x)))
        return sum(y * (i + 2) for i, y in enumerate(self.branches([x, x * 2])))


class Longer(Branches):
    """Returns three tensors."""

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        return [*super().forward(x), x[0] * 4]


def test_a_list_that_a_child_returns_can_be_iterated_over() -> None:
    fused = check(ready(Loops()))
    assert fused_as(fused)["conv"] == "conv_bn_add_relu"
    model, fused = ready(Loops()), fr.fuse(ready(Loops()))
    for each in (model, fused):
        each.branches.__class__ = Longer
    close(fused, model)


class OwnSequential(nn.Sequential):
    """An nn.Sequential with a forward of its own, as torchvision's pooling that upsamples."""

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        for module in self:
            x = module(x)
        return F.interpolate(x, size=size, mode="nearest")


def test_a_sequential_with_a_forward_of_its_own_is_traced() -> None:
    fused = check(ready(OwnSequential(nn.Conv2d(4, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU())))
    assert fused_as(fused) == {"0": "conv_bn_add_relu"}
    assert unfused_in(fused) == {}


class Nested(nn.Module):
    """The batch norm of its shortcut is two levels down and part of its own group."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.short = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.short(x) + self.conv(x))


@pytest.mark.parametrize("path", ["short", "short.0"])
def test_inlined_children_may_be_replaced(path: str) -> None:
    model, fused = ready(Nested()), fr.fuse(ready(Nested()))
    for each in (model, fused):
        parent, _, name = path.rpartition(".")
        setattr(each.get_submodule(parent), name, nn.Identity())
    close(fused, model)
