r"""The gradient of a convolution's input, with the batch norms on both of its sides.

    g_x[m][c] = mask(sum_k dz[m][k] w[k][c]),  dz = a g + b z + c

m is a pixel of the input and k = (ky, kx, filter) a tap and a filter: an implicit GEMM like the
forward's, whose rows are the pixels of dz under a tap. dz is made while it is read, rounded as if
it had been stored, and never stored. Pixels outside of the result are masked after the affine step,
whose constant would otherwise reach them.

A stride of s makes s * s phases of input pixels, (iy % s, ix % s), each of which meets only the
taps (iy + pad - ky) % s = 0: per phase the sum is a convolution of stride 1, without products by
zero. A phase without a tap (of a strided 1x1, all but one) only writes its epilogue.

The epilogue is either the mask of the activation before the convolution, computed again from that
layer's x, with the sums for its batch norm's backward; or the gradient of the shortcut, added.
Bytes: g, z, x and g_x once each, if the L2 cache holds what neighbouring programs share. Sums are
of the stored, rounded values, one of each tile of rows, which another kernel adds in order in
float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._activation import gradient
from ._channel_sums import channel_sums
from ._common import REGISTERS, cdiv, channel_vector, on_device
from ._conv_plan import GROUP_M, precision_of
from ._gradient_call import GradientCall
from ._gradient_plan import DataConfig, plan_data
from ._implicit_gemm import halves, multiply, swizzle


@triton.jit
def conv_data_gradient_kernel(  # type: ignore[no-untyped-def]
    g_ptr, z_ptr,
    a_ptr, b_ptr, c_ptr,
    w_ptr, x_ptr,
    x_scale_ptr, x_shift_ptr, x_mean_ptr,
    add_ptr, g_x_ptr,
    sums_ptr,
    N, H, W, C, OH, OW, K, pad_h, pad_w,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """g_x[m][c] = mask(sum_k dz[m][k] w[k][c]), dz = a g + b z + c, for a tile of one phase.

    Program axes are tiles of the largest phase, and phases.

    Args:
        g_ptr: Gradient after the batch norm of the convolution, (N, OH, OW, K).
        z_ptr: Result of the convolution, (N, OH, OW, K), or None: dz = a g.
        a_ptr: Factor of g in dz, (K,) float32.
        b_ptr: Factor of z in dz, (K,) float32; None without z.
        c_ptr: Constant term of dz, (K,) float32; None without z.
        w_ptr: Filters, (K, KH, KW, C).
        x_ptr: Input of the convolution, (N, H, W, C), or None: no mask.
        x_scale_ptr: Scale of the batch norm before the convolution, (C,) float32, or None.
        x_shift_ptr: Shift of that batch norm, (C,) float32, or None.
        x_mean_ptr: Mean of x in each channel, (C,) float32, for the sums; or None.
        add_ptr: Gradient of the shortcut, which is added, (N, H, W, C), or None.
        g_x_ptr: Receives g_x, (N, H, W, C).
        sums_ptr: Receives sum g_x and sum g_x (x - mean) of each tile of rows, (phases * tiles of
            rows, 2, C) float32; or None.
        N: Number of images.
        H: Height of the input.
        W: Width of the input.
        C: Channels of the input.
        OH: Height of the result.
        OW: Width of the result.
        K: Number of filters.
        pad_h: Rows of zeros above the input.
        pad_w: Columns of zeros left of the input.
        KH: Height of the filters.
        KW: Width of the filters.
        STRIDE_H: Vertical stride.
        STRIDE_W: Horizontal stride.
        ACTIVATION: Number of the activation of the input, whose mask is applied with x.
        EVEN_K: Whether the filters are whole blocks.
        PRECISION: Of the products: ``"half"``, ``"tf32"`` or ``"ieee"``.
        GROUP_M: Rows of tiles whose programs follow each other.
        BLOCK_M: Pixels of a tile.
        BLOCK_N: Channels of a tile.
        BLOCK_K: Filters of a step.
        PARTS: Blocks of columns that the epilogue handles one by one: 1, 2 or 4.
    """
    phase = tl.program_id(1)
    py = phase // STRIDE_W
    px = phase - py * STRIDE_W
    most_m = tl.cdiv(N * tl.cdiv(H, STRIDE_H) * tl.cdiv(W, STRIDE_W), BLOCK_M)
    tile_m, tile_n = swizzle(tl.program_id(0), most_m, tl.cdiv(C, BLOCK_N), GROUP_M)
    height = (H - py + STRIDE_H - 1) // STRIDE_H
    width = (W - px + STRIDE_W - 1) // STRIDE_W
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row_valid = m < N * height * width
    # A phase may be empty, but nothing is divided by zero.
    plane = tl.maximum(height * width, 1)
    image = m // plane
    pixel = m - image * plane
    jy = pixel // tl.maximum(width, 1)
    jx = pixel - jy * width
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)

    # The first tap of this phase, and the row and column of dz under it.
    ky0 = (py + pad_h) % STRIDE_H
    kx0 = (px + pad_w) % STRIDE_W
    y0 = jy + (py + pad_h - ky0) // STRIDE_H
    x0 = jx + (px + pad_w - kx0) // STRIDE_W
    taps_h = (KH - ky0 + STRIDE_H - 1) // STRIDE_H
    taps_w = (KW - kx0 + STRIDE_W - 1) // STRIDE_W
    images = (image.to(tl.int64) * OH * OW * K)[:, None]
    blocks = tl.cdiv(K, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, taps_h * taps_w * blocks):
        tap = step // blocks
        block = step - tap * blocks
        ty = tap // tl.maximum(taps_w, 1)
        tx = tap - ty * taps_w
        oy = y0 - ty
        ox = x0 - tx
        inside = row_valid & (oy >= 0) & (oy < OH) & (ox >= 0) & (ox < OW)
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        if EVEN_K:
            k_valid = k >= 0
            valid = inside[:, None]
        else:
            k_valid = k < K
            valid = inside[:, None] & k_valid[None, :]
        at = images + ((oy * OW + ox) * K)[:, None] + k[None, :]
        dz = tl.load(g_ptr + at, mask=valid, other=0.0).to(tl.float32)
        a = channel_vector(a_ptr, k, k_valid, 0.0)
        if z_ptr is not None:
            b = channel_vector(b_ptr, k, k_valid, 0.0)
            c = channel_vector(c_ptr, k, k_valid, 0.0)
            z = tl.load(z_ptr + at, mask=valid, other=0.0).to(tl.float32)
            dz = dz * a[None, :] + (z * b[None, :] + c[None, :])
            dz = tl.where(valid, dz, 0.0)
        else:
            dz = dz * a[None, :]
        weight = (ky0 + ty * STRIDE_H) * KW + kx0 + tx * STRIDE_W
        filters = w_ptr + ((k * (KH * KW) + weight).to(tl.int64) * C)[:, None] + n[None, :]
        w = tl.load(filters, mask=k_valid[:, None] & (n < C)[None, :], other=0.0)
        acc = multiply(acc, dz.to(w_ptr.dtype.element_ty), w, PRECISION)

    iy = jy * STRIDE_H + py
    ix = jx * STRIDE_W + px
    rows = image.to(tl.int64) * H * W * C + (iy * W + ix) * C
    if PARTS == 4:
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        parts = halves(left, BLOCK_M, BLOCK_N // 2) + halves(right, BLOCK_M, BLOCK_N // 2)
    elif PARTS == 2:
        parts = halves(acc, BLOCK_M, BLOCK_N)
    else:
        parts = (acc,)
    for i in tl.static_range(PARTS):
        columns = tile_n * BLOCK_N + i * (BLOCK_N // PARTS) + tl.arange(0, BLOCK_N // PARTS)
        _store(
            parts[i], x_ptr, x_scale_ptr, x_shift_ptr, x_mean_ptr, add_ptr, g_x_ptr, sums_ptr,
            rows, columns, row_valid, columns < C, phase * most_m + tile_m, C,
            ACTIVATION,
        )  # fmt: skip


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    acc,
    x_ptr, x_scale_ptr, x_shift_ptr, x_mean_ptr, add_ptr, g_x_ptr, sums_ptr,
    rows, columns, row_valid, column_valid, slab, C,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Mask or addition, rounding, store, and the sums of what was stored.

    Args:
        acc: Gradients of some columns of a tile, (BLOCK_M, columns) float32.
        x_ptr: Input of the convolution, (N, H, W, C), or None: no mask.
        x_scale_ptr: Scale of the batch norm before the convolution, (C,) float32, or None.
        x_shift_ptr: Shift of that batch norm, (C,) float32, or None.
        x_mean_ptr: Mean of x in each channel, (C,) float32, for the sums; or None.
        add_ptr: Gradient of the shortcut, which is added, (N, H, W, C), or None.
        g_x_ptr: Receives g_x, (N, H, W, C).
        sums_ptr: Receives sum g_x and sum g_x (x - mean) of each tile of rows, (phases * tiles of
            rows, 2, C) float32; or None.
        rows: Offset of each row in the maps.
        columns: Channels of the columns.
        row_valid: Which of the rows exist.
        column_valid: Which of the channels exist.
        slab: Number of the tile of rows, through all phases.
        C: Channels of the input.
        ACTIVATION: Number of the activation of the input, whose mask is applied with x.
    """
    valid = row_valid[:, None] & column_valid[None, :]
    at = rows[:, None] + columns[None, :]
    if x_ptr is not None:
        x = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32)
        scale = channel_vector(x_scale_ptr, columns, column_valid, 0.0)
        shift = channel_vector(x_shift_ptr, columns, column_valid, 0.0)
        acc = gradient(acc, x * scale[None, :] + shift[None, :], ACTIVATION)
    if add_ptr is not None:
        acc += tl.load(add_ptr + at, mask=valid, other=0.0).to(tl.float32)
    rounded = acc.to(g_x_ptr.dtype.element_ty)
    tl.store(g_x_ptr + at, rounded, mask=valid)
    if sums_ptr is not None:
        v = tl.where(valid, rounded.to(tl.float32), 0.0)
        mean = channel_vector(x_mean_ptr, columns, column_valid, 0.0)
        centred = tl.where(valid, x - mean[None, :], 0.0)
        to = sums_ptr + slab.to(tl.int64) * 2 * C + columns
        tl.store(to, tl.sum(v, 0), mask=column_valid)
        tl.store(to + C, tl.sum(v * centred, 0), mask=column_valid)


def data_gradient(
    call: GradientCall, sums: bool, config: DataConfig | None
) -> tuple[Tensor, list[Tensor]]:
    """The gradient of the input, and its two sums where they are wanted.

    Args:
        call: The operands; has ``x_mean`` where sums are wanted.
        sums: Whether they are.
        config: Forces a configuration; None chooses one.
    """
    s = call.shape
    g_x = torch.empty_like(call.x)
    config = config or plan_data(s, call.x)
    phases = s.stride[0] * s.stride[1]
    largest = s.n * cdiv(s.h, s.stride[0]) * cdiv(s.w, s.stride[1])
    tiles = cdiv(largest, config.block_m)
    partial = None
    if sums:
        partial = torch.empty((phases * tiles, 2, s.c), dtype=torch.float32, device=g_x.device)
    mask = call.x if call.x_scale is not None else None
    if g_x.numel():
        with on_device(g_x):
            conv_data_gradient_kernel[(tiles * cdiv(s.c, config.block_n), phases)](
                call.g, call.z, call.a, call.b, call.c, call.filters(), mask,
                call.x_scale, call.x_shift, call.x_mean if sums else None, call.add, g_x, partial,
                s.n, s.h, s.w, s.c, s.out_h, s.out_w, s.k, *s.padding,
                KH=s.kh, KW=s.kw, STRIDE_H=s.stride[0], STRIDE_W=s.stride[1],
                ACTIVATION=call.activation,
                EVEN_K=s.k % config.block_k == 0, PRECISION=precision_of(g_x), GROUP_M=GROUP_M,
                BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
                PARTS=config.parts, num_warps=config.warps, num_stages=config.stages,
                maxnreg=REGISTERS,
            )  # fmt: skip
    return g_x, [] if partial is None else channel_sums(partial)
