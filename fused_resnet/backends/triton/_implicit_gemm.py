r"""The implicit GEMM that the kernels of convolutions share.

    sum[m][n] = sum_k a[m][k] w[n][k]

with m a pixel of the result, n a filter, k = (ky, kx, c) and a[m][k] the pixel of x under the tap
(ky, kx). Both operands have k as their innermost dimension in memory, as NHWC maps and KRSC
filters; the matrix a is never stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._activation import activate
from ._common import channel_affine, channel_vector


@triton.jit
def swizzle(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row and column of a tile, in an order by groups of GROUP_M rows, column by column.

    Args:
        tile: Number of the tile.
        tiles_m: Rows of tiles.
        tiles_n: Columns of tiles.
        GROUP_M: Rows of tiles whose programs follow each other.
    """
    width = GROUP_M * tiles_n
    first = tile // width * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = tile % width
    return first + within % height, within // height


@triton.jit
def round_to_tf32(v):  # type: ignore[no-untyped-def]
    """Float32 to the nearest tf32, ties away from zero.

    Tensor cores truncate the 13 low bits: without rounding, products and sums are biased towards
    zero, with three times the error of rounding. NaN must not overflow.

    Args:
        v: Values, float32.
    """
    bits = v.to(tl.uint32, bitcast=True) + 0x1000
    return tl.where(v == v, bits.to(tl.float32, bitcast=True), v)


@triton.jit
def multiply(acc, a, b, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc + a b, in float32.

    Args:
        acc: Sums, float32.
        a: Left matrix of the product.
        b: Right matrix of the product.
        PRECISION: Of the products: ``"half"``, ``"tf32"`` or ``"ieee"``.
    """
    if PRECISION == "tf32":
        return tl.dot(round_to_tf32(a), round_to_tf32(b), acc, input_precision="tf32")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def accumulate(  # type: ignore[no-untyped-def]
    acc,
    x_ptr, w_ptr,
    in_scale_ptr, in_shift_ptr,
    image, oy, ox, row_valid,
    first_row, first_filter, filter_valid,
    channel0, step_begin, step_end,
    H, W, C, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, group_c, w_stride,
    KH: tl.constexpr, KW: tl.constexpr, TAP_C: tl.constexpr,
    IN_ACTIVATION: tl.constexpr,
    MODE: tl.constexpr, EVEN_C: tl.constexpr, PRECISION: tl.constexpr,
    X_DESCRIPTOR: tl.constexpr, W_DESCRIPTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc[m][n] + sum_k a[m][k] w[n][k], for the depth's blocks step_begin to step_end.

    A step finds its tap by division, and the divisors are constants: dividing by an argument takes
    a reciprocal in floating point, and its correction in each step.

    Args:
        acc: Sums so far, (BLOCK_M, BLOCK_N) float32.
        x_ptr: Input, (N, H, W, C); with ``X_DESCRIPTOR`` a descriptor of it as (N H W, C).
        w_ptr: Filters, (K, w_stride), of which KH KW group_c are used; with ``W_DESCRIPTOR`` a
            descriptor of it.
        in_scale_ptr: Scale of the input before its activation, (C,) any float, or None for neither.
        in_shift_ptr: Shift of the input before its activation, (C,) any float, or None.
        image: Image of each row of the tile, (BLOCK_M,).
        oy: Row of each result in its image, (BLOCK_M,).
        ox: Column of each result in its image, (BLOCK_M,).
        row_valid: Which rows of the tile exist, (BLOCK_M,).
        first_row: Number of the tile's first row.
        first_filter: Number of the tile's first filter.
        filter_valid: Which filters of the tile exist, (BLOCK_N,).
        channel0: The group's first input channel.
        step_begin: First step.
        step_end: Step after the last.
        H: Height of the input.
        W: Width of the input.
        C: Channels of the input.
        stride_h: Vertical stride.
        stride_w: Horizontal stride.
        pad_h: Rows of zeros above the input.
        pad_w: Columns of zeros left of the input.
        dil_h: Rows from one tap to the next.
        dil_w: Columns from one tap to the next.
        group_c: Input channels of a group.
        w_stride: Elements from one filter to the next.
        KH: Height of the filters.
        KW: Width of the filters.
        TAP_C: Channels of a tap, which a step divides by; 0 for a single tap.
        IN_ACTIVATION: Number of the activation of the input.
        MODE: How the depth is traversed, from ``mode_of``: ``"pointwise"``, ``"taps"`` or
            ``"flat"``.
        EVEN_C: Whether a tap's channels are whole blocks.
        PRECISION: Of the products: ``"half"``, ``"tf32"`` or ``"ieee"``.
        X_DESCRIPTOR: Whether ``x_ptr`` is a tensor descriptor.
        W_DESCRIPTOR: Whether ``w_ptr`` is a tensor descriptor.
        BLOCK_M: Pixels of a tile.
        BLOCK_N: Filters of a tile.
        BLOCK_K: Terms of a step.
    """
    y0 = oy * stride_h - pad_h
    x0 = ox * stride_w - pad_w
    if not X_DESCRIPTOR:
        rows = x_ptr + (image.to(tl.int64) * H * W * C + channel0)[:, None]
    if not W_DESCRIPTOR:
        filters = first_filter + tl.arange(0, BLOCK_N)
        columns = w_ptr + (filters.to(tl.int64) * w_stride)[None, :]
    BLOCKS: tl.constexpr = (TAP_C + BLOCK_K - 1) // BLOCK_K
    for step in range(step_begin, step_end):
        if MODE == "flat":
            k = step * BLOCK_K + tl.arange(0, BLOCK_K)
            tap = k // TAP_C
            c = k - tap * TAP_C
            ky = tap // KW
            kx = tap - ky * KW
            iy = y0[:, None] + (ky * dil_h)[None, :]
            ix = x0[:, None] + (kx * dil_w)[None, :]
            inside = (iy >= 0) & (iy < H) & (ix >= 0) & (ix < W)
            k_valid = k < KH * KW * TAP_C
            a_valid = inside & row_valid[:, None] & k_valid[None, :]
            a = tl.load(rows + (iy * W + ix) * C + c[None, :], mask=a_valid, other=0.0)
            k0 = step * BLOCK_K
        else:
            if KH * KW == 1:
                block = step
                k0 = step * BLOCK_K
                iy = y0
                ix = x0
            else:
                tap = step // BLOCKS
                block = step - tap * BLOCKS
                k0 = tap * TAP_C + block * BLOCK_K
                ky = tap // KW
                kx = tap - ky * KW
                iy = y0 + ky * dil_h
                ix = x0 + kx * dil_w
            if MODE == "pointwise":
                inside = row_valid
            else:
                inside = row_valid & (iy >= 0) & (iy < H) & (ix >= 0) & (ix < W)
            c = block * BLOCK_K + tl.arange(0, BLOCK_K)
            if EVEN_C:
                a_valid = inside[:, None]
                k_valid = c >= 0
            else:
                k_valid = c < group_c
                a_valid = inside[:, None] & k_valid[None, :]
            if X_DESCRIPTOR:
                a = x_ptr.load([first_row, block * BLOCK_K])
            else:
                a = tl.load(
                    rows + ((iy * W + ix) * C)[:, None] + c[None, :], mask=a_valid, other=0.0
                )
        if in_scale_ptr is not None:
            # Padding is applied after batch norm and activation, so padded zeros stay zeros.
            in_scale = channel_vector(in_scale_ptr + channel0, c, k_valid, 0.0)
            in_shift = channel_vector(in_shift_ptr + channel0, c, k_valid, 0.0)
            v = activate(a.to(tl.float32) * in_scale[None, :] + in_shift[None, :], IN_ACTIVATION)
            a = tl.where(a_valid, v, 0.0).to(a.dtype)
        if W_DESCRIPTOR:
            b = w_ptr.load([first_filter, k0]).T
        else:
            k = k0 + tl.arange(0, BLOCK_K)
            b = tl.load(
                columns + k[:, None], mask=k_valid[:, None] & filter_valid[None, :], other=0.0
            )
        acc = multiply(acc, a, b, PRECISION)
    return acc


@triton.jit
def finish(  # type: ignore[no-untyped-def]
    acc,
    y_ptr, residual_ptr,
    conv_bias_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr,
    residual_scale_ptr, residual_shift_ptr,
    m, channel, row_valid, channel_valid,
    K, eps,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """y = act(acc * scale + shift + residual [* scale + shift]), rounded and stored.

    Returns the stored values.

    Args:
        acc: Sums of the tile, float32.
        y_ptr: Receives the result, (M, K).
        residual_ptr: Map that is added, (M, K), or None.
        conv_bias_ptr: Bias of the convolution, (K,) any float, or None for 0.
        weight_ptr: Weight of the batch norm, (K,) any float, or None for 1.
        bias_ptr: Bias of the batch norm, (K,) any float, or None for 0.
        mean_ptr: Mean of the batch norm, (K,) any float, or None for 0.
        var_ptr: Variance of the batch norm, (K,) any float, or None: the weight is the scale.
        residual_scale_ptr: Scale of the residual, (K,) any float, or None.
        residual_shift_ptr: Shift of the residual, (K,) any float, or None.
        m: Rows of the tile.
        channel: Filters of the tile.
        row_valid: Which of the rows exist.
        channel_valid: Which of the filters exist.
        K: Number of filters.
        eps: Added to the variance.
        ACTIVATION: Number of the activation of the result.
    """
    scale, shift = channel_affine(
        channel, channel_valid, conv_bias_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, eps
    )
    valid = row_valid[:, None] & channel_valid[None, :]
    at = m.to(tl.int64)[:, None] * K + channel[None, :]
    v = acc * scale[None, :] + shift[None, :]
    if residual_ptr is not None:
        r = tl.load(residual_ptr + at, mask=valid, other=0.0).to(tl.float32)
        if residual_scale_ptr is not None:
            r_scale = channel_vector(residual_scale_ptr, channel, channel_valid, 1.0)
            r_shift = channel_vector(residual_shift_ptr, channel, channel_valid, 0.0)
            r = r * r_scale[None, :] + r_shift[None, :]
        v += r
    rounded = activate(v, ACTIVATION).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + at, rounded, mask=valid)
    return rounded.to(tl.float32)


@triton.jit
def halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """The left and right halves of a tile's columns.

    Args:
        acc: The tile, (BLOCK_M, BLOCK_N).
        BLOCK_M: Rows of the tile.
        BLOCK_N: Columns of the tile.
    """
    pairs = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
    return tl.split(pairs)
