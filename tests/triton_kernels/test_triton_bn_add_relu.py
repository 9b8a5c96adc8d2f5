"""Batch norm's Triton kernels, forward and backward, in the hardened interpreter."""

from __future__ import annotations

import pytest
import torch
from cases import FORMATS, MAPS, batch_norm, normal
from test_bn_add_relu import AWKWARD, check_backward, check_forward, laid_out, views
from tolerances import error

from fused_resnet.backends.triton._bn_map import CONFIGS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
formats = pytest.mark.parametrize("fmt", FORMATS)
training_or_not = pytest.mark.parametrize("training", [False, True])
extras = pytest.mark.parametrize(
    ("relu", "residual"), [(True, True), (True, False), (False, True), (False, False)]
)
EPS = 1e-5
SHAPES = MAPS | AWKWARD


def every_map() -> list:
    """Of each dtype and format; float16 differs from bfloat16 in its type's name alone."""
    cases = []
    for dtype in DTYPES:
        for fmt in FORMATS:
            for name, shape in SHAPES.items():
                quick = dtype is not torch.float16 or name in ("resnet", "prime-channels")
                quick = quick and (name, fmt) != ("wide", "contiguous")
                marks = () if quick else pytest.mark.slow
                label = f"{str(dtype).removeprefix('torch.')}-{fmt}-{name}"
                cases.append(pytest.param(dtype, fmt, shape, id=label, marks=marks))
    return cases


maps = pytest.mark.parametrize(("dtype", "fmt", "shape"), every_map())


@maps
@training_or_not
def test_forward(interpreted, dtype, fmt, shape, training):
    check_forward(interpreted, dtype, fmt, shape, training=training)


@maps
@training_or_not
def test_backward(interpreted, dtype, fmt, shape, training):
    check_backward(interpreted, dtype, fmt, shape, training=training)


@extras
@training_or_not
def test_flags(interpreted, relu, residual, training):
    for dtype in (torch.float32, torch.bfloat16):
        shape, flags = (2, 24, 4, 5), {"training": training, "relu": relu, "residual": residual}
        check_forward(interpreted, dtype, "channels_last", shape, **flags)
        for affine in (False, True):
            check_backward(interpreted, dtype, "channels_last", shape, **flags, affine=affine)


class Configured:
    """Operators with a configuration forced on them, in the place of the interpreter's own."""

    def __init__(self, interpreted, config) -> None:
        self._interpreted, self._config = interpreted, config

    @property
    def ops(self):
        return self

    def __getattr__(self, name):
        operator = getattr(self._interpreted.ops, name)
        return lambda *args: operator(*args, config=self._config)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c[0]}x{c[1]}")
@formats
def test_every_configuration(interpreted, config, fmt):
    """Several slabs, and tiles and planes that end in the middle of a tile."""
    forced, shape = Configured(interpreted, config), (3, 69, 21, 13)
    check_forward(forced, torch.bfloat16, fmt, shape, training=True)
    check_backward(forced, torch.bfloat16, fmt, shape)


@formats
@pytest.mark.parametrize("shape", AWKWARD.values(), ids=AWKWARD)
def test_statistics_survive_a_large_mean(interpreted, fmt, shape):
    """A mean a thousand times the deviation: sums of squares would lose every digit."""
    (x,) = laid_out(fmt, normal(*shape, dtype=torch.float32, shift=1000.0))
    _, mean, var = interpreted.ops.bn_add_relu(x, *[None] * 5, True, EPS, True)
    wide = x.double()
    assert error(mean, wide.mean((0, 2, 3))) < 1e-7
    assert error(var, wide.var((0, 2, 3), correction=0)) < 1e-6


@formats
def test_backward_sums_what_cancels(interpreted, fmt):
    """A sum far smaller than its terms is right to its last digit.

    With tiles of few rows, so that each lane adds many of them.
    """
    x, grad = normal(2, 2, 4, 60, 60, dtype=torch.float32)
    grad += 100.0 * x.sign()
    grad -= grad.mean((0, 2, 3), keepdim=True)
    x, grad = laid_out(fmt, x, grad)
    _, _, dbias, _ = interpreted.ops.bn_add_relu_backward(
        grad, x, None, None, torch.zeros(4), torch.ones(4), True, EPS, False, False,
        config=CONFIGS[-1],
    )  # fmt: skip
    truth = grad.double().sum((0, 2, 3))
    assert (truth.abs() < 1e-7 * grad.double().abs().sum((0, 2, 3))).all()
    torch.testing.assert_close(dbias.double(), truth, rtol=1e-6, atol=1e-8)


def test_given_statistics(interpreted):
    x, r = normal(2, 2, 24, 5, 7, dtype=torch.float32)
    weight, bias, mean, var = batch_norm(24, torch.float32)
    y = interpreted.ops.bn_add_relu_given(x, weight, bias, mean, var, r, EPS, True)
    expected, _, _ = interpreted.ops.bn_add_relu(x, weight, bias, mean, var, r, False, EPS, True)
    assert torch.equal(y, expected)


@dtypes
def test_views_give_what_their_copies_give(interpreted, dtype):
    bn = batch_norm(12, dtype)
    for name, view in views((2, 12, 5, 6), dtype).items():
        results = [
            interpreted.ops.bn_add_relu(x, *bn, None, False, EPS, True)[0]
            for x in (view, view.clone())
        ]
        assert torch.equal(*results), name


@formats
@training_or_not
def test_non_finite_values_pass_through(interpreted, fmt, training):
    x, r = normal(2, 2, 16, 6, 6, dtype=torch.float32)
    x[0, 1, 2, 3], x[1, 2, 0, 0] = float("nan"), float("inf")
    r[0, 3, 1, 1], r[1, 4, 2, 2] = float("nan"), float("-inf")
    x, r = laid_out(fmt, x, r)
    bn = batch_norm(16, torch.float32)
    y, _, _ = interpreted.ops.bn_add_relu(x, *bn, r, training, EPS, True)
    expected, _, _ = torch.ops.fused_resnet.bn_add_relu(x, *bn, r, training, EPS, True)
    torch.testing.assert_close(y, expected, rtol=2e-5, atol=2e-5, equal_nan=True)


@formats
def test_non_finite_gradients_pass_through(interpreted, fmt):
    x, grad = normal(2, 2, 16, 6, 6, dtype=torch.float32)
    grad[0, 1, 2, 3], grad[1, 2, 0, 0] = float("inf"), float("nan")
    x, grad = laid_out(fmt, x, grad)
    weight, _, mean, var = batch_norm(16, torch.float32)
    y = torch.ones_like(x)
    y[:, 5, 0, 0] = float("nan")
    args = (grad, x, y, weight, mean, var, True, EPS, True, True)
    results = interpreted.ops.bn_add_relu_backward(*args)
    expected = torch.ops.fused_resnet.bn_add_relu_backward(*args)
    finite = [i for i in range(16) if i not in (1, 2)]
    for ours, theirs in zip(results, expected, strict=True):
        a, b = (t[finite] if t.dim() == 1 else t[:, finite] for t in (ours, theirs))
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-4, equal_nan=True)
    for gradients in results[1:3]:
        assert not gradients[[1, 2]].isfinite().any()


@formats
@training_or_not
def test_empty_batch(interpreted, fmt, training):
    (x,) = laid_out(fmt, torch.empty(0, 8, 6, 6))
    bn = batch_norm(8, torch.float32)
    y, mean, var = interpreted.ops.bn_add_relu(x, *bn, None, training, EPS, True)
    assert y.shape == x.shape
    dx, dweight, dbias, dr = interpreted.ops.bn_add_relu_backward(
        x, x, y, bn[0], bn[2], bn[3], training, EPS, True, True
    )
    assert dx.shape == dr.shape == x.shape
    assert not dweight.any()
    assert not dbias.any()
    assert mean.shape == var.shape == ((8,) if training else (0,))
    assert interpreted.launches() == []


@formats
def test_the_same_bits_in_any_order_of_programs(interpreted, fmt):
    x, grad = laid_out(fmt, *normal(2, 3, 24, 21, 20, dtype=torch.bfloat16))
    bn = batch_norm(24, torch.bfloat16)
    results = []
    for seed in (0, 1, 2):
        interpreted.seed(seed)
        y, *statistics = interpreted.ops.bn_add_relu(x, *bn, None, True, EPS, True)
        back = interpreted.ops.bn_add_relu_backward(
            grad, x, y, bn[0], *statistics, True, EPS, True, True
        )
        results.append((y, *statistics, *back))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_wrong_arguments_are_named(interpreted):
    x, one = torch.randn(2, 4, 5, 5), torch.ones(4)

    def forward(x, *bn, residual=None):
        return interpreted.ops.bn_add_relu(x, *bn, residual, False, EPS, True)

    with pytest.raises(TypeError, match="bn_add_relu: x: expected dtype float32, bfloat16 or floa"):
        forward(x.double(), one, one, one, one)
    with pytest.raises(ValueError, match=r"bn_add_relu: weight: expected shape \[4\]"):
        forward(x, one[:3], one, one, one)
    with pytest.raises(ValueError, match="running_mean, running_var: expected tensors"):
        forward(x, None, None, None, None)
    with pytest.raises(ValueError, match="residual: expected shape"):
        forward(x, one, one, one, one, residual=x[:1])
    with pytest.raises(ValueError, match="bn_add_relu_backward: y: expected a tensor"):
        interpreted.ops.bn_add_relu_backward(x, x, None, one, one, one, True, EPS, True, False)
    with pytest.raises(ValueError, match="bn_add_relu: x: expected 4 dimensions"):
        forward(x[0], one, one, one, one)
