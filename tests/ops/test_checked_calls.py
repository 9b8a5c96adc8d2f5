"""A call like one that was checked is not checked again, and every other call is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_wrong_arguments import BAD, conv_arguments

import fused_resnet as fr
from fused_resnet import ops
from fused_resnet.ops import checks
from fused_resnet.ops.registry import OPERATORS
from fused_resnet.tuning import tuner


@pytest.fixture(autouse=True)
def _no_decisions():
    tuner.forget()
    yield
    tuner.forget()


def checked(monkeypatch, call):
    """Whether a call is checked."""

    def seen(*_):
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(checks, "feature_map", seen)
        try:
            call()
        except InterruptedError:
            return True
    return False


@pytest.mark.parametrize("op", [ops.conv_bn_add_relu, ops.bn_add_relu])
def test_the_second_call_of_a_kind_is_not_checked(monkeypatch, op):
    arguments = conv_arguments(x=torch.randn(2, 6, 5, 5), conv_weight=torch.randn(6, 6, 3, 3))
    if op is ops.bn_add_relu:
        del arguments["conv_weight"]
    first = op(**arguments)
    assert not checked(monkeypatch, lambda: op(**arguments))
    torch.testing.assert_close(op(**arguments), first, rtol=0, atol=0)
    x = arguments["x"]
    for other in (x[:1], x.to(memory_format=torch.channels_last), x.double()):
        assert checked(monkeypatch, lambda x=other: op(**{**arguments, "x": x}))
    tuner.forget()
    assert checked(monkeypatch, lambda: op(**arguments))


@pytest.mark.parametrize("op", ["conv_bn_add_relu", "bn_add_relu"])
def test_an_operator_may_be_a_function(monkeypatch, op):
    """As those of Triton are."""
    operator = getattr(OPERATORS["cpu"], op)
    monkeypatch.setitem(OPERATORS, "cpu", SimpleNamespace(**{op: lambda *args: operator(*args)}))
    arguments = conv_arguments(x=torch.randn(2, 6, 5, 5), conv_weight=torch.randn(6, 6, 3, 3))
    if op == "bn_add_relu":
        del arguments["conv_weight"]
    first = getattr(ops, op)(**arguments)
    assert not checked(monkeypatch, lambda: getattr(ops, op)(**arguments))
    assert torch.equal(getattr(ops, op)(**arguments), first)


@pytest.mark.parametrize(("changes", "kind", "message"), BAD, ids=[b[2] for b in BAD])
def test_wrong_arguments_are_found_after_right_ones(changes, kind, message):
    residual = torch.randn(2, 6, 3, 3) if "residual" in changes else None
    ops.conv_bn_add_relu(**conv_arguments(residual=residual))
    with pytest.raises(kind, match=message):
        ops.conv_bn_add_relu(**conv_arguments(**changes))


@pytest.mark.parametrize(
    "changes",
    [{"stride": 1.0}, {"stride": (1.0, 1.0)}, {"dilation": 1.0}, {"groups": 1.0}, {"eps": 1 + 0j}],
    ids=str,
)
def test_an_equal_setting_of_another_type_is_checked(changes):
    """Whether 1.0 is refused does not depend on a call with 1 before it."""
    with pytest.raises((TypeError, ValueError, RuntimeError, AttributeError)) as alone:
        ops.conv_bn_add_relu(**conv_arguments(**changes))
    right = {"dilation": 1, "groups": 1, "eps": 1.0}
    right["stride"] = (1, 1) if type(changes.get("stride")) is tuple else 1
    ops.conv_bn_add_relu(**conv_arguments(**right))
    with pytest.raises(alone.type):
        ops.conv_bn_add_relu(**conv_arguments(**right | changes))


def test_calls_of_ever_changing_shapes_are_forgotten(monkeypatch):
    monkeypatch.setattr(tuner, "MOST", 3)
    monkeypatch.setenv("FUSED_RESNET_TUNE", "0")
    arguments = conv_arguments()
    for rows in range(5, 12):
        x = torch.randn(2, 4, rows, 5)
        y = ops.conv_bn_add_relu(**{**arguments, "x": x})
        with fr.use_backend("reference"):
            expected = ops.conv_bn_add_relu(**{**arguments, "x": x})
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        assert 1 <= len(tuner.calls) <= 3
        assert 1 <= len(tuner._decided) <= 3


@pytest.mark.parametrize(
    "changes",
    [{"eps": 1.0}, {"relu": False}, {"activation": "leaky_relu"}, {"stride": 2}, {"padding": 1}],
    ids=str,
)
def test_other_settings_are_another_call(changes):
    arguments = conv_arguments()
    ops.conv_bn_add_relu(**arguments)
    with fr.use_backend("reference"):
        expected = ops.conv_bn_add_relu(**arguments, **changes)
    torch.testing.assert_close(
        ops.conv_bn_add_relu(**arguments, **changes), expected, rtol=1e-5, atol=1e-5
    )


def test_what_is_around_a_call_counts(monkeypatch):
    """Autocast, a forced backend, a transform, the number of threads and a recording."""
    arguments = conv_arguments()

    def call(x=arguments["x"]):
        return ops.conv_bn_add_relu(**{**arguments, "x": x})

    call()
    with torch.autocast("cpu", torch.bfloat16):
        assert call().dtype is torch.bfloat16
    with fr.use_backend("reference"):
        assert checked(monkeypatch, call)
    assert checked(monkeypatch, lambda: torch.func.vmap(call)(arguments["x"][None]))
    with tuner.recording() as recorded:
        call()
    assert [c.op for c in recorded] == ["conv_bn_add_relu"]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert checked(monkeypatch, call)
    finally:
        torch.set_num_threads(threads)


def test_gradients_after_a_call_without_them():
    arguments = conv_arguments()
    with torch.no_grad():
        ops.conv_bn_add_relu(**arguments)
        assert not ops.conv_bn_add_relu(**arguments).requires_grad
    weight = arguments["conv_weight"].requires_grad_()
    ops.conv_bn_add_relu(**arguments).sum().backward()
    with fr.use_backend("reference"):
        expected = torch.autograd.grad(ops.conv_bn_add_relu(**arguments).sum(), weight)[0]
    torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-4)
