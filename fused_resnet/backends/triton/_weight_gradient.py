r"""The gradient of a convolution's weight, with both of its prologues.

    dw[k][tap][c] = sum_m dz[m][k] p(x)[m under tap][c]

m is a pixel of the result. dz = a g + b z + c and p(x) = act(x * scale + shift) are made while
they are read, rounded as if they had been stored, and never stored; what lies outside of the input
is zero after p. A program computes a tile of filters by channels for one tap and one part of the
pixels; taps follow each other, so that they find the same pixels in the L2 cache.

The sum is as deep as the batch has pixels and its tiles are few, so pixels are split: each part is
stored in float32, and a finishing kernel adds the parts in order and rounds once. No atomics: the
same bits every time. Bytes: g, z and x once for each tile of the other's channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._activation import activate
from ._common import REGISTERS, cdiv, channel_vector, on_device
from ._conv_plan import precision_of
from ._gradient_call import GradientCall
from ._gradient_plan import WeightConfig, plan_weight
from ._implicit_gemm import multiply

#: Elements of a program of the finishing kernel.
FINISH = 256


@triton.jit
def conv_weight_gradient_kernel(  # type: ignore[no-untyped-def]
    g_ptr, z_ptr,
    a_ptr, b_ptr, c_ptr,
    x_ptr,
    x_scale_ptr, x_shift_ptr,
    partial_ptr,
    M, K, C, H, W, OH, OW, pad_h, pad_w,
    split_rows,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dw[k][tap][c] = sum_m dz[m][k] p(x)[m under tap][c], for a tile of one tap.

    Program axes are taps within tiles, and parts of the pixels.

    Args:
        g_ptr: Gradient after the batch norm of the convolution, (M, K).
        z_ptr: Result of the convolution, (M, K), or None: dz = a g.
        a_ptr: Factor of g in dz, (K,) float32.
        b_ptr: Factor of z in dz, (K,) float32; None without z.
        c_ptr: Constant term of dz, (K,) float32; None without z.
        x_ptr: Input of the convolution, (N, H, W, C).
        x_scale_ptr: Scale of p, (C,) float32, or None: p(x) is x.
        x_shift_ptr: Shift of p, (C,) float32, or None.
        partial_ptr: Receives the sums of each part of the pixels, (splits, K, KH, KW, C) float32.
        M: Pixels of the result in the batch, over which is summed.
        K: Number of filters.
        C: Channels of the input.
        H: Height of the input.
        W: Width of the input.
        OH: Height of the result.
        OW: Width of the result.
        pad_h: Rows of zeros above the input.
        pad_w: Columns of zeros left of the input.
        split_rows: Pixels of a part; the last may have fewer.
        KH: Height of the filters.
        KW: Width of the filters.
        STRIDE_H: Vertical stride.
        STRIDE_W: Horizontal stride.
        ACTIVATION: Number of the activation of p.
        PRECISION: Of the products: ``"half"``, ``"tf32"`` or ``"ieee"``.
        BLOCK_K: Filters of a tile.
        BLOCK_C: Channels of a tile.
        BLOCK_R: Pixels of a step.
    """
    TAPS: tl.constexpr = KH * KW
    tile = tl.program_id(0) // TAPS
    tap = tl.program_id(0) - tile * TAPS
    ky = tap // KW
    kx = tap - ky * KW
    tiles_c = tl.cdiv(C, BLOCK_C)
    tile_k = tile // tiles_c
    k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    n = (tile - tile_k * tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    a = channel_vector(a_ptr, k, k < K, 0.0)
    if z_ptr is not None:
        b = channel_vector(b_ptr, k, k < K, 0.0)
        c = channel_vector(c_ptr, k, k < K, 0.0)
    if x_scale_ptr is not None:
        scale = channel_vector(x_scale_ptr, n, n < C, 0.0)
        shift = channel_vector(x_shift_ptr, n, n < C, 0.0)
    split = tl.program_id(1)
    begin = split * split_rows
    end = tl.minimum(begin + split_rows, M)
    acc = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for r0 in range(begin, end, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        row_valid = r < end
        g_valid = row_valid[:, None] & (k < K)[None, :]
        at = r.to(tl.int64)[:, None] * K + k[None, :]
        dz = tl.load(g_ptr + at, mask=g_valid, other=0.0).to(tl.float32)
        if z_ptr is not None:
            z = tl.load(z_ptr + at, mask=g_valid, other=0.0).to(tl.float32)
            dz = dz * a[None, :] + (z * b[None, :] + c[None, :])
            dz = tl.where(g_valid, dz, 0.0)
        else:
            dz = dz * a[None, :]
        image = r // (OH * OW)
        pixel = r - image * (OH * OW)
        oy = pixel // OW
        iy = oy * STRIDE_H - pad_h + ky
        ix = (pixel - oy * OW) * STRIDE_W - pad_w + kx
        inside = row_valid & (iy >= 0) & (iy < H) & (ix >= 0) & (ix < W)
        x_valid = inside[:, None] & (n < C)[None, :]
        at = image.to(tl.int64) * H * W * C + (iy * W + ix) * C
        p = tl.load(x_ptr + at[:, None] + n[None, :], mask=x_valid, other=0.0)
        if x_scale_ptr is not None:
            v = activate(p.to(tl.float32) * scale[None, :] + shift[None, :], ACTIVATION)
            p = tl.where(x_valid, v, 0.0).to(p.dtype)
        acc = multiply(acc, tl.trans(dz.to(p.dtype)), p, PRECISION)
    to = (split.to(tl.int64) * K + k)[:, None] * (TAPS * C) + (tap * C + n)[None, :]
    tl.store(partial_ptr + to, acc, mask=(k < K)[:, None] & (n < C)[None, :])


@triton.jit
def conv_weight_finish_kernel(  # type: ignore[no-untyped-def]
    partial_ptr, dw_ptr,
    elements, splits, C, KW, TAPS,
    stride_k, stride_c, stride_h, stride_w,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dw = sum_split partial[split], in order; rounded, and stored as the weight is laid out.

    Args:
        partial_ptr: Sums of each part of the pixels, (splits, K, KH, KW, C) float32.
        dw_ptr: Receives the gradient, (K, C, KH, KW) in strides of its own.
        elements: Elements of the weight.
        splits: Number of parts.
        C: Input channels.
        KW: Width of the filters.
        TAPS: Taps of a filter.
        stride_k: Elements from one filter to the next in the gradient.
        stride_c: Elements from one channel to the next in the gradient.
        stride_h: Elements from one row to the next in the gradient.
        stride_w: Elements from one column to the next in the gradient.
        BLOCK: Elements of a program.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = i < elements
    total = tl.zeros((BLOCK,), tl.float32)
    part = partial_ptr + i
    step = tl.zeros((1,), tl.int64) + elements
    for _ in range(0, splits):
        total += tl.load(part, mask=valid, other=0.0)
        part += step
    row = i // C
    c = i - row * C
    k = row // TAPS
    tap = row - k * TAPS
    ky = tap // KW
    kx = tap - ky * KW
    at = k.to(tl.int64) * stride_k + c * stride_c + ky * stride_h + kx * stride_w
    tl.store(dw_ptr + at, total.to(dw_ptr.dtype.element_ty), mask=valid)


def weight_gradient(call: GradientCall, config: WeightConfig | None) -> Tensor:
    """The gradient of the weight, in its dtype and strides.

    Args:
        call: The operands.
        config: Forces a configuration; None chooses one.
    """
    s = call.shape
    dw = torch.empty_like(call.weight)
    config = config or plan_weight(s, call.x)
    split_rows = cdiv(cdiv(max(s.rows, 1), config.block_r), config.splits) * config.block_r
    splits = max(1, cdiv(s.rows, split_rows))
    partial = torch.empty((splits, s.k, s.kh, s.kw, s.c), dtype=torch.float32, device=dw.device)
    tiles = cdiv(s.k, config.block_k) * cdiv(s.c, config.block_c) * s.kh * s.kw
    with on_device(dw):
        conv_weight_gradient_kernel[(tiles, splits)](
            call.g, call.z, call.a, call.b, call.c, call.x, call.x_scale, call.x_shift, partial,
            s.rows, s.k, s.c, s.h, s.w, s.out_h, s.out_w, *s.padding, split_rows,
            KH=s.kh, KW=s.kw, STRIDE_H=s.stride[0], STRIDE_W=s.stride[1],
            ACTIVATION=call.activation, PRECISION=precision_of(dw),
            BLOCK_K=config.block_k, BLOCK_C=config.block_c, BLOCK_R=config.block_r,
            num_warps=config.warps, num_stages=config.stages, maxnreg=REGISTERS,
        )  # fmt: skip
        conv_weight_finish_kernel[(cdiv(dw.numel(), FINISH),)](
            partial, dw, dw.numel(), splits, s.c, s.kw, s.kh * s.kw, *dw.stride(),
            BLOCK=FINISH, num_warps=4,
        )  # fmt: skip
    return dw
