"""Operands of batch norm, and the comparison of a backend's forward and backward with float64."""

from __future__ import annotations

import torch
from cases import FORMATS, batch_norm, doubled, normal
from tolerances import assert_as_exact_as_pytorch, error
from torch import Tensor

from fused_resnet import reference
from fused_resnet.backends.activation import Activation, gradient

EPS = 1e-5
TRAINING = {"inference": False, "training": True}


def forward(backend, x, bn, residual=None, *, training=False, activation=Activation.RELU):
    return backend.ops.bn_add_relu(x, *bn, residual, training, EPS, activation)


def laid_out(fmt: str, *tensors: Tensor) -> list[Tensor]:
    return [t.contiguous(memory_format=FORMATS[fmt]) for t in tensors]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and of their gradients' sums."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def check_forward(
    backend, dtype, fmt, shape, *, training, activation=Activation.RELU, residual=True
):
    x, r = laid_out(fmt, normal(*shape, dtype=dtype, shift=2.0), normal(*shape, dtype=dtype))
    added = [r] if residual else []
    bn = batch_norm(shape[1], dtype)
    options = {"training": training, "activation": activation, "eps": EPS}
    truth_bn, eager_bn = doubled(bn), [t.clone() for t in bn]
    truth = reference.bn_add_relu(doubled(x), *truth_bn, *doubled(added), momentum=1.0, **options)
    eager = reference.bn_add_relu(x, *eager_bn, *added, momentum=1.0, **options)
    y, mean, var = forward(backend, x, bn, *added, training=training, activation=activation)
    assert_as_exact_as_pytorch(y, eager, truth)
    assert y.is_contiguous(memory_format=FORMATS[fmt])
    assert mean.dtype == var.dtype == wide(dtype)
    if not training:
        assert mean.numel() == var.numel() == 0
        return
    # With momentum 1 the running statistics are the batch's; their variance is the unbiased one.
    count = x.numel() // shape[1]
    assert error(mean, truth_bn[2]) < 5e-7
    assert error(var, truth_bn[3] * (count - 1) / count) < 1e-6


def eager_gradients(x, r, grad, affine, running, *, training, activation):
    """Autograd's gradients of x, r, weight and bias through the reference."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, r, *affine)]
    weight, bias = leaves[2:] if affine else (None, None)
    running = [t.clone() for t in running]
    y = reference.bn_add_relu(
        leaves[0], weight, bias, *running, leaves[1], training=training, activation=activation,
        eps=EPS,
    )  # fmt: skip
    return torch.autograd.grad(y, leaves, grad)


def check_backward(
    backend, dtype, fmt, shape, *, training=True, activation=Activation.RELU, residual=True,
    affine=True,
):  # fmt: skip
    x, r, grad = laid_out(fmt, *normal(3, *shape, dtype=dtype, shift=0.3))
    weight, bias, *running = batch_norm(shape[1], dtype)
    affine = [weight, bias] if affine else []
    options = {"training": training, "activation": activation}
    # Keep every result away from zero, or rounding decides whether it is masked.
    exact = doubled(affine) if affine else (None, None)
    y = reference.bn_add_relu(
        doubled(x), *exact, *doubled(running), doubled(r), training=training, activation="none"
    )
    (r,) = laid_out(fmt, (r.double() + 0.2 * y.sign()).to(dtype))
    truth = eager_gradients(
        doubled(x), doubled(r), doubled(grad), doubled(affine), doubled(running), **options
    )
    eager = eager_gradients(x, r, grad, affine, running, **options)

    bn = [*(affine or (None, None)), *running]
    y, mean, var = forward(backend, x, bn, r, **options)
    if not training:
        mean, var = running
    dx, dweight, dbias, dr = backend.ops.bn_add_relu_backward(
        grad, x, y if activation else None, bn[0], mean, var, training, EPS, activation, residual
    )
    assert_as_exact_as_pytorch(dx, eager[0], truth[0])
    for ours, theirs, exactly in zip((dweight, dbias), eager[2:], truth[2:], strict=False):
        # PyTorch sums in float64 on a CPU; one unit in the last place of the mean that the forward
        # returns is more than what that leaves. In float64 the truth is PyTorch's own sum.
        eps = 1e-13 if dtype is torch.float64 else torch.finfo(ours.dtype).eps
        assert error(ours, exactly) <= max(1.5 * error(theirs, exactly), 2 * eps)
    assert dx.is_contiguous(memory_format=FORMATS[fmt])
    if residual:
        expected = gradient(grad, y, activation)
        if activation in (Activation.NONE, Activation.RELU):
            assert torch.equal(dr, expected)
        else:  # a product, rounded once, from any precision
            assert_as_exact_as_pytorch(dr, expected, gradient(grad.double(), y, activation))
        assert dr.is_contiguous(memory_format=FORMATS[fmt])
    else:
        assert dr.shape == (0,)


def exact_backward(grad, x, y, weight, mean, var):
    """The formulas of training in float64: gradients of x, weight, bias and residual."""
    grad, x, weight, mean, var = doubled((grad, x, weight, mean, var))
    count = x.numel() // x.shape[1]

    def along(t: Tensor) -> Tensor:
        return t.view(-1, 1, 1)

    dz = grad.masked_fill(y <= 0, 0)
    inverse = (var + EPS).rsqrt()
    normalized = (x - along(mean)) * along(inverse)
    dbias, dweight = dz.sum((0, 2, 3)), (dz * normalized).sum((0, 2, 3))
    centered = dz - along(dbias) / count - normalized * along(dweight) / count
    return along(weight * inverse) * centered, dweight, dbias, dz


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


VIEWS = list(views((1, 1, 1, 1), torch.float32))
