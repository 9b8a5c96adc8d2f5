"""bn_add_relu and its gradient on every backend: values, views, empty and non-finite maps, errors.

Which walk over the map a kernel takes depends on shape, memory format and mode together, so these
three are a full product; dtypes are spread over it.
"""

from __future__ import annotations

import pytest
import torch
from bn_operands import (
    EPS,
    TRAINING,
    VIEWS,
    check_backward,
    check_forward,
    exact_backward,
    forward,
    laid_out,
    views,
)
from cases import FORMATS, batch_norm, doubled, normal
from marks import ACTIVATIONS, on, on_gpu_kernels, rows
from shapes import AWKWARD_MAPS, LARGER_MAPS
from tolerances import assert_as_exact_as_pytorch, error

from fused_resnet import reference

FLAG = (True, False)
formats = rows(fmt=list(FORMATS))
modes = rows({"fmt": list(FORMATS), "training": TRAINING})

# Forward


@rows({"shape": LARGER_MAPS, "fmt": list(FORMATS), "training": TRAINING})
def test_forward(backend, dtype, fmt, shape, training):
    check_forward(backend, dtype, fmt, shape, training=training)


@pytest.mark.variants
@rows({"shape": AWKWARD_MAPS, "fmt": list(FORMATS), "training": TRAINING})
def test_forward_of_awkward_shapes(backend, dtype, fmt, shape, training):
    check_forward(backend, dtype, fmt, shape, training=training)


@rows({"activation": ACTIVATIONS, "residual": FLAG, "training": TRAINING})
def test_forward_flags(backend, dtype, activation, residual, training):
    flags = {"training": training, "activation": activation, "residual": residual}
    check_forward(backend, dtype, "channels_last", (2, 24, 4, 5), **flags)


@rows({"shape": AWKWARD_MAPS, "fmt": list(FORMATS)})
def test_statistics_survive_a_large_mean(backend, fmt, shape):
    """A mean a thousand times the deviation: sums of squares would lose every digit."""
    (x,) = laid_out(fmt, normal(*shape, dtype=torch.float32, shift=1000.0))
    _, mean, var = forward(backend, x, [None] * 4, training=True)
    wide = x.double()
    assert error(mean, wide.mean((0, 2, 3))) < 1e-7
    assert error(var, wide.var((0, 2, 3), correction=0)) < 1e-6


@formats
def test_a_first_value_far_from_the_others(backend, fmt):
    """Where a kernel measures from its first value, rounding is relative to that value's size."""
    x = normal(3, 16, 9, 9, dtype=torch.float32)
    x[0, :, 0, 0] = 1e4
    (x,) = laid_out(fmt, x)
    _, mean, var = forward(backend, x, [None] * 4, training=True)
    wide = x.double()
    assert (mean - wide.mean((0, 2, 3))).abs().max() < 1e-7 * 1e4
    assert error(var, wide.var((0, 2, 3), correction=0)) < 1e-6


def test_no_affine_no_statistics(backend):
    x = normal(2, 8, 5, 5, dtype=torch.float32)
    y, _, _ = forward(backend, x, [None] * 4, training=True)
    truth = reference.bn_add_relu(doubled(x), None, None, None, None, training=True)
    torch.testing.assert_close(y.double(), truth, rtol=1e-5, atol=1e-5)


def test_batch_norm_in_the_type_of_the_map(backend, dtype):
    x = normal(2, 8, 5, 5, dtype=dtype)
    bn = [t.to(dtype) for t in batch_norm(8, dtype)]
    y, _, _ = forward(backend, x, bn)
    truth = reference.bn_add_relu(doubled(x), *doubled(bn))
    assert_as_exact_as_pytorch(y, reference.bn_add_relu(x, *bn), truth)


@on("cpu", "interpreter", "device")
def test_given_statistics(backend):
    """The simulator's library does not define this composite of bn_add_relu."""
    x, r = normal(2, 2, 24, 5, 7, dtype=torch.float32)
    weight, bias, mean, var = batch_norm(24, torch.float32)
    y = backend.ops.bn_add_relu_apply(x, weight, bias, mean, var, r, EPS, True)
    expected, _, _ = forward(backend, x, (weight, bias, mean, var), r)
    assert torch.equal(y, expected)


# Backward


@rows({"shape": LARGER_MAPS, "fmt": list(FORMATS), "training": TRAINING})
def test_backward(backend, dtype, fmt, shape, training):
    check_backward(backend, dtype, fmt, shape, training=training)


@pytest.mark.variants
@rows({"shape": AWKWARD_MAPS, "fmt": list(FORMATS), "training": TRAINING})
def test_backward_of_awkward_shapes(backend, dtype, fmt, shape, training):
    check_backward(backend, dtype, fmt, shape, training=training)


@rows({"activation": ACTIVATIONS, "residual": FLAG, "training": TRAINING, "affine": FLAG})
def test_backward_flags(backend, dtype, activation, residual, training, affine):
    flags = {"training": training, "residual": residual, "affine": affine}
    flags["activation"] = activation
    check_backward(backend, dtype, "channels_last", (2, 24, 4, 5), **flags)


@formats
def test_backward_sums_what_cancels(backend, fmt):
    """A sum far smaller than its terms is right to its last digit.

    On the CPU the rows of a channels-last map are summed in float32, a few hundred at a time, so
    there the error is bounded by the terms: by a float32 rounding of the sum of their magnitudes.
    """
    x, grad = normal(2, 2, 4, 60, 60, dtype=torch.float32)
    grad += 100.0 * x.sign()
    grad -= grad.mean((0, 2, 3), keepdim=True)
    x, grad = laid_out(fmt, x, grad)
    _, _, dbias, _ = backend.ops.bn_add_relu_backward(
        grad, x, None, None, torch.zeros(4), torch.ones(4), True, EPS, False, False
    )
    truth, terms = grad.double().sum((0, 2, 3)), grad.double().abs().sum((0, 2, 3))
    assert (truth.abs() < 1e-7 * terms).all()
    if backend.name == "cpu" and fmt == "channels_last":
        assert ((dbias.double() - truth).abs() <= 2**-24 * terms).all()
    else:
        torch.testing.assert_close(dbias.double(), truth, rtol=1e-6, atol=1e-8)


# Inputs that are not plain


@pytest.mark.variants
@rows({"which": VIEWS})
def test_views_give_what_their_copies_give(backend, dtype, which):
    x, r, grad = (views((2, 16, 4, 4), dtype)[which] for _ in range(3))
    bn = batch_norm(16, dtype)
    before = x.clone()
    results = []
    for a, b, c in ((x, r, grad), [t.clone() for t in (x, r, grad)]):
        y, mean, var = forward(backend, a, bn, b, training=True)
        back = backend.ops.bn_add_relu_backward(c, a, y, bn[0], mean, var, True, EPS, True, True)
        results.append((y, *back))
    for of_view, of_copy in zip(*results, strict=True):
        rtol = torch.finfo(of_view.dtype).eps * 4
        torch.testing.assert_close(of_view, of_copy, rtol=rtol, atol=rtol)
    # Without sums over the map each element is computed alike.
    assert torch.equal(forward(backend, x, bn)[0], forward(backend, before, bn)[0])
    assert torch.equal(x, before)


@pytest.mark.variants
@formats
def test_nothing_is_read_or_written_beside_the_maps(backend, fmt):
    """A map inside of a buffer of NaN: none reaches the result, and all of them stay."""
    shape = (2, 9, 3, 5)
    size = 2 * 9 * 3 * 5
    buffer = torch.full((size + 34,), float("nan"))
    inner = buffer[17 : 17 + size]
    x = inner.view(shape) if fmt == "contiguous" else inner.view(2, 3, 5, 9).permute(0, 3, 1, 2)
    x.copy_(normal(*shape, dtype=torch.float32))
    y, mean, _ = forward(backend, x, [None] * 4, training=True)
    assert torch.isfinite(y).all()
    assert torch.isfinite(mean).all()
    assert torch.isnan(buffer[:17]).all()
    assert torch.isnan(buffer[-17:]).all()


@modes
def test_non_finite_values_pass_through(backend, fmt, training):
    """NaN and both infinities, of x and of the residual, each in channels of its own."""
    x, r = normal(2, 2, 16, 6, 6, dtype=torch.float32)
    for channel, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        x[1, channel, 4, 5] = x[0, 3 + channel, 0, 0] = value
        r[0, 6 + channel, 2, 2] = r[1, 9 + channel, 5, 5] = value
    x, r = laid_out(fmt, x, r)
    bn = batch_norm(16, torch.float32)
    y, _, _ = forward(backend, x, bn, r, training=training)
    expected = reference.bn_add_relu(x, *[t.clone() for t in bn], r, training=training)
    torch.testing.assert_close(y, expected, rtol=2e-5, atol=2e-5, equal_nan=True)


@formats
def test_non_finite_gradients_pass_through(backend, fmt):
    x, grad = normal(2, 2, 16, 6, 6, dtype=torch.float32)
    grad[0, 1, 2, 3], grad[1, 2, 0, 0] = float("inf"), float("nan")
    x, grad = laid_out(fmt, x, grad)
    weight, _, mean, var = batch_norm(16, torch.float32)
    y = torch.ones_like(x)
    y[:, 5, 0, 0] = float("nan")
    args = (grad, x, y, weight, mean, var)
    results = backend.ops.bn_add_relu_backward(*args, True, EPS, True, True)
    expected = exact_backward(*args)
    finite = [i for i in range(16) if i not in (1, 2)]
    for ours, theirs in zip(results, expected, strict=True):
        a, b = (t[finite] if t.dim() == 1 else t[:, finite] for t in (ours, theirs))
        torch.testing.assert_close(a, b.float(), rtol=2e-5, atol=2e-4, equal_nan=True)
    for gradients in results[1:3]:
        assert not gradients[[1, 2]].isfinite().any()
    # Through its channel's sums a gradient that is not finite reaches the whole channel.
    assert not results[0][:, [1, 2]].isfinite().any()
    torch.testing.assert_close(results[3], expected[3].float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.variants
@modes
def test_empty_batch(backend, fmt, training):
    (x,) = laid_out(fmt, torch.empty(0, 8, 6, 6))
    bn = batch_norm(8, torch.float32)
    y, mean, var = forward(backend, x, bn, training=training)
    assert y.shape == x.shape
    statistics = (mean, var) if training else bn[2:4]
    dx, dweight, dbias, dr = backend.ops.bn_add_relu_backward(
        x, x, y, bn[0], *statistics, training, EPS, True, True
    )
    assert dx.shape == dr.shape == x.shape
    assert not mean.any()
    assert not var.any()
    assert not dweight.any()
    assert not dbias.any()
    assert mean.shape == var.shape == ((8,) if training else (0,))
    assert backend.launches() == []


# Determinism, errors


@formats
def test_same_bits_in_any_order(backend, fmt):
    """Of threads or programs, whichever a backend has."""
    x, grad = laid_out(fmt, *normal(2, 3, 24, 21, 20, dtype=torch.bfloat16))
    weight, bias, mean, var = batch_norm(24, torch.bfloat16)
    results = []
    for _ in backend.orders():
        y, *statistics = forward(backend, x, (weight, bias, mean, var), training=True)
        args = (grad, x, y, weight, *statistics, True, EPS, True, True)
        results.append((y, *statistics, *backend.ops.bn_add_relu_backward(*args)))
    assert len(results) > 1
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@on_gpu_kernels
def test_float64_is_refused(backend):
    x, one = torch.randn(2, 4, 5, 5).double(), torch.ones(4)
    with pytest.raises(TypeError, match="bn_add_relu: x: expected dtype float32, bfloat16 or floa"):
        forward(backend, x, [one] * 4)


def test_wrong_arguments_are_named(backend):
    x, one = torch.randn(2, 4, 5, 5), torch.ones(4)
    with pytest.raises(ValueError, match=r"bn_add_relu: weight: expected shape \[4\]"):
        forward(backend, x, [one[:3], one, one, one])
    with pytest.raises(ValueError, match="running_mean, running_var: expected tensors"):
        forward(backend, x, [None] * 4)
    with pytest.raises(ValueError, match="residual: expected shape"):
        forward(backend, x, [one] * 4, x[:1])
    with pytest.raises(ValueError, match="bn_add_relu_backward: y: expected a tensor"):
        backend.ops.bn_add_relu_backward(x, x, None, one, one, one, True, EPS, True, False)
    with pytest.raises(ValueError, match="bn_add_relu: x: expected 4 dimensions"):
        forward(backend, x[0], [one] * 4)
