r"""Batch norm, residual and ReLU, forward and backward: y = relu((x - mean) * scale + bias [+ r]).

Memory-bound. Inference reads x (and r) and writes y: 2 or 3 elements moved for 4 flops. Training
reads x once more for its statistics. Backward reads grad, x and y in a reducing kernel and again in
the one that writes dx; where the residual wants a gradient the first writes it, and the second
reads it in place of grad and y: 7 elements for about 40 flops. With dz the gradient behind ReLU and
xc = x - mean:

    dbias = sum dz,  dweight = sum(dz xc) / std,
    dx = scale (dz - sum dz / m - xc sum(dz xc) / (m var)) = a dz + b xc + c   per channel;

with running statistics b and c are zero.

Tiles are rows (pixels, counted through the batch) by channels, 2048 elements for 256 threads: each
has one or two loads of 16 bytes under way for every operand, and the compiler orders a tile's
threads along whatever is contiguous, channels in NHWC or pixels in NCHW, so one kernel does both. A
program goes through a slab of rows, as long as any other's, with four programs for every
multiprocessor: what a channel needs is loaded once. Occupancy designed for: four programs, of 64
registers a thread, where memory is vectorised; two, of 128, for the sums of backward and for maps
that allow no loads of 16 bytes.

Statistics are deterministic and lose no digits where the mean is large: a tile's mean and sum of
squared differences (M2) come from two passes over registers, tiles are merged in float64 after
Chan, Golub and LeVeque, and a finishing kernel merges slabs in order. Backward's sums, which may
cancel, are kept as pairs of float32 (Knuth's two-sum). The kernel that writes goes through its slab
backwards: the end of what the one before it has read is still in the L2 cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ._common import (
    Kernel,
    cdiv,
    channel_vector,
    check_map,
    check_same,
    multiprocessors,
    on_device,
    power_of_two,
    relu,
    vector,
)


class BnConfig(NamedTuple):
    """A tile: rows, channels, and the warps that share it."""

    block_r: int
    block_c: int
    warps: int = 8


#: From one channel (planes of NCHW) to 64 (NHWC), always 2048 elements.
CONFIGS = [BnConfig(2048 // c, c) for c in (1, 2, 4, 8, 16, 32, 64)]

#: Of a thread: what two programs on a multiprocessor leave to each.
BN_REGISTERS = 128

#: Channels of a program, and slabs at a time, of the kernels that finish sums.
FINISH_C, FINISH_S = 32, 32


@triton.jit
def _offsets(r, c, C, P, LAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where pixel r and channel c lie, in NHWC (LAST) or in NCHW with P pixels a plane."""
    if LAST:
        return r.to(tl.int64)[:, None] * C + c[None, :]
    else:
        image = r // P
        return (image.to(tl.int64) * C * P + r - image * P)[:, None] + (c * P)[None, :]


@triton.jit
def _two_sum(high, low, v):  # type: ignore[no-untyped-def]
    """(high, low) + v, with what high loses in low."""
    total = high + v
    part = total - high
    return total, low + ((high - (total - part)) + (v - part))


@triton.jit
def bn_statistics_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # (R, C) in NHWC, (R / P, C, P) in NCHW
    partial_ptr,  # (slabs, 2, C) float64: mean, M2
    R, C, P, slab_rows,
    LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Statistics of each slab of rows."""
    slab = tl.program_id(1)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = slab * slab_rows
    end = tl.minimum(begin + slab_rows, R)
    mean = tl.zeros((BLOCK_C,), tl.float64)
    m2 = tl.zeros((BLOCK_C,), tl.float64)
    for r0 in range(begin, end, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        valid = (r < end)[:, None] & (c < C)[None, :]
        v = tl.load(x_ptr + _offsets(r, c, C, P, LAST), mask=valid, other=0.0).to(tl.float32)
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
    partial_ptr,  # (slabs, 2, C) float64: mean, M2
    weight_ptr, bias_ptr,  # (C,) any float, or None
    mean_ptr, var_ptr, scale_ptr, shift_ptr,  # (C,) float32
    R, C, slab_rows, slabs, eps,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean, biased variance, and scale and shift of ``(x - mean) * scale + shift``."""
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
    # The shift makes good what rounding the mean to float32 has lost.
    shift = (rounded.to(tl.float64) - mean) * scale
    shift += channel_vector(bias_ptr, c, c < C, 0.0).to(tl.float64)
    tl.store(mean_ptr + c, rounded, mask=c < C)
    tl.store(var_ptr + c, var.to(tl.float32), mask=c < C)
    tl.store(scale_ptr + c, scale.to(tl.float32), mask=c < C)
    tl.store(shift_ptr + c, shift.to(tl.float32), mask=c < C)


@triton.jit
def bn_add_relu_kernel(  # type: ignore[no-untyped-def]
    x_ptr, residual_ptr, y_ptr,  # (R, C) in NHWC, (R / P, C, P) in NCHW; residual or None
    weight_ptr, bias_ptr, mean_ptr, var_ptr,  # (C,) any float, or None; no var: weight is the scale
    R, C, P, slab_rows, eps,
    RELU: tl.constexpr, LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Applies statistics that are known."""
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
        at = _offsets(r, c, C, P, LAST)
        v = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32)
        v = (v - mean[None, :]) * scale[None, :] + bias[None, :]
        if residual_ptr is not None:
            v += tl.load(residual_ptr + at, mask=valid, other=0.0).to(tl.float32)
        if RELU:
            v = relu(v)
        tl.store(y_ptr + at, v.to(y_ptr.dtype.element_ty), mask=valid)


@triton.jit
def bn_backward_reduce_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, x_ptr, y_ptr, dz_ptr,  # (R, C) in NHWC, (R / P, C, P) in NCHW; y and dz or None
    mean_ptr,  # (C,) any float
    partial_ptr,  # (slabs, 2, C) float64: sum dz, sum dz (x - mean)
    R, C, P, slab_rows,
    LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of each slab of rows, and the gradient behind ReLU."""
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
        at = _offsets(r, c, C, P, LAST)
        dz = tl.load(grad_ptr + at, mask=valid, other=0.0).to(tl.float32)
        if y_ptr is not None:
            y = tl.load(y_ptr + at, mask=valid, other=0.0).to(tl.float32)
            dz = tl.where(y <= 0.0, 0.0, dz)
        if dz_ptr is not None:
            tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=valid)
        xc = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32) - mean[None, :]
        xc = tl.where(valid, xc, 0.0)
        sum_high, sum_low = _two_sum(sum_high, sum_low, dz)
        dot_high, dot_low = _two_sum(dot_high, dot_low, dz * xc)
    # High and low parts one after the other: summed before they are widened, low would be lost.
    sums = tl.sum(sum_high.to(tl.float64), 0) + tl.sum(sum_low.to(tl.float64), 0)
    dots = tl.sum(dot_high.to(tl.float64), 0) + tl.sum(dot_low.to(tl.float64), 0)
    to = partial_ptr + slab.to(tl.int64) * 2 * C + c
    tl.store(to, sums, mask=c < C)
    tl.store(to + C, dots, mask=c < C)


@triton.jit
def bn_backward_finish_kernel(  # type: ignore[no-untyped-def]
    partial_ptr,  # (slabs, 2, C) float64: sum dz, sum dz (x - mean)
    weight_ptr, var_ptr,  # (C,) any float; weight or None
    dweight_ptr, dbias_ptr,  # (C,) float32
    coefficient_ptr,  # (3, C) float32: a, b, c
    R, C, slabs, eps,
    TRAINING: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of weight and bias, and the coefficients of that of x."""
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
    grad_ptr, x_ptr, y_ptr, dx_ptr,  # (R, C) in NHWC, (R / P, C, P) in NCHW; x and y or None
    mean_ptr,  # (C,) any float
    coefficient_ptr,  # (3, C) float32: a, b, c
    R, C, P, slab_rows,
    LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = a dz + b (x - mean) + c. Without y, grad is dz; without x, b and c are zero."""
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
        at = _offsets(r, c, C, P, LAST)
        v = tl.load(grad_ptr + at, mask=valid, other=0.0).to(tl.float32)
        if y_ptr is not None:
            y = tl.load(y_ptr + at, mask=valid, other=0.0).to(tl.float32)
            v = tl.where(y <= 0.0, 0.0, v)
        v = v * scale[None, :]
        if x_ptr is not None:
            x = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32)
            v += (x - mean[None, :]) * slope[None, :] + offset[None, :]
        tl.store(dx_ptr + at, v.to(dx_ptr.dtype.element_ty), mask=valid)


class _Map:
    """How kernels go over the maps of one call."""

    def __init__(self, op: str, x: Tensor, config: BnConfig | None) -> None:
        check_map(op, "x", x)
        self.op, self.x, self.format = op, x, suggest_memory_format(x)
        self.channels, self.plane = x.shape[1], x.shape[2] * x.shape[3]
        self.rows = x.shape[0] * self.plane
        for what, size in (("pixels in a batch", self.rows),
                           ("elements in an image", self.channels * self.plane)):  # fmt: skip
            if size >= 2**30:
                raise ValueError(f"{op}: x: expected less than 2^30 {what}, got {list(x.shape)}")
        # One channel or one pixel is the same memory in both formats: the one with more in a row.
        channels_last = self.format == torch.channels_last
        self.last = self.channels > 1 if channels_last else self.plane == 1
        self.config = config or self._choose()
        blocks = cdiv(self.channels, self.config.block_c)
        slabs = max(1, 4 * multiprocessors(x) // max(blocks, 1))
        tiles = cdiv(max(self.rows, 1), self.config.block_r)
        self.slab_rows = cdiv(tiles, slabs) * self.config.block_r
        self.slabs = max(1, cdiv(self.rows, self.slab_rows))
        self.grid = (blocks, self.slabs)

    def _choose(self) -> BnConfig:
        # Planes are read along pixels: many of them, and more channels only where planes are short.
        most = 64 if self.last else 1 if self.plane >= 1024 else 8
        return CONFIGS[min(most, power_of_two(self.channels)).bit_length() - 1]

    def input(self, t: Tensor) -> Tensor:
        return t.contiguous(memory_format=self.format)

    def result(self) -> Tensor:
        return torch.empty(
            self.x.shape, dtype=self.x.dtype, device=self.x.device, memory_format=self.format
        )

    def floats(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)

    def vector(self, name: str, v: Tensor | None) -> Tensor | None:
        return vector(self.op, name, v, self.channels, self.x)

    def launch(self, kernel: Kernel, *args: Any, **constants: Any) -> None:
        with on_device(self.x):
            kernel[self.grid](
                *args,
                R=self.rows,
                C=self.channels,
                P=self.plane,
                slab_rows=self.slab_rows,
                LAST=self.last,
                BLOCK_R=self.config.block_r,
                BLOCK_C=self.config.block_c,
                num_warps=self.config.warps,
                maxnreg=BN_REGISTERS,
                **constants,
            )

    def finish(self, kernel: Kernel, *args: Any, **named: Any) -> None:
        with on_device(self.x):
            kernel[(cdiv(self.channels, FINISH_C),)](
                *args,
                R=self.rows,
                C=self.channels,
                slabs=self.slabs,
                BLOCK_S=FINISH_S,
                BLOCK_C=FINISH_C,
                num_warps=4,
                maxnreg=BN_REGISTERS,
                **named,
            )


def bn_add_relu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    training: bool,
    eps: float,
    relu: bool,
    *,
    config: BnConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r""":math:`y = \max(0, \gamma (x - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta + r)`.

    Args:
        x: ``(N, C, H, W)``; float32, float16 or bfloat16, NHWC or NCHW.
        weight: :math:`\gamma`, ``(C,)``, any float; None means 1.
        bias: :math:`\beta`, likewise; None means 0.
        running_mean: ``(C,)``, used in inference.
        running_var: As ``running_mean``.
        residual: :math:`r`, shape and dtype of ``x``; None means 0.
        training: Use the statistics of the batch, and return them.
        eps: Added to the variance.
        relu: False leaves the maximum out.
        config: One of :data:`CONFIGS`; None chooses.

    Returns:
        y in the dtype and memory format of ``x``; in training the batch's mean and biased variance,
        ``(C,)`` float32, else empty.

    Raises:
        ValueError: Wrong rank, shape or device, or no running statistics in inference.
        TypeError: Wrong dtype.
    """
    op = "bn_add_relu"
    call = _Map(op, x, config)
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
    call.launch(bn_add_relu_kernel, xs, rs, y, *affine, eps=eps, RELU=relu)
    return y, mean, var


def bn_add_relu_apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    eps: float,
    relu: bool,
    *,
    config: BnConfig | None = None,
) -> Tensor:
    """:func:`bn_add_relu` in training, by the batch's statistics, which are there already."""
    return bn_add_relu(x, weight, bias, mean, var, residual, False, eps, relu, config=config)[0]


def bn_add_relu_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    training: bool,
    eps: float,
    relu: bool,
    need_residual: bool,
    *,
    config: BnConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`bn_add_relu`.

    Args:
        grad: Of y, with its shape and dtype.
        x: What the forward was given.
        y: What it returned; may be None without ``relu``.
        weight: As the forward's.
        mean: ``(C,)``: the batch's in training, else the running one.
        var: As ``mean``, biased.
        training: Whether the statistics are functions of ``x``.
        eps: As the forward's.
        relu: As the forward's.
        need_residual: Whether the residual's gradient is wanted.
        config: One of :data:`CONFIGS`; None chooses.

    Returns:
        The gradients of x, weight, bias (both float32) and the residual (empty if not wanted).

    Raises:
        ValueError: Wrong shape or device, or no ``y`` with ``relu``.
        TypeError: Wrong dtype.
    """
    op = "bn_add_relu_backward"
    call = _Map(op, x, config)
    check_same(op, "grad", grad, x.shape, x)
    check_same(op, "y", y, x.shape, x)
    if relu and y is None:
        raise ValueError(f"{op}: y: expected a tensor when relu=True, got None")
    weights, means = call.vector("weight", weight), call.vector("mean", mean)
    variances = call.vector("var", var)
    dx = call.result()
    dz = call.result() if need_residual else None
    dresidual = x.new_empty((0,)) if dz is None else dz
    dweight, dbias = call.floats(call.channels), call.floats(call.channels)
    if x.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_(), dresidual
    grads, xs = call.input(grad), call.input(x)
    ys = call.input(y) if relu and y is not None else None
    partial = call.floats(call.slabs, 2, call.channels, dtype=torch.float64)
    coefficients = call.floats(3, call.channels)
    call.launch(bn_backward_reduce_kernel, grads, xs, ys, dz, means, partial)
    call.finish(
        bn_backward_finish_kernel, partial, weights, variances, dweight, dbias, coefficients,
        eps=eps, TRAINING=training,
    )  # fmt: skip
    sources = (grads, ys) if dz is None else (dz, None)
    call.launch(
        bn_backward_kernel, sources[0], xs if training else None, sources[1], dx, means,
        coefficients,
    )  # fmt: skip
    return dx, dweight, dbias, dresidual
