"""What a forward reads outside of its module: constants are traced, what may change is refused."""

from __future__ import annotations

import copy
import enum
import types

import pytest
import torch.nn.functional as F
from networks import assert_same, image, results
from torch import Tensor
from traced_modules import Unit, check, fused_as, ready, unfused_in

import fused_resnet as fr


class Calls(Unit):
    """Calls a function with the group's result."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(super().forward(x))


class Kind(enum.Enum):
    DOUBLE = 2


class Alpha:
    value = 2.0

    @classmethod
    def two(cls) -> float:
        return 2.0

    @staticmethod
    def doubled(x: Tensor) -> Tensor:
        return x * 2


def doubled(x: Tensor) -> Tensor:
    return x * 2


def constants() -> dict:
    """Functions that read what nothing changes unseen."""
    factor, sizes, kind, function, layer = 2.0, (0, 0, 1, 1), Kind.DOUBLE, doubled, Alpha
    return {
        "a number": lambda x: x * factor,
        "a tuple": lambda x: F.pad(x, sizes),
        "a member of an enumeration": lambda x: x * 2 if kind is Kind.DOUBLE else x,
        "a function": lambda x: function(x),
        "a static method": lambda x: layer.doubled(x),
        "a class method": lambda x: x * layer.two(),
        "a function that is made in the call": lambda x: (lambda y: lambda z: y + z)(x)(x),
        "a default number": lambda x, by=2.0: x * by,
        "variables of its own": lambda x: sum([y * i for i, y in enumerate([x, x])]),
    }


@pytest.mark.parametrize("name", constants())
def test_constants_are_traced(name) -> None:
    assert fused_as(check(ready(Calls(constants()[name])), frozen=False))


def changing() -> dict:
    """Functions, and what changes what they read."""
    box, names, settings, numbers = [2.0], types.SimpleNamespace(by=2.0), {"by": 2.0}, [2.0]
    of_class = type("OfClass", (), {"by": 2.0})

    def with_attribute(x: Tensor) -> Tensor:
        return x * with_attribute.by

    def with_default(x: Tensor, by=numbers) -> Tensor:
        return x * by[0]

    with_attribute.by = 2.0
    return {
        "a list": (lambda x: x * box[0], lambda: box.__setitem__(0, 3.0)),
        "a namespace": (lambda x: x * names.by, lambda: setattr(names, "by", 3.0)),
        "a dict": (lambda x: x * settings["by"], lambda: settings.update(by=3.0)),
        "a class around it": (lambda x: x * of_class.by, lambda: setattr(of_class, "by", 3.0)),
        "its own attribute": (with_attribute, lambda: setattr(with_attribute, "by", 3.0)),
        "a default list": (with_default, lambda: numbers.__setitem__(0, 3.0)),
        "a class of the module": (lambda x: x * Alpha.value, lambda: None),
    }


@pytest.mark.parametrize("name", changing())
def test_what_may_change_is_refused(name) -> None:
    function, change = changing()[name]
    model = ready(Calls(function))
    fused = fr.fuse(copy.deepcopy(model))
    (why,) = unfused_in(fused).values()
    assert "change unseen" in why
    change()
    assert_same(results(fused, image(2, 4, 9, 7)), results(model, image(2, 4, 9, 7)))


def test_an_attribute_of_its_own_class_by_name() -> None:
    class Scaled(Unit):
        alpha = 2.0

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * Scaled.alpha

    (why,) = unfused_in(fr.fuse(ready(Scaled()))).values()
    assert "Scaled.alpha" in why


def test_a_size_as_the_argument_of_a_function() -> None:
    """PyTorch's function inspects the class of the size, the forward does not."""

    class Pooled(Unit):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return F.avg_pool2d(y, (y.size(2), y.size()[3])) + F.avg_pool2d(y, y.shape[2:])

    for shape in ((2, 4, 9, 7), (1, 4, 5, 6)):
        fused = check(ready(Pooled()), image(*shape), frozen=False)
        assert fused_as(fused) == {"conv": "conv_bn_add_relu"}


def test_the_class_of_a_size_is_what_python_says() -> None:
    class Branches(Unit):
        def forward(self, x: Tensor) -> Tensor:
            known = isinstance(x.size(2), int) and isinstance(x.shape, tuple)
            return super().forward(x) if known and not isinstance(x.shape[0], Tensor) else x

    assert fused_as(check(ready(Branches()))) == {"conv": "conv_bn_add_relu"}
