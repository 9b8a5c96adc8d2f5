r"""y = relu(bn(conv(x, w)) + residual), all of it in one kernel.

    y[m][n] = activation(scale[n] sum_k a[m][k] w[n][k] + shift[n] + r[m][n])

an implicit GEMM (see ``_implicit_gemm.py``) with the batch norm folded in the epilogue from its
live parameters. Bytes: x, w, the residual and y once each, if the L2 cache holds what neighbouring
programs share; programs run in groups of 8 rows of tiles for that. Flops: 2 m n k. In bfloat16 on
an H100 it is memory-bound below 300 flops a byte: every 1x1 with a residual, all of ResNet's stage
1 and most of stage 2. So operations that would otherwise be passes of their own are options here: a
batch norm and activation before the convolution (between the load and the product), a batch norm
on the residual, the statistics of the result for the batch norm after it, and a second convolution
that is added (a block's shortcut), as additional depth of the same sum.

Tiles and the reasons for them are in ``_conv_plan.py``, and where a program may compute several
one after another. From sm_90 on, filters and the pixels of 1x1 convolutions are loaded by tensor
descriptors: one thread requests a whole tile, and elements past the tensor's end are zeros. The
pixels under a tap are not a rectangle of memory and are loaded by pointers.

Where there are too few tiles, the depth is split (split-K): partial sums go to memory in float32,
and a finishing kernel adds them in order. The statistics of each tile of rows are a mean and M2,
from two passes over registers, which another kernel merges in order in float64 (Chan, Golub and
LeVeque, 1983). No atomics: the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._bn_finish import store_scale_and_shift, update_running
from ._conv_tile import conv_tile
from ._implicit_gemm import finish

#: Channels of a program, and slabs per iteration, of the kernel that merges statistics.
STATISTICS_C, STATISTICS_S = 32, 32

#: Slabs that one program merges by itself. More are first merged into so many, by a program each:
#: otherwise two programs would read all slabs of a stem's 64 channels while the others wait.
MERGED_SLABS = 128


@triton.jit
def conv_bn_add_relu_kernel(  # type: ignore[no-untyped-def]
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
    PERSISTENT: tl.constexpr,
):  # fmt: skip
    """y = act(bn(conv(x, w) + conv(second, rest of w)) + residual).

    Program axes are tiles, groups, splits of the depth. If ``PERSISTENT``, a program computes one
    tile after another, in the same order. The loops over tiles and over the depth are then made
    one, so that a tile's loads need not wait for the one before it to be stored; with a second
    convolution they could not be.

    Args:
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
        PERSISTENT: Whether there are fewer programs than tiles.
    """
    if PERSISTENT:
        tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(group_k, BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            conv_tile(
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
                KH, KW, TAP_C,
                ACTIVATION, IN_ACTIVATION,
                MODE, EVEN_C, PRECISION,
                X_DESCRIPTOR, W_DESCRIPTOR, GROUP_M,
                BLOCK_M, BLOCK_N, BLOCK_K, PARTS,
            )  # fmt: skip
    else:
        conv_tile(
            tl.program_id(0),
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
            KH, KW, TAP_C,
            ACTIVATION, IN_ACTIVATION,
            MODE, EVEN_C, PRECISION,
            X_DESCRIPTOR, W_DESCRIPTOR, GROUP_M,
            BLOCK_M, BLOCK_N, BLOCK_K, PARTS,
        )  # fmt: skip


@triton.jit
def conv_split_finish_kernel(  # type: ignore[no-untyped-def]
    partial_ptr,
    y_ptr, residual_ptr,
    conv_bias_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr,
    residual_scale_ptr, residual_shift_ptr,
    M, K, splits, eps,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """sum_split partial[split][m][n], in order, and the epilogue of the convolution.

    Args:
        partial_ptr: Sums of each part of the depth, (splits, M, K) float32.
        y_ptr: Receives the result, (M, K).
        residual_ptr: Map that is added, (M, K), or None.
        conv_bias_ptr: Bias of the convolution, (K,) any float, or None for 0.
        weight_ptr: Weight of the batch norm, (K,) any float, or None for 1.
        bias_ptr: Bias of the batch norm, (K,) any float, or None for 0.
        mean_ptr: Mean of the batch norm, (K,) any float, or None for 0.
        var_ptr: Variance of the batch norm, (K,) any float, or None: the weight is the scale.
        residual_scale_ptr: Scale of the residual, (K,) any float, or None.
        residual_shift_ptr: Shift of the residual, (K,) any float, or None.
        M: Pixels of the result in the batch: the rows of the GEMM.
        K: Number of filters.
        splits: Number of parts.
        eps: Added to the variance.
        ACTIVATION: Number of the activation of the result.
        BLOCK_M: Pixels of a tile.
        BLOCK_N: Filters of a tile.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = (m < M)[:, None] & (n < K)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    part = partial_ptr + m.to(tl.int64)[:, None] * K + n[None, :]
    whole = tl.zeros((1,), tl.int64) + K
    for _ in range(0, splits):
        acc += tl.load(part, mask=valid, other=0.0)
        part += (whole * M)[:, None]
    finish(
        acc, y_ptr, residual_ptr, conv_bias_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr,
        residual_scale_ptr, residual_shift_ptr, m, n, m < M, n < K, K, eps, ACTIVATION,
    )  # fmt: skip


@triton.jit
def conv_statistics_kernel(  # type: ignore[no-untyped-def]
    statistics_ptr, merged_ptr,
    mean_ptr, var_ptr,
    weight_ptr, bias_ptr,
    scale_ptr, shift_ptr,
    running_mean_ptr, running_var_ptr,
    batches_ptr,
    M, K, slabs, slab_rows,
    span, span_rows,
    eps, momentum,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Merge each program's slabs into one, or all of them into mean and biased variance.

    Without merged_ptr it is the last kernel that has the statistics in registers, and does what
    depends on them alone: scale and shift, the running statistics, the count of batches.

    Args:
        statistics_ptr: Mean and M2 of each slab's rows, (slabs, 2, K) float32.
        merged_ptr: Receives mean and M2 of each program's slabs, (programs, 2, K) float32; None in
            the last launch.
        mean_ptr: Receives the mean, (K,) float32, without ``merged_ptr``.
        var_ptr: Receives the biased variance, (K,) float32, without ``merged_ptr``.
        weight_ptr: Weight of the batch norm that follows, (K,) any float, or None for 1.
        bias_ptr: Bias of that batch norm, (K,) any float, or None for 0.
        scale_ptr: Receives the scale of that batch norm, (K,) float32; or None.
        shift_ptr: Receives its shift, (K,) float32; or None.
        running_mean_ptr: Running mean, (K,) any float, moved towards the batch's; or None.
        running_var_ptr: Running variance, (K,) any float, moved towards the batch's; or None.
        batches_ptr: Number of batches, (1,) int64, counted up; or None.
        M: Rows of all slabs.
        K: Number of channels.
        slabs: Number of slabs.
        slab_rows: Rows of a slab; the last may have fewer.
        span: Slabs of a program; the last may have fewer.
        span_rows: Rows of these slabs.
        eps: Added to the variance.
        momentum: Weight of the batch in the running statistics.
        BLOCK_S: Slabs at a time.
        BLOCK_C: Channels of a program.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    program = tl.program_id(1)
    begin = program * span
    end = tl.minimum(begin + span, slabs)
    rows = tl.zeros((BLOCK_C,), tl.float64) + tl.minimum(M - begin * slab_rows, span_rows)
    mean = tl.zeros((BLOCK_C,), tl.float64)
    for s0 in range(begin, end, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        valid = (s < end)[:, None] & (c < K)[None, :]
        at = statistics_ptr + s.to(tl.int64)[:, None] * 2 * K + c[None, :]
        share = tl.minimum(M - s * slab_rows, slab_rows).to(tl.float64)
        mean += tl.sum(tl.load(at, mask=valid, other=0.0).to(tl.float64) * share[:, None], 0)
    mean = mean / rows
    m2 = tl.zeros((BLOCK_C,), tl.float64)
    for s0 in range(begin, end, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        valid = (s < end)[:, None] & (c < K)[None, :]
        at = statistics_ptr + s.to(tl.int64)[:, None] * 2 * K + c[None, :]
        share = tl.minimum(M - s * slab_rows, slab_rows).to(tl.float64)
        delta = tl.load(at, mask=valid, other=0.0).to(tl.float64) - mean[None, :]
        part = tl.load(at + K, mask=valid, other=0.0).to(tl.float64)
        m2 += tl.sum(tl.where(valid, part + delta * delta * share[:, None], 0.0), 0)
    if merged_ptr is not None:
        to = merged_ptr + program.to(tl.int64) * 2 * K + c
        tl.store(to, mean.to(tl.float32), mask=c < K)
        tl.store(to + K, m2.to(tl.float32), mask=c < K)
    else:
        var = m2 / rows
        tl.store(mean_ptr + c, mean.to(tl.float32), mask=c < K)
        tl.store(var_ptr + c, var.to(tl.float32), mask=c < K)
        if scale_ptr is not None:
            store_scale_and_shift(
                c, c < K, mean, var, weight_ptr, bias_ptr, scale_ptr, shift_ptr, eps
            )
        if running_mean_ptr is not None:
            update_running(c, c < K, mean, var, running_mean_ptr, running_var_ptr, M, momentum)
        if batches_ptr is not None:
            first = tl.program_id(0) == 0
            tl.store(batches_ptr, tl.load(batches_ptr, mask=first, other=0) + 1, mask=first)
