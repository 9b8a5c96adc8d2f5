r"""Forward of batch norm, residual and ReLU: y = relu((x - mean) * scale + bias [+ r]).

Memory-bound. Inference reads x (and r) and writes y: 2 or 3 elements moved for 4 flops. Training
reads x once more for its statistics. Tiles are those of ``_bn_map.py``; designed for four programs
on a multiprocessor, with 64 registers a thread, where memory accesses are vectorised, and for two,
with 128, where a map allows no accesses of 16 bytes.

Statistics are deterministic and keep their digits where the mean is large: a tile's mean and sum of
squared differences (M2) come from two passes over registers, tiles are merged in float64 (Chan,
Golub and LeVeque, 1983), and a finishing kernel merges the slabs in order. The kernel that writes y
goes through its slab backwards: the end of what the statistics kernel has read is still in the L2
cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._activation import activate
from ._bn_map import BnConfig, BnMap, map_offsets
from ._common import channel_vector, check_same


@triton.jit
def bn_statistics_kernel(  # type: ignore[no-untyped-def]
    x_ptr, partial_ptr,
    R, C, P, slab_rows,
    LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and M2 = sum (x - mean)^2 of each channel, for each slab of rows.

    Args:
        x_ptr: Input, (R, C) in NHWC, (R / P, C, P) in NCHW.
        partial_ptr: Receives mean and M2 of each slab, (slabs, 2, C) float64.
        R: Pixels of the batch: the rows of the map.
        C: Channels of the map.
        P: Pixels of an image.
        slab_rows: Rows of a slab; the last slab may have fewer.
        LAST: Whether a pixel's channels are neighbours in memory (NHWC), or its plane's pixels
            (NCHW).
        BLOCK_R: Rows of a tile.
        BLOCK_C: Channels of a tile.
    """
    slab = tl.program_id(1)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = slab * slab_rows
    end = tl.minimum(begin + slab_rows, R)
    mean = tl.zeros((BLOCK_C,), tl.float64)
    m2 = tl.zeros((BLOCK_C,), tl.float64)
    for r0 in range(begin, end, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        valid = (r < end)[:, None] & (c < C)[None, :]
        v = tl.load(x_ptr + map_offsets(r, c, C, P, LAST), mask=valid, other=0.0).to(tl.float32)
        count = tl.minimum(end - r0, BLOCK_R).to(tl.float32)
        rough = tl.sum(v, 0) / count
        d = tl.where(valid, v - rough[None, :], 0.0)
        left = tl.sum(d, 0)
        tile_m2 = tl.sum(d * d, 0) - left * left / count
        tile_mean = rough.to(tl.float64) + (left / count).to(tl.float64)
        before = (r0 - begin).to(tl.float64)
        share = count.to(tl.float64) / (before + count.to(tl.float64))
        delta = tile_mean - mean
        mean += delta * share
        m2 += tile_m2.to(tl.float64) + delta * delta * (before * share)
    to = partial_ptr + slab.to(tl.int64) * 2 * C + c
    tl.store(to, mean, mask=c < C)
    tl.store(to + C, m2, mask=c < C)


@triton.jit
def bn_statistics_finish_kernel(  # type: ignore[no-untyped-def]
    partial_ptr,
    weight_ptr, bias_ptr,
    mean_ptr, var_ptr, scale_ptr, shift_ptr,
    R, C, slab_rows, slabs, eps,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean, biased variance, and scale and shift of (x - mean) * scale + shift.

    Args:
        partial_ptr: Mean and M2 of each slab, (slabs, 2, C) float64.
        weight_ptr: Weight of the batch norm, (C,) any float, or None for 1.
        bias_ptr: Bias of the batch norm, (C,) any float, or None for 0.
        mean_ptr: Receives the mean, (C,) float32.
        var_ptr: Receives the biased variance, (C,) float32.
        scale_ptr: Receives the scale, (C,) float32.
        shift_ptr: Receives the shift, (C,) float32.
        R: Pixels of the batch: the rows of the map.
        C: Channels of the map.
        slab_rows: Rows of a slab; the last slab may have fewer.
        slabs: Number of slabs.
        eps: Added to the variance.
        BLOCK_S: Slabs at a time.
        BLOCK_C: Channels of a program.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C,), tl.float64)
    for s0 in range(0, slabs, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        valid = (s < slabs)[:, None] & (c < C)[None, :]
        at = partial_ptr + s.to(tl.int64)[:, None] * 2 * C + c[None, :]
        count = tl.minimum(R - s * slab_rows, slab_rows).to(tl.float64)
        total += tl.sum(tl.load(at, mask=valid, other=0.0) * count[:, None], 0)
    rows = tl.zeros((BLOCK_C,), tl.float64) + R
    mean = total / rows
    m2 = tl.zeros((BLOCK_C,), tl.float64)
    for s0 in range(0, slabs, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        valid = (s < slabs)[:, None] & (c < C)[None, :]
        at = partial_ptr + s.to(tl.int64)[:, None] * 2 * C + c[None, :]
        count = tl.minimum(R - s * slab_rows, slab_rows).to(tl.float64)
        delta = tl.load(at, mask=valid, other=0.0) - mean[None, :]
        part = tl.load(at + C, mask=valid, other=0.0) + delta * delta * count[:, None]
        m2 += tl.sum(tl.where(valid, part, 0.0), 0)
    var = m2 / rows
    scale = channel_vector(weight_ptr, c, c < C, 1.0).to(tl.float64) / tl.sqrt(var + eps)
    rounded = mean.to(tl.float32)
    # The shift compensates for rounding the mean to float32.
    shift = (rounded.to(tl.float64) - mean) * scale
    shift += channel_vector(bias_ptr, c, c < C, 0.0).to(tl.float64)
    tl.store(mean_ptr + c, rounded, mask=c < C)
    tl.store(var_ptr + c, var.to(tl.float32), mask=c < C)
    tl.store(scale_ptr + c, scale.to(tl.float32), mask=c < C)
    tl.store(shift_ptr + c, shift.to(tl.float32), mask=c < C)


@triton.jit
def bn_add_relu_kernel(  # type: ignore[no-untyped-def]
    x_ptr, residual_ptr, y_ptr,
    weight_ptr, bias_ptr, mean_ptr, var_ptr,
    R, C, P, slab_rows, eps,
    ACTIVATION: tl.constexpr, LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = act((x - mean) * weight / sqrt(var + eps) + bias + residual), for a slab of rows.

    Args:
        x_ptr: Input, (R, C) in NHWC, (R / P, C, P) in NCHW.
        residual_ptr: Map that is added, as x, or None.
        y_ptr: Receives the result, as x.
        weight_ptr: Weight of the batch norm, (C,) any float, or None for 1.
        bias_ptr: Bias of the batch norm, (C,) any float, or None for 0.
        mean_ptr: Mean of the batch norm, (C,) any float, or None for 0.
        var_ptr: Variance of the batch norm, (C,) any float, or None: the weight is the scale.
        R: Pixels of the batch: the rows of the map.
        C: Channels of the map.
        P: Pixels of an image.
        slab_rows: Rows of a slab; the last slab may have fewer.
        eps: Added to the variance.
        ACTIVATION: Number of the activation.
        LAST: Whether a pixel's channels are neighbours in memory (NHWC), or its plane's pixels
            (NCHW).
        BLOCK_R: Rows of a tile.
        BLOCK_C: Channels of a tile.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean = channel_vector(mean_ptr, c, c < C, 0.0)
    scale = channel_vector(weight_ptr, c, c < C, 1.0)
    bias = channel_vector(bias_ptr, c, c < C, 0.0)
    if var_ptr is not None:
        scale = tl.div_rn(scale, tl.sqrt_rn(channel_vector(var_ptr, c, c < C, 1.0) + eps))
    begin = tl.program_id(1) * slab_rows
    end = tl.minimum(begin + slab_rows, R)
    tiles = tl.cdiv(end - begin, BLOCK_R)
    for i in range(0, tiles):
        r = begin + (tiles - 1 - i) * BLOCK_R + tl.arange(0, BLOCK_R)
        valid = (r < end)[:, None] & (c < C)[None, :]
        at = map_offsets(r, c, C, P, LAST)
        v = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32)
        v = (v - mean[None, :]) * scale[None, :] + bias[None, :]
        if residual_ptr is not None:
            v += tl.load(residual_ptr + at, mask=valid, other=0.0).to(tl.float32)
        tl.store(y_ptr + at, activate(v, ACTIVATION).to(y_ptr.dtype.element_ty), mask=valid)


def bn_add_relu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    training: bool,
    eps: float,
    activation: int,
    *,
    config: BnConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r""":math:`y = \max(0, \gamma (x - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta + r)`.

    Args:
        x: Input, ``(N, C, H, W)``; float32, float16 or bfloat16, NHWC or NCHW.
        weight: Scale :math:`\gamma`, ``(C,)``, any float; None means 1.
        bias: Shift :math:`\beta`, ``(C,)``, any float; None means 0.
        running_mean: Mean to use in inference, ``(C,)``, any float.
        running_var: Variance to use in inference, ``(C,)``, any float.
        residual: Map that is added, :math:`r`, shape and dtype of ``x``; None means 0.
        training: Use the statistics of the batch, and return them.
        eps: Added to the variance.
        activation: Activation that is applied to the sum.
        config: The tile, one of :data:`._bn_map.CONFIGS`; None chooses one.

    Returns:
        y in the dtype and memory format of ``x``; in training the batch's mean and biased variance,
        ``(C,)`` float32, else empty.

    Raises:
        ValueError: Wrong rank, shape or device, or no running statistics in inference.
        TypeError: Wrong dtype.
    """
    op = "bn_add_relu"
    call = BnMap(op, x, config)
    check_same(op, "residual", residual, x.shape, x)
    if not training and (running_mean is None or running_var is None):
        raise ValueError(
            f"{op}: running_mean, running_var: expected tensors when not training, got None"
        )
    weight, bias = call.vector("weight", weight), call.vector("bias", bias)
    running_mean = call.vector("running_mean", running_mean)
    running_var = call.vector("running_var", running_var)
    y = call.result()
    mean = call.floats(call.channels if training else 0)
    var = torch.empty_like(mean)
    if x.numel() == 0:
        return y, mean.zero_(), var.zero_()
    xs = call.input(x)
    rs = None if residual is None else call.input(residual)
    affine = (weight, bias, running_mean, running_var)
    if training:
        partial = call.floats(call.slabs, 2, call.channels, dtype=torch.float64)
        scale, shift = call.floats(call.channels), call.floats(call.channels)
        call.launch(bn_statistics_kernel, xs, partial)
        call.finish(
            bn_statistics_finish_kernel, partial, weight, bias, mean, var, scale, shift,
            slab_rows=call.slab_rows, eps=eps,
        )  # fmt: skip
        affine = (scale, shift, mean, None)
    call.launch(bn_add_relu_kernel, xs, rs, y, *affine, eps=eps, ACTIVATION=int(activation))
    return y, mean, var


def bn_add_relu_apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    eps: float,
    activation: int,
    *,
    config: BnConfig | None = None,
) -> Tensor:
    """:func:`bn_add_relu` in training, with batch statistics that were computed before.

    Args:
        x: Input, ``(N, C, H, W)``; float32, float16 or bfloat16, NHWC or NCHW.
        weight: Scale, ``(C,)``, any float; None means 1.
        bias: Shift, ``(C,)``, any float; None means 0.
        mean: Mean of the batch, ``(C,)``, any float.
        var: Biased variance of the batch, ``(C,)``, any float.
        residual: Shape and dtype of ``x``; None means 0.
        eps: Added to the variance.
        activation: Activation that is applied to the sum.
        config: The tile, one of :data:`._bn_map.CONFIGS`; None chooses one.

    Returns:
        y in the dtype and memory format of ``x``.
    """
    return bn_add_relu(x, weight, bias, mean, var, residual, False, eps, activation, config=config)[
        0
    ]
