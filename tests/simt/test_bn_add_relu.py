"""Batch norm's CUDA kernels, forward and backward, every thread of them executed on the CPU."""

from __future__ import annotations

import pytest
import torch
from cases import FORMATS, MAPS, batch_norm, doubled, normal
from tolerances import assert_as_exact_as_pytorch, error
from torch import Tensor

from fused_resnet import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
formats = pytest.mark.parametrize("fmt", FORMATS)
maps = pytest.mark.parametrize("shape", MAPS.values(), ids=MAPS)
extras = pytest.mark.parametrize(
    ("relu", "residual"), [(True, True), (True, False), (False, True), (False, False)]
)
EPS = 1e-5

#: Small, and each for a reason: what every build and schedule runs.
AWKWARD = {
    "one-channel": (3, 1, 5, 5),
    "prime-channels": (2, 37, 5, 3),
    "one-pixel": (5, 16, 1, 1),
    "packs-in-both-formats": (2, 24, 4, 4),
    "two-slabs": (2, 8, 40, 41),
}
awkward = pytest.mark.parametrize("shape", AWKWARD.values(), ids=AWKWARD)


def forward(simt, x, bn, residual=None, *, training=False, relu=True):
    return simt.ops.bn_add_relu(x, *bn, residual, training, EPS, relu)


def laid_out(fmt: str, *tensors: Tensor) -> list[Tensor]:
    return [t.contiguous(memory_format=FORMATS[fmt]) for t in tensors]


# Forward


def check_forward(simt, dtype, fmt, shape, *, training, relu=True, residual=True):
    x, r = laid_out(fmt, normal(*shape, dtype=dtype, shift=2.0), normal(*shape, dtype=dtype))
    added = [r] if residual else []
    bn = batch_norm(shape[1], dtype)
    options = {"training": training, "relu": relu, "eps": EPS}
    truth_bn, eager_bn = doubled(bn), [t.clone() for t in bn]
    truth = reference.bn_add_relu(doubled(x), *truth_bn, *doubled(added), momentum=1.0, **options)
    eager = reference.bn_add_relu(x, *eager_bn, *added, momentum=1.0, **options)
    y, mean, var = forward(simt, x, bn, *added, training=training, relu=relu)
    assert_as_exact_as_pytorch(y, eager, truth)
    assert y.is_contiguous(memory_format=FORMATS[fmt])
    assert mean.dtype == var.dtype == torch.float32
    if not training:
        assert mean.numel() == var.numel() == 0
        return
    # With momentum 1 the running statistics are the batch's; their variance is the unbiased one.
    count = x.numel() // shape[1]
    assert error(mean, truth_bn[2]) < 5e-7
    assert error(var, truth_bn[3] * (count - 1) / count) < 1e-6


@dtypes
@formats
@maps
@pytest.mark.parametrize("training", [False, True])
def test_forward(simt, dtype, fmt, shape, training):
    check_forward(simt, dtype, fmt, shape, training=training)


@pytest.mark.variants
@dtypes
@formats
@awkward
@pytest.mark.parametrize("training", [False, True])
def test_forward_of_awkward_shapes(simt, dtype, fmt, shape, training):
    check_forward(simt, dtype, fmt, shape, training=training)


@dtypes
@extras
@pytest.mark.parametrize("training", [False, True])
def test_forward_flags(simt, dtype, relu, residual, training):
    check_forward(
        simt, dtype, "channels_last", (2, 24, 4, 5), training=training, relu=relu, residual=residual
    )


@formats
@awkward
def test_statistics_survive_a_large_mean(simt, fmt, shape):
    """A mean a thousand times the deviation: sums of squares would lose every digit."""
    (x,) = laid_out(fmt, normal(*shape, dtype=torch.float32, shift=1000.0))
    _, mean, var = forward(simt, x, [None] * 4, training=True)
    wide = x.double()
    assert error(mean, wide.mean((0, 2, 3))) < 1e-7
    assert error(var, wide.var((0, 2, 3), correction=0)) < 1e-6


@formats
def test_a_first_value_far_from_the_others(simt, fmt):
    """It is the pivot from which the kernel measures: only then is its size what rounding is of."""
    x = normal(3, 16, 9, 9, dtype=torch.float32)
    x[0, :, 0, 0] = 1e4
    (x,) = laid_out(fmt, x)
    _, mean, var = forward(simt, x, [None] * 4, training=True)
    wide = x.double()
    assert (mean - wide.mean((0, 2, 3))).abs().max() < 1e-7 * 1e4
    assert error(var, wide.var((0, 2, 3), correction=0)) < 1e-6


def test_no_affine_no_statistics(simt):
    x = normal(2, 8, 5, 5, dtype=torch.float32)
    y, _, _ = forward(simt, x, [None] * 4, training=True)
    truth = reference.bn_add_relu(doubled(x), None, None, None, None, training=True)
    torch.testing.assert_close(y.double(), truth, rtol=1e-5, atol=1e-5)


@dtypes
def test_batch_norm_in_the_type_of_the_map(simt, dtype):
    x = normal(2, 8, 5, 5, dtype=dtype)
    bn = [t.to(dtype) for t in batch_norm(8, dtype)]
    y, _, _ = forward(simt, x, bn)
    truth = reference.bn_add_relu(doubled(x), *doubled(bn))
    assert_as_exact_as_pytorch(y, reference.bn_add_relu(x, *bn), truth)


# Backward


def eager_gradients(x, r, grad, affine, running, *, training, relu):
    """Autograd's gradients of x, r, weight and bias through the reference."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, r, *affine)]
    weight, bias = leaves[2:] if affine else (None, None)
    running = [t.clone() for t in running]
    y = reference.bn_add_relu(
        leaves[0], weight, bias, *running, leaves[1], training=training, relu=relu, eps=EPS
    )
    return torch.autograd.grad(y, leaves, grad)


def check_backward(
    simt, dtype, fmt, shape, *, training=True, relu=True, residual=True, affine=True
):
    x, r, grad = laid_out(fmt, *normal(3, *shape, dtype=dtype, shift=0.3))
    weight, bias, *running = batch_norm(shape[1], dtype)
    affine = [weight, bias] if affine else []
    options = {"training": training, "relu": relu}
    # Keep every result away from zero, or rounding decides whether it is masked.
    exact = doubled(affine) if affine else (None, None)
    y = reference.bn_add_relu(
        doubled(x), *exact, *doubled(running), doubled(r), training=training, relu=False
    )
    (r,) = laid_out(fmt, (r.double() + 0.2 * y.sign()).to(dtype))
    truth = eager_gradients(
        doubled(x), doubled(r), doubled(grad), doubled(affine), doubled(running), **options
    )
    eager = eager_gradients(x, r, grad, affine, running, **options)

    bn = [*(affine or (None, None)), *running]
    y, mean, var = forward(simt, x, bn, r, **options)
    if not training:
        mean, var = running
    dx, dweight, dbias, dr = simt.ops.bn_add_relu_backward(
        grad, x, y if relu else None, bn[0], mean, var, training, EPS, relu, residual
    )
    assert_as_exact_as_pytorch(dx, eager[0], truth[0])
    for ours, theirs, wide in zip((dweight, dbias), eager[2:], truth[2:], strict=False):
        # PyTorch sums in float64 on a CPU; one unit in the last place of the mean that the forward
        # returns is more than what that leaves.
        assert error(ours, wide) <= max(1.5 * error(theirs, wide), 2 * torch.finfo(ours.dtype).eps)
    assert dx.is_contiguous(memory_format=FORMATS[fmt])
    if residual:
        assert torch.equal(dr, grad.masked_fill(y <= 0, 0) if relu else grad)
        assert dr.is_contiguous(memory_format=FORMATS[fmt])
    else:
        assert dr.shape == (0,)


@dtypes
@formats
@maps
@pytest.mark.parametrize("training", [False, True])
def test_backward(simt, dtype, fmt, shape, training):
    check_backward(simt, dtype, fmt, shape, training=training)


@pytest.mark.variants
@dtypes
@formats
@awkward
@pytest.mark.parametrize("training", [False, True])
def test_backward_of_awkward_shapes(simt, dtype, fmt, shape, training):
    check_backward(simt, dtype, fmt, shape, training=training)


@dtypes
@extras
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_backward_flags(simt, dtype, relu, residual, training, affine):
    check_backward(
        simt, dtype, "channels_last", (2, 24, 4, 5),
        training=training, relu=relu, residual=residual, affine=affine,
    )  # fmt: skip


@pytest.mark.slow
@formats
@pytest.mark.parametrize("shape", [(2, 64, 56, 56), (4, 256, 28, 28), (4, 2048, 7, 7)], ids=str)
def test_sizes_of_resnet(simt, fmt, shape):
    check_forward(simt, torch.bfloat16, fmt, shape, training=True)
    check_backward(simt, torch.bfloat16, fmt, shape)


@formats
def test_backward_sums_what_cancels(simt, fmt):
    """A sum far smaller than its terms is right to its last digit."""
    x, grad = normal(2, 2, 4, 60, 60, dtype=torch.float32)
    grad += 100.0 * x.sign()
    grad -= grad.mean((0, 2, 3), keepdim=True)
    x, grad = laid_out(fmt, x, grad)
    _, _, dbias, _ = simt.ops.bn_add_relu_backward(
        grad, x, None, None, torch.zeros(4), torch.ones(4), True, EPS, False, False
    )
    truth = grad.double().sum((0, 2, 3))
    assert (truth.abs() < 1e-7 * grad.double().abs().sum((0, 2, 3))).all()
    torch.testing.assert_close(dbias.double(), truth, rtol=1e-6, atol=1e-8)


# Inputs that are not plain


def views(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    n, c, h, w = shape
    last = normal(2 * n, c, h, w, dtype=dtype).contiguous(memory_format=torch.channels_last)
    # One element past a multiple of 16 bytes.
    flat = normal(1, 1, 1, n * c * h * w + 1, dtype=dtype).flatten()[1:]
    return {
        "sliced": normal(n + 1, c + 3, h + 2, w * 2, dtype=dtype)[1:, 2:-1, 1:-1, ::2],
        "transposed": normal(n, c, w, h, dtype=dtype).transpose(2, 3),
        "expanded": normal(1, c, h, w, dtype=dtype).expand(n, c, h, w),
        "batch-sliced": last[::2],
        "misaligned": flat.view(n, c, h, w),
        "misaligned channels_last": flat.view(n, h, w, c).permute(0, 3, 1, 2),
    }


@pytest.mark.variants
@dtypes
@pytest.mark.parametrize("which", views((1, 1, 1, 1), torch.float32))
def test_views_give_what_their_copies_give(simt, dtype, which):
    x, r, grad = (views((2, 16, 4, 4), dtype)[which] for _ in range(3))
    bn = batch_norm(16, dtype)
    before = x.clone()
    results = []
    for a, b, c in ((x, r, grad), [t.clone() for t in (x, r, grad)]):
        y, mean, var = forward(simt, a, bn, b, training=True)
        back = simt.ops.bn_add_relu_backward(c, a, y, bn[0], mean, var, True, EPS, True, True)
        results.append((y, *back))
    for of_view, of_copy in zip(*results, strict=True):
        rtol = torch.finfo(of_view.dtype).eps * 4
        torch.testing.assert_close(of_view, of_copy, rtol=rtol, atol=rtol)
    assert torch.equal(x, before)


@pytest.mark.variants
@formats
def test_nothing_is_read_or_written_beside_the_maps(simt, fmt):
    """A map inside of a buffer of NaN: none reaches the result, and all of them stay."""
    shape = (2, 9, 3, 5)
    size = 2 * 9 * 3 * 5
    buffer = torch.full((size + 34,), float("nan"))
    inner = buffer[17 : 17 + size]
    x = inner.view(shape) if fmt == "contiguous" else inner.view(2, 3, 5, 9).permute(0, 3, 1, 2)
    x.copy_(normal(*shape, dtype=torch.float32))
    y, mean, _ = forward(simt, x, [None] * 4, training=True)
    assert torch.isfinite(y).all()
    assert torch.isfinite(mean).all()
    assert torch.isnan(buffer[:17]).all()
    assert torch.isnan(buffer[-17:]).all()


@formats
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_pass_through(simt, fmt, training, value):
    x = normal(2, 16, 6, 6, dtype=torch.float32)
    x[1, 3, 4, 5] = value
    x[0, 5, 0, 0] = value
    (x,) = laid_out(fmt, x)
    bn = batch_norm(16, torch.float32)
    y, _, _ = forward(simt, x, bn, training=training)
    expected = reference.bn_add_relu(x, *[t.clone() for t in bn], training=training)
    torch.testing.assert_close(y, expected, rtol=2e-5, atol=2e-5, equal_nan=True)


@formats
def test_non_finite_gradients_pass_through(simt, fmt):
    x, grad = normal(2, 2, 16, 6, 6, dtype=torch.float32)
    grad[0, 1, 2, 3], grad[1, 2, 0, 0] = float("inf"), float("nan")
    x, grad = laid_out(fmt, x, grad)
    weight, _, mean, var = batch_norm(16, torch.float32)
    y = torch.ones_like(x)
    y[:, 5, 0, 0] = float("nan")
    results = simt.ops.bn_add_relu_backward(grad, x, y, weight, mean, var, True, EPS, True, True)
    expected = torch.ops.fused_resnet.bn_add_relu_backward(
        grad, x, y, weight, mean, var, True, EPS, True, True
    )
    torch.testing.assert_close(results, expected, rtol=2e-5, atol=2e-4, equal_nan=True)


@pytest.mark.variants
@formats
@pytest.mark.parametrize("training", [False, True])
def test_empty_batch(simt, fmt, training):
    (x,) = laid_out(fmt, torch.empty(0, 8, 6, 6))
    bn = batch_norm(8, torch.float32)
    y, mean, var = forward(simt, x, bn, training=training)
    assert y.shape == x.shape
    statistics = (mean, var) if training else bn[2:4]
    dx, dweight, dbias, dr = simt.ops.bn_add_relu_backward(
        x, x, y, bn[0], *statistics, training, EPS, True, True
    )
    assert dx.shape == dr.shape == x.shape
    assert not mean.any()
    assert not var.any()
    assert not dweight.any()
    assert not dbias.any()
    assert mean.shape == var.shape == ((8,) if training else (0,))


# Determinism, instances, errors


@pytest.mark.parametrize("fmt", FORMATS)
def test_same_bits_in_any_order_of_threads(simt, fmt):
    x, grad = laid_out(fmt, *normal(2, 3, 24, 21, 20, dtype=torch.bfloat16))
    weight, bias, mean, var = batch_norm(24, torch.bfloat16)
    results = []
    for seed in (0, 1, 2, 1):
        simt.seed(seed)
        y, *statistics = forward(simt, x, (weight, bias, mean, var), training=True)
        back = simt.ops.bn_add_relu_backward(grad, x, y, weight, *statistics, True, EPS, True, True)
        results.append((y, *statistics, *back))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@dtypes
@pytest.mark.parametrize(
    ("shape", "fmt", "packs"),
    [
        ((2, 16, 3, 3), "channels_last", True),
        ((2, 15, 4, 4), "channels_last", False),
        ((2, 15, 4, 4), "contiguous", True),
        ((2, 16, 3, 3), "contiguous", False),
        ((2, 1, 4, 4), "channels_last", True),
        ((2, 16, 1, 1), "contiguous", True),
    ],
)
def test_packs_wherever_they_fit(simt, dtype, shape, fmt, packs):
    (x,) = laid_out(fmt, normal(*shape, dtype=dtype))
    simt.launches()
    forward(simt, x, [None] * 4, training=True)
    names = [launch.kernel for launch in simt.launches()]
    assert len(names) == 3
    width = 16 // dtype.itemsize if packs else 1
    assert f", {width}>" in names[0]
    assert f", {width}>" in names[2]


def test_wrong_arguments_are_named(simt):
    x, one = torch.randn(2, 4, 5, 5), torch.ones(4)
    with pytest.raises(
        TypeError, match="bn_add_relu: x: expected dtype float32, bfloat16 or float"
    ):
        forward(simt, x.double(), [one] * 4)
    with pytest.raises(ValueError, match=r"bn_add_relu: weight: expected shape \[4\]"):
        forward(simt, x, [one[:3], one, one, one])
    with pytest.raises(ValueError, match="running_mean, running_var: expected tensors"):
        forward(simt, x, [None] * 4)
    with pytest.raises(ValueError, match="residual: expected shape"):
        forward(simt, x, [one] * 4, x[:1])
    with pytest.raises(ValueError, match="bn_add_relu_backward: y: expected a tensor"):
        simt.ops.bn_add_relu_backward(x, x, None, one, one, one, True, EPS, True, False)
