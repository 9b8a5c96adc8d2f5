"""One tile of the convolution: its products, and its epilogue."""

from __future__ import annotations

import triton
import triton.language as tl

from ._implicit_gemm import accumulate, finish, halves, multiply, swizzle


@triton.jit
def conv_tile(  # type: ignore[no-untyped-def]
    tile,
    x_ptr, w_ptr, second_ptr,
    y_ptr, residual_ptr,
    conv_bias_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr,
    residual_scale_ptr, residual_shift_ptr,
    in_scale_ptr, in_shift_ptr,
    partial_ptr, statistics_ptr,
    M, K, H, W, C, OH, OW,
    stride_h, stride_w, pad_h, pad_w, dil_h, dil_w,
    group_c, group_k, w_stride, H2, W2, C2, stride2_h, stride2_w,
    steps, steps_per_split, eps,
    KH: tl.constexpr, KW: tl.constexpr, TAP_C: tl.constexpr,
    ACTIVATION: tl.constexpr, IN_ACTIVATION: tl.constexpr,
    MODE: tl.constexpr, EVEN_C: tl.constexpr, PRECISION: tl.constexpr,
    X_DESCRIPTOR: tl.constexpr, W_DESCRIPTOR: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A tile of y = act(bn(conv(x, w) + conv(second, rest of w)) + residual).

    Its group of filters and its part of the depth are those of the program.

    Args:
        tile: Number of the tile, in the order of ``swizzle``.
        x_ptr: Input, (N, H, W, C); with ``X_DESCRIPTOR`` a descriptor of it as (N H W, C).
        w_ptr: Filters, (K, KH KW group_c + C2); with ``W_DESCRIPTOR`` a descriptor of it.
        second_ptr: Input of a 1x1 convolution that is added, (N, H2, W2, C2), or None.
        y_ptr: Receives the result, (M, K).
        residual_ptr: Map that is added, (M, K), or None.
        conv_bias_ptr: Bias of the convolution, (K,) any float, or None for 0.
        weight_ptr: Weight of the batch norm, (K,) any float, or None for 1.
        bias_ptr: Bias of the batch norm, (K,) any float, or None for 0.
        mean_ptr: Mean of the batch norm, (K,) any float, or None for 0.
        var_ptr: Variance of the batch norm, (K,) any float, or None: the weight is the scale.
        residual_scale_ptr: Scale of the residual, (K,) any float, or None.
        residual_shift_ptr: Shift of the residual, (K,) any float, or None.
        in_scale_ptr: Scale of the input before its activation, (C,) any float, or None for neither.
        in_shift_ptr: Shift of the input before its activation, (C,) any float, or None.
        partial_ptr: Receives sums of a part of the depth, (splits, M, K) float32, in place of y; or
            None.
        statistics_ptr: Receives mean and M2 of each tile of rows, (tiles of rows, 2, K) float32; or
            None.
        M: Pixels of the result in the batch: the rows of the GEMM.
        K: Number of filters.
        H: Height of the input.
        W: Width of the input.
        C: Channels of the input.
        OH: Height of the result.
        OW: Width of the result.
        stride_h: Vertical stride.
        stride_w: Horizontal stride.
        pad_h: Rows of zeros above the input.
        pad_w: Columns of zeros left of the input.
        dil_h: Rows from one tap to the next.
        dil_w: Columns from one tap to the next.
        group_c: Input channels of a group.
        group_k: Filters of a group.
        w_stride: Elements from one filter to the next.
        H2: Height of the second input.
        W2: Width of the second input.
        C2: Channels of the second input.
        stride2_h: Vertical stride of the second convolution.
        stride2_w: Horizontal stride of the second convolution.
        steps: Steps through the depth of the first convolution.
        steps_per_split: Steps of a program, through the depth of both.
        eps: Added to the variance.
        KH: Height of the filters.
        KW: Width of the filters.
        TAP_C: Channels of a tap, which a step divides by; 0 for a single tap.
        ACTIVATION: Number of the activation of the result.
        IN_ACTIVATION: Number of the activation of the input.
        MODE: How the depth is traversed, from ``mode_of``: ``"pointwise"``, ``"taps"`` or
            ``"flat"``.
        EVEN_C: Whether a tap's channels are whole blocks.
        PRECISION: Of the products: ``"half"``, ``"tf32"`` or ``"ieee"``.
        X_DESCRIPTOR: Whether ``x_ptr`` is a tensor descriptor.
        W_DESCRIPTOR: Whether ``w_ptr`` is a tensor descriptor.
        GROUP_M: Rows of tiles whose programs follow each other.
        BLOCK_M: Pixels of a tile.
        BLOCK_N: Filters of a tile.
        BLOCK_K: Terms of a step.
        PARTS: Blocks of columns that the epilogue handles one by one: 1, 2 or 4.
    """
    tile_m, tile_n = swizzle(tile, tl.cdiv(M, BLOCK_M), tl.cdiv(group_k, BLOCK_N), GROUP_M)
    group, split = tl.program_id(1), tl.program_id(2)
    first_row = tile_m * BLOCK_M
    m = first_row + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_valid, filter_valid = m < M, n < group_k
    first_filter = group * group_k + tile_n * BLOCK_N
    channel = group * group_k + n
    image = m // (OH * OW)
    pixel = m - image * (OH * OW)
    oy = pixel // OW
    ox = pixel - oy * OW

    begin = split * steps_per_split
    end = begin + steps_per_split
    acc = accumulate(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
        x_ptr, w_ptr, in_scale_ptr, in_shift_ptr,
        image, oy, ox, row_valid, first_row, first_filter, filter_valid,
        group * group_c, tl.minimum(begin, steps), tl.minimum(end, steps),
        H, W, C, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, group_c, w_stride,
        KH, KW, TAP_C, IN_ACTIVATION, MODE, EVEN_C, PRECISION, X_DESCRIPTOR, W_DESCRIPTOR,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if second_ptr is not None:
        pixels = second_ptr + (image.to(tl.int64) * H2 * W2 * C2)[:, None]
        pixels += ((oy * stride2_h * W2 + ox * stride2_w) * C2)[:, None]
        more = tl.cdiv(C2, BLOCK_K)
        depth = KH * KW * group_c
        # Not pipelined as one loop with the first, since its addresses are computed differently.
        for block in range(
            tl.minimum(tl.maximum(begin - steps, 0), more),
            tl.minimum(tl.maximum(end - steps, 0), more),
        ):
            c = block * BLOCK_K + tl.arange(0, BLOCK_K)
            a = tl.load(pixels + c[None, :], mask=row_valid[:, None] & (c < C2)[None, :], other=0.0)
            if W_DESCRIPTOR:
                b = w_ptr.load([first_filter, depth + block * BLOCK_K]).T
            else:
                at = channel.to(tl.int64)[None, :] * w_stride + (depth + c)[:, None]
                valid = (c < C2)[:, None] & filter_valid[None, :]
                b = tl.load(w_ptr + at, mask=valid, other=0.0)
            acc = multiply(acc, a, b, PRECISION)

    # The epilogue handles a few columns at a time: a thread may own a whole row of the tile, and
    # the scales and shifts of all its columns would not fit into registers.
    if PARTS == 4:
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        quarters = halves(left, BLOCK_M, BLOCK_N // 2) + halves(right, BLOCK_M, BLOCK_N // 2)
    elif PARTS == 2:
        quarters = halves(acc, BLOCK_M, BLOCK_N)
    else:
        quarters = (acc,)
    for i in tl.static_range(PARTS):
        columns = tile_n * BLOCK_N + i * (BLOCK_N // PARTS) + tl.arange(0, BLOCK_N // PARTS)
        _store(
            quarters[i], y_ptr, residual_ptr, conv_bias_ptr, weight_ptr, bias_ptr, mean_ptr,
            var_ptr, residual_scale_ptr, residual_shift_ptr, partial_ptr, statistics_ptr,
            m, group * group_k + columns, row_valid, columns < group_k, split, tile_m, M, K, eps,
            ACTIVATION, BLOCK_M,
        )  # fmt: skip


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    acc,
    y_ptr, residual_ptr, conv_bias_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr,
    residual_scale_ptr, residual_shift_ptr, partial_ptr, statistics_ptr,
    m, channel, row_valid, channel_valid, split, tile_m, M, K, eps,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Store some columns of a tile: partial sums, or results with optional statistics.

    Args:
        acc: Sums of the columns, (BLOCK_M, columns) float32.
        y_ptr: Receives the result, (M, K).
        residual_ptr: Map that is added, (M, K), or None.
        conv_bias_ptr: Bias of the convolution, (K,) any float, or None for 0.
        weight_ptr: Weight of the batch norm, (K,) any float, or None for 1.
        bias_ptr: Bias of the batch norm, (K,) any float, or None for 0.
        mean_ptr: Mean of the batch norm, (K,) any float, or None for 0.
        var_ptr: Variance of the batch norm, (K,) any float, or None: the weight is the scale.
        residual_scale_ptr: Scale of the residual, (K,) any float, or None.
        residual_shift_ptr: Shift of the residual, (K,) any float, or None.
        partial_ptr: Receives the sums, (splits, M, K) float32, in place of y; or None.
        statistics_ptr: Receives mean and M2 of the rows, (tiles of rows, 2, K) float32; or None.
        m: Rows of the tile.
        channel: Filters of the columns.
        row_valid: Which of the rows exist.
        channel_valid: Which of the filters exist.
        split: Number of the part of the depth.
        tile_m: Number of the row of tiles.
        M: Pixels of the result in the batch: the rows of the GEMM.
        K: Number of filters.
        eps: Added to the variance.
        ACTIVATION: Number of the activation of the result.
        BLOCK_M: Pixels of a tile.
    """
    if partial_ptr is not None:
        at = (split.to(tl.int64) * M + m)[:, None] * K + channel[None, :]
        tl.store(partial_ptr + at, acc, mask=row_valid[:, None] & channel_valid[None, :])
    else:
        v = finish(
            acc, y_ptr, residual_ptr, conv_bias_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr,
            residual_scale_ptr, residual_shift_ptr, m, channel, row_valid, channel_valid, K, eps,
            ACTIVATION,
        )  # fmt: skip
        if statistics_ptr is not None:
            count = tl.minimum(M - tile_m * BLOCK_M, BLOCK_M).to(tl.float32)
            rough = tl.sum(tl.where(row_valid[:, None], v, 0.0), 0) / count
            d = tl.where(row_valid[:, None], v - rough[None, :], 0.0)
            left = tl.sum(d, 0)
            to = statistics_ptr + tile_m.to(tl.int64) * 2 * K + channel
            tl.store(to, rough + left / count, mask=channel_valid)
            tl.store(to + K, tl.sum(d * d, 0) - left * left / count, mask=channel_valid)
