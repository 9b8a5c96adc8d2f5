"""Variables of the functions around a forward, and defaults, that are assigned after ``fuse``."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from networks import assert_same, image, results
from torch import Tensor
from traced_modules import Unit, fused_as, ready, unfused_in

import fused_resnet as fr


class Calls(Unit):
    """Calls a function with the group's result."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(super().forward(x))


def rebound():
    """A function that reads a number of the function around it, and what assigns the number."""
    factor = 2.0

    def scaled(x: Tensor) -> Tensor:
        return x * factor

    def assign(value) -> None:
        nonlocal factor
        factor = value

    return scaled, assign


def doubled(x: Tensor) -> Tensor:
    return x * 2


def tripled(x: Tensor) -> Tensor:
    return x * 3


def rebound_function():
    function = doubled

    def change(_) -> None:
        nonlocal function
        function = tripled

    return lambda x: function(x), change


def nested():
    """The variable is read by a function that a traced function calls."""
    inner, assign = rebound()
    return lambda x: inner(x) + 1, assign


def deleted():
    factor = 2.0

    def scaled(x: Tensor) -> Tensor:
        return x * (factor if have else 3.0)

    def delete(_) -> None:
        nonlocal factor, have
        have = False
        del factor

    have = True
    return scaled, delete


def with_defaults():
    def scaled(x: Tensor, by=2.0) -> Tensor:
        return x * by

    return scaled, lambda value: setattr(scaled, "__defaults__", (value,))


def with_keyword_defaults():
    def scaled(x: Tensor, *, by=(2.0, 1)) -> Tensor:
        return x * by[0]

    return scaled, lambda value: setattr(scaled, "__kwdefaults__", {"by": (value, 1)})


CHANGES = {
    f.__name__: f
    for f in (rebound, rebound_function, nested, deleted, with_defaults, with_keyword_defaults)
}


def assert_as(fused, eager) -> None:
    x = image(2, 4, 9, 7)
    assert_same(results(fused, x), results(eager, x))


@pytest.mark.parametrize("name", CHANGES)
def test_a_value_that_is_assigned_after_fusing_takes_effect(name) -> None:
    function, change = CHANGES[name]()
    eager = ready(Calls(function))
    fused = fr.fuse(copy.deepcopy(eager))
    assert fused_as(fused) == {"conv": "conv_bn_add_relu"}
    assert_as(fused, eager)
    change(3.0)
    assert unfused_in(fused) == {"bn": "a hook or a change since fuse()"}
    assert_as(fused, eager)
    if name == "rebound":  # it is compared at each call, and the same again
        change(2.0)
        assert fused_as(fused) == {"conv": "conv_bn_add_relu"}
        change(2)
        assert unfused_in(fused)
        assert_as(fused, eager)


def made():
    """A class whose forward has a default, and what assigns another."""

    class Scaled(Unit):
        def forward(self, x: Tensor, by: float = 2.0, *, and_add: float = 0.0) -> Tensor:
            return super().forward(x) * by + and_add

    return Scaled


@pytest.mark.parametrize("changed", ["by", "and_add", "none left"])
def test_the_defaults_of_the_forward_itself(changed) -> None:
    cls = made()
    eager = ready(cls())
    fused = fr.fuse(copy.deepcopy(eager))
    assert fused_as(fused) == {"conv": "conv_bn_add_relu"}
    if changed == "by":
        cls.forward.__defaults__ = (3.0,)
    elif changed == "and_add":
        cls.forward.__kwdefaults__ = {"and_add": 1.0}
    else:
        cls.forward.__defaults__ = None
        for model in (eager, fused):
            with pytest.raises(TypeError, match="missing 1 required positional argument"):
                model(image(2, 4, 9, 7))
        return
    assert_as(fused, eager)
    assert unfused_in(fused)


def test_of_functions_of_the_same_code_each_is_its_own() -> None:
    """The functions are told apart by their variables' values; of many that are equal none is."""
    pairs = [rebound() for _ in range(3)]
    for i, (_, assign) in enumerate(pairs):
        assign(2.0 + i)
    models = [ready(Calls(function)) for function, _ in pairs]
    fused = [fr.fuse(copy.deepcopy(model)) for model in models]
    pairs[1][1](7.0)
    assert [len(unfused_in(model)) for model in fused] == [0, 1, 0]
    for pair in zip(fused, models, strict=True):
        assert_as(*pair)
    equal = [rebound() for _ in range(5)]
    (why,) = unfused_in(fr.fuse(ready(Calls(equal[0][0])))).values()
    assert why == "scaled reads factor of the function around it, which can change unseen"


def times(factor: float):
    def decorate(forward):
        @functools.wraps(forward)
        def scaled(self, x: Tensor) -> Tensor:
            return forward(self, x) * factor

        return scaled

    return decorate


class Decorated(Unit):
    @times(2.0)
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


def test_a_decorated_forward_is_copied_and_pickled() -> None:
    eager = ready(Decorated())
    fused = fr.fuse(copy.deepcopy(eager))
    for model in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert fused_as(model) == {"conv": "conv_bn_add_relu"}
        assert_as(model, eager)


def test_an_unpickled_model_whose_function_is_gone_runs_unfused(monkeypatch) -> None:
    eager = ready(Decorated())
    stored = pickle.dumps(fr.fuse(copy.deepcopy(eager)))
    monkeypatch.setattr(Decorated, "forward", Unit.forward)
    assert_as(pickle.loads(stored), eager)


@pytest.mark.parametrize("name", ["rebound", "with_defaults", "with_keyword_defaults"])
def test_a_compiled_model_compares_them_too(name) -> None:
    if name == "with_defaults" and torch.__version__.startswith("2.11."):
        pytest.skip("the compiler of PyTorch 2.11 does not look at a function's new __defaults__")
    torch._dynamo.reset()
    function, change = CHANGES[name]()
    eager = ready(Calls(function))
    fused = fr.fuse(copy.deepcopy(eager))
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    x = image(2, 4, 9, 7)
    torch.testing.assert_close(compiled(x), eager(x))
    change(3.0)
    torch.testing.assert_close(compiled(x), eager(x))
