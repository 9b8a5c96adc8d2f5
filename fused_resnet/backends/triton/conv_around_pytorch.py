r"""PyTorch's convolutions between Triton's passes, behind the calls of the training primitives.

For the geometries that our gradients' kernels do not take, and a candidate of the tuner for all: a
prologue becomes a map of its own, an epilogue a pass over the result. Passes: dz = a g + b z + c (3
elements moved for 4 flops); p(x) is :func:`.block_end` without a shortcut; the gradient before an
activation with its sums, in place (3 elements); the statistics of a map (1 element). Tiles are
those of ``_bn_map.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._activation import gradient
from ._bn_map import BnMap, map_offsets
from ._channel_sums import channel_sums, two_sum
from ._common import channel_vector
from ._conv_call import ConvCall
from ._gradient_call import GradientCall
from ._training_operands import nothing
from .block_end import block_end
from .bn_add_relu import bn_statistics_finish_kernel, bn_statistics_kernel


@triton.jit
def bn_gradient_kernel(  # type: ignore[no-untyped-def]
    g_ptr, z_ptr, dz_ptr,
    a_ptr, b_ptr, c_ptr,
    R, C, P, slab_rows,
    LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dz = a g + b z + c, for a slab of rows.

    Args:
        g_ptr: Gradient after the batch norm, (R, C).
        z_ptr: Input of the batch norm, (R, C), or None: dz = a g.
        dz_ptr: Receives dz, (R, C).
        a_ptr: Factor of g, (C,) float32.
        b_ptr: Factor of z, (C,) float32; None without z.
        c_ptr: Constant term, (C,) float32; None without z.
        R: Pixels of the batch: the rows of the map.
        C: Channels of the map.
        P: Pixels of an image.
        slab_rows: Rows of a slab; the last slab may have fewer.
        LAST: Whether a pixel's channels are neighbours in memory (NHWC), or its plane's pixels
            (NCHW).
        BLOCK_R: Rows of a tile.
        BLOCK_C: Channels of a tile.
    """
    i = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    a = channel_vector(a_ptr, i, i < C, 0.0)
    b = channel_vector(b_ptr, i, i < C, 0.0)
    c = channel_vector(c_ptr, i, i < C, 0.0)
    begin = tl.program_id(1) * slab_rows
    end = tl.minimum(begin + slab_rows, R)
    for r0 in range(begin, end, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        valid = (r < end)[:, None] & (i < C)[None, :]
        at = map_offsets(r, i, C, P, LAST)
        v = tl.load(g_ptr + at, mask=valid, other=0.0).to(tl.float32) * a[None, :]
        if z_ptr is not None:
            z = tl.load(z_ptr + at, mask=valid, other=0.0).to(tl.float32)
            v += z * b[None, :] + c[None, :]
        tl.store(dz_ptr + at, v.to(dz_ptr.dtype.element_ty), mask=valid)


@triton.jit
def masked_sums_kernel(  # type: ignore[no-untyped-def]
    g_ptr, x_ptr,
    scale_ptr, shift_ptr, mean_ptr,
    partial_ptr,
    R, C, P, slab_rows,
    ACTIVATION: tl.constexpr,
    LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """g = g where x * scale + shift > 0, sum g, sum g (x - mean), for a slab of rows.

    Args:
        g_ptr: Gradient after the activation, (R, C); receives that of its argument.
        x_ptr: Input of the batch norm, (R, C).
        scale_ptr: Scale of the batch norm, (C,) float32.
        shift_ptr: Shift of the batch norm, (C,) float32.
        mean_ptr: Mean of x, (C,) float32; None without sums.
        partial_ptr: Receives both sums of each slab, (slabs, 2, C) float64; or None.
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
    scale = channel_vector(scale_ptr, c, c < C, 0.0)
    shift = channel_vector(shift_ptr, c, c < C, 0.0)
    mean = channel_vector(mean_ptr, c, c < C, 0.0)
    begin = slab * slab_rows
    end = tl.minimum(begin + slab_rows, R)
    zero = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    sum_high, sum_low, dot_high, dot_low = zero, zero, zero, zero
    for r0 in range(begin, end, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        valid = (r < end)[:, None] & (c < C)[None, :]
        at = map_offsets(r, c, C, P, LAST)
        x = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + at, mask=valid, other=0.0).to(tl.float32)
        g = gradient(g, x * scale[None, :] + shift[None, :], ACTIVATION)
        tl.store(g_ptr + at, g.to(g_ptr.dtype.element_ty), mask=valid)
        if partial_ptr is not None:
            xc = tl.where(valid, x - mean[None, :], 0.0)
            sum_high, sum_low = two_sum(sum_high, sum_low, g)
            dot_high, dot_low = two_sum(dot_high, dot_low, g * xc)
    if partial_ptr is not None:
        sums = tl.sum(sum_high.to(tl.float64), 0) + tl.sum(sum_low.to(tl.float64), 0)
        dots = tl.sum(dot_high.to(tl.float64), 0) + tl.sum(dot_low.to(tl.float64), 0)
        to = partial_ptr + slab.to(tl.int64) * 2 * C + c
        tl.store(to, sums, mask=c < C)
        tl.store(to + C, dots, mask=c < C)


def conv_around_pytorch(
    call: ConvCall, weight: Tensor, statistics: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The convolution of p(x), and its statistics where they are wanted, else empty vectors.

    Args:
        call: The operands.
        weight: Filters in the layout of PyTorch's convolution, ``(K, C / groups, kh, kw)``.
        statistics: Whether they are wanted.
    """
    s, p = call.shape, call.x
    scale, shift = call.prologue
    if scale is not None and shift is not None:
        p = block_end(p, scale, shift, None, None, None, call.in_activation)
    z = torch.ops.aten.convolution(
        p, weight, None, s.stride, s.padding, s.dilation, False, [0, 0], s.groups
    ).contiguous(memory_format=torch.channels_last)
    if not statistics:
        return z, nothing(z), nothing(z)
    return z, *map_statistics(z)


def map_statistics(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, ``(C,)`` float32; zero for an empty map.

    Args:
        z: The map, ``(N, C, H, W)``, channels_last.
    """
    call = BnMap("conv_forward", z, None)
    mean, var = call.floats(call.channels), call.floats(call.channels)
    if z.numel() == 0:
        return mean.zero_(), var.zero_()
    partial = call.floats(call.slabs, 2, call.channels, dtype=torch.float64)
    unused = call.floats(call.channels), call.floats(call.channels)
    call.launch(bn_statistics_kernel, z, partial)
    call.finish(
        bn_statistics_finish_kernel, partial, None, None, mean, var, *unused,
        slab_rows=call.slab_rows, eps=1.0,
    )  # fmt: skip
    return mean, var


def gradients_around_pytorch(
    call: GradientCall, need_input: bool, need_weight: bool, sums: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Both gradients, and the two sums where they are wanted; empty what is not.

    Args:
        call: The operands.
        need_input: Whether the gradient of the input is wanted.
        need_weight: Whether that of the weight is.
        sums: Whether the sums of the first are.
    """
    s, op = call.shape, "conv_backward"
    dz = torch.empty_like(call.g)
    BnMap(op, call.g, None).launch(bn_gradient_kernel, call.g, call.z, dz, call.a, call.b, call.c)
    p = call.x
    if call.x_scale is not None and call.x_shift is not None and need_weight:
        p = block_end(p, call.x_scale, call.x_shift, None, None, None, call.activation)
    g_x, dw, _ = torch.ops.aten.convolution_backward(
        dz, p, call.weight, None, s.stride, s.padding, s.dilation, False, [0, 0], s.groups,
        [need_input, need_weight, False],
    )  # fmt: skip
    found: list[Tensor] = []
    if need_input:
        g_x = g_x.contiguous(memory_format=torch.channels_last)
        if call.x_scale is not None:
            around = BnMap(op, g_x, None)
            partial = None
            if sums:
                partial = around.floats(around.slabs, 2, s.c, dtype=torch.float64)
            around.launch(
                masked_sums_kernel, g_x, call.x, call.x_scale, call.x_shift,
                call.x_mean if sums else None, partial,
                ACTIVATION=call.activation,
            )  # fmt: skip
            found = [] if partial is None else channel_sums(partial)
        elif call.add is not None:
            g_x.add_(call.add)
    else:
        g_x = torch.empty(0, dtype=call.x.dtype, device=call.x.device)
    if not need_weight:
        dw = torch.empty(0, dtype=call.weight.dtype, device=call.x.device)
    elif dw.stride() != (strided := torch.empty_like(call.weight)).stride():
        dw = strided.copy_(dw)
    return g_x, dw, found
