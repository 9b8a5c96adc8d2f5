r"""Backward of batch norm, residual and ReLU.

With dz the gradient before the activation, xc = x - mean and m the number of values per channel:

    dbias = sum dz,  dweight = sum(dz xc) / std,
    dx = scale (dz - sum dz / m - xc sum(dz xc) / (m var)) = a dz + b xc + c   per channel;

with running statistics b and c are zero.

Memory-bound. A reducing kernel reads grad, x and y, and the kernel that writes dx reads them again.
Where the residual needs a gradient the first one writes dz, which is that gradient, and the second
one reads dz in place of grad and y: 7 elements moved for about 40 flops. Tiles are those of
``_bn_map.py``; designed for two programs on a multiprocessor, with 128 registers a thread, because
of the sums.

The sums may cancel, so they are kept as pairs of float32 (Knuth's two-sum) and added in float64 in
a fixed order. The kernel that writes dx goes through its slab backwards: the end of what the
reducing kernel has read is still in the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._activation import gradient
from ._bn_map import BnConfig, BnMap, map_offsets
from ._common import channel_vector, check_same


@triton.jit
def _two_sum(high, low, v):  # type: ignore[no-untyped-def]
    """(high, low) + v, with the rounding error of high added to low.

    Args:
        high: Sum, float32.
        low: What the sum has lost by rounding, float32.
        v: Values to add.
    """
    total = high + v
    part = total - high
    return total, low + ((high - (total - part)) + (v - part))


@triton.jit
def bn_backward_reduce_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, x_ptr, y_ptr, dz_ptr,
    mean_ptr, partial_ptr,
    R, C, P, slab_rows,
    ACTIVATION: tl.constexpr,
    LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dz = grad where y > 0, sum dz, sum dz (x - mean), for each slab of rows.

    Args:
        grad_ptr: Gradient of the result y, as x.
        x_ptr: Input, (R, C) in NHWC, (R / P, C, P) in NCHW.
        y_ptr: Result, as x, or None: no mask.
        dz_ptr: Receives dz, as x; or None.
        mean_ptr: Mean of x, (C,) any float.
        partial_ptr: Receives both sums of each slab, (slabs, 2, C) float64.
        R: Pixels of the batch: the rows of the map.
        C: Channels of the map.
        P: Pixels of an image.
        slab_rows: Rows of a slab; the last slab may have fewer.
        ACTIVATION: Number of the activation.
        LAST: Whether a pixel's channels are neighbours in memory (NHWC), or its plane's pixels
            (NCHW).
        BLOCK_R: Rows of a tile.
        BLOCK_C: Channels of a tile.
    """
    slab = tl.program_id(1)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean = channel_vector(mean_ptr, c, c < C, 0.0)
    begin = slab * slab_rows
    end = tl.minimum(begin + slab_rows, R)
    sum_high = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    sum_low = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    dot_high = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    dot_low = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for r0 in range(begin, end, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        valid = (r < end)[:, None] & (c < C)[None, :]
        at = map_offsets(r, c, C, P, LAST)
        dz = tl.load(grad_ptr + at, mask=valid, other=0.0).to(tl.float32)
        if y_ptr is not None:
            y = tl.load(y_ptr + at, mask=valid, other=0.0).to(tl.float32)
            dz = gradient(dz, y, ACTIVATION)
        if dz_ptr is not None:
            tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=valid)
        xc = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32) - mean[None, :]
        xc = tl.where(valid, xc, 0.0)
        sum_high, sum_low = _two_sum(sum_high, sum_low, dz)
        dot_high, dot_low = _two_sum(dot_high, dot_low, dz * xc)
    # High and low are widened to float64 before they are summed: in float32 low would be lost.
    sums = tl.sum(sum_high.to(tl.float64), 0) + tl.sum(sum_low.to(tl.float64), 0)
    dots = tl.sum(dot_high.to(tl.float64), 0) + tl.sum(dot_low.to(tl.float64), 0)
    to = partial_ptr + slab.to(tl.int64) * 2 * C + c
    tl.store(to, sums, mask=c < C)
    tl.store(to + C, dots, mask=c < C)


@triton.jit
def bn_backward_finish_kernel(  # type: ignore[no-untyped-def]
    partial_ptr,
    weight_ptr, var_ptr,
    dweight_ptr, dbias_ptr,
    coefficient_ptr,
    R, C, slabs, eps,
    TRAINING: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of weight and bias, and the coefficients a, b, c of the gradient of x.

    Args:
        partial_ptr: sum dz and sum dz (x - mean) of each slab, (slabs, 2, C) float64.
        weight_ptr: Weight of the batch norm, (C,) any float, or None for 1.
        var_ptr: Biased variance of x, (C,) any float.
        dweight_ptr: Receives the gradient of the weight, (C,) float32.
        dbias_ptr: Receives the gradient of the bias, (C,) float32.
        coefficient_ptr: Receives a, b and c, (3, C) float32.
        R: Pixels of the batch: the rows of the map.
        C: Channels of the map.
        slabs: Number of slabs.
        eps: Added to the variance.
        TRAINING: Whether the statistics are the batch's; else b and c are not written.
        BLOCK_S: Slabs at a time.
        BLOCK_C: Channels of a program.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    dz = tl.zeros((BLOCK_C,), tl.float64)
    dot = tl.zeros((BLOCK_C,), tl.float64)
    for s0 in range(0, slabs, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        valid = (s < slabs)[:, None] & (c < C)[None, :]
        at = partial_ptr + s.to(tl.int64)[:, None] * 2 * C + c[None, :]
        dz += tl.sum(tl.load(at, mask=valid, other=0.0), 0)
        dot += tl.sum(tl.load(at + C, mask=valid, other=0.0), 0)
    one = tl.full((BLOCK_C,), 1.0, tl.float64)
    invstd = one / tl.sqrt(channel_vector(var_ptr, c, c < C, 1.0).to(tl.float64) + eps)
    a = channel_vector(weight_ptr, c, c < C, 1.0).to(tl.float64) * invstd
    tl.store(dbias_ptr + c, dz.to(tl.float32), mask=c < C)
    tl.store(dweight_ptr + c, (dot * invstd).to(tl.float32), mask=c < C)
    tl.store(coefficient_ptr + c, a.to(tl.float32), mask=c < C)
    if TRAINING:
        rows = one * R
        b = -a * dot * invstd * invstd / rows
        tl.store(coefficient_ptr + C + c, b.to(tl.float32), mask=c < C)
        tl.store(coefficient_ptr + 2 * C + c, (-a * dz / rows).to(tl.float32), mask=c < C)


@triton.jit
def bn_backward_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, x_ptr, y_ptr, dx_ptr,
    mean_ptr, coefficient_ptr,
    R, C, P, slab_rows,
    ACTIVATION: tl.constexpr,
    LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = a dz + b (x - mean) + c, for a slab of rows.

    Args:
        grad_ptr: Gradient of the result y, as x; without y it is dz.
        x_ptr: Input, (R, C) in NHWC, (R / P, C, P) in NCHW; None where b and c are zero.
        y_ptr: Result, as x, or None: no mask.
        dx_ptr: Receives dx, as x.
        mean_ptr: Mean of x, (C,) any float.
        coefficient_ptr: a, b and c, (3, C) float32.
        R: Pixels of the batch: the rows of the map.
        C: Channels of the map.
        P: Pixels of an image.
        slab_rows: Rows of a slab; the last slab may have fewer.
        ACTIVATION: Number of the activation.
        LAST: Whether a pixel's channels are neighbours in memory (NHWC), or its plane's pixels
            (NCHW).
        BLOCK_R: Rows of a tile.
        BLOCK_C: Channels of a tile.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    scale = channel_vector(coefficient_ptr, c, c < C, 0.0)
    if x_ptr is not None:
        mean = channel_vector(mean_ptr, c, c < C, 0.0)
        slope = channel_vector(coefficient_ptr + C, c, c < C, 0.0)
        offset = channel_vector(coefficient_ptr + 2 * C, c, c < C, 0.0)
    begin = tl.program_id(1) * slab_rows
    end = tl.minimum(begin + slab_rows, R)
    tiles = tl.cdiv(end - begin, BLOCK_R)
    for i in range(0, tiles):
        r = begin + (tiles - 1 - i) * BLOCK_R + tl.arange(0, BLOCK_R)
        valid = (r < end)[:, None] & (c < C)[None, :]
        at = map_offsets(r, c, C, P, LAST)
        v = tl.load(grad_ptr + at, mask=valid, other=0.0).to(tl.float32)
        if y_ptr is not None:
            y = tl.load(y_ptr + at, mask=valid, other=0.0).to(tl.float32)
            v = gradient(v, y, ACTIVATION)
        v = v * scale[None, :]
        if x_ptr is not None:
            x = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32)
            v += (x - mean[None, :]) * slope[None, :] + offset[None, :]
        tl.store(dx_ptr + at, v.to(dx_ptr.dtype.element_ty), mask=valid)


def bn_add_relu_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    training: bool,
    eps: float,
    activation: int,
    need_residual: bool,
    *,
    config: BnConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`bn_add_relu`.

    Args:
        grad: Gradient of y, ``(N, C, H, W)``, dtype of ``x``.
        x: Input of the forward, ``(N, C, H, W)``; float32, float16 or bfloat16, NHWC or NCHW.
        y: Result of the forward; may be None without an activation.
        weight: Scale of the forward, ``(C,)``, any float; None means 1.
        mean: Mean that the forward used, ``(C,)``: the batch's in training, else the running one.
        var: Variance that the forward used, ``(C,)``: the batch's biased one in training, else the
            running one.
        training: Whether the statistics are functions of ``x``.
        eps: Added to the variance in the forward.
        activation: Activation that the forward applied.
        need_residual: Whether the gradient of the residual is needed.
        config: The tile, one of :data:`._bn_map.CONFIGS`; None chooses one.

    Returns:
        The gradients of x, weight, bias (both float32) and the residual (empty if not needed).

    Raises:
        ValueError: Wrong shape or device, or no ``y`` with an activation.
        TypeError: Wrong dtype.
    """
    op = "bn_add_relu_backward"
    call = BnMap(op, x, config)
    check_same(op, "grad", grad, x.shape, x)
    check_same(op, "y", y, x.shape, x)
    if activation and y is None:
        raise ValueError(f"{op}: y: expected a tensor with an activation, got None")
    weights, means = call.vector("weight", weight), call.vector("mean", mean)
    variances = call.vector("var", var)
    dx = call.result()
    dz = call.result() if need_residual else None
    dresidual = x.new_empty((0,)) if dz is None else dz
    dweight, dbias = call.floats(call.channels), call.floats(call.channels)
    if x.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_(), dresidual
    grads, xs = call.input(grad), call.input(x)
    ys = call.input(y) if activation and y is not None else None
    partial = call.floats(call.slabs, 2, call.channels, dtype=torch.float64)
    coefficients = call.floats(3, call.channels)
    act = 0 if ys is None else int(activation)
    call.launch(bn_backward_reduce_kernel, grads, xs, ys, dz, means, partial, ACTIVATION=act)
    call.finish(
        bn_backward_finish_kernel, partial, weights, variances, dweight, dbias, coefficients,
        eps=eps, TRAINING=training,
    )  # fmt: skip
    sources = (grads, ys) if dz is None else (dz, None)
    call.launch(
        bn_backward_kernel, sources[0], xs if training else None, sources[1], dx, means,
        coefficients, ACTIVATION=act if dz is None else 0,
    )  # fmt: skip
    return dx, dweight, dbias, dresidual
