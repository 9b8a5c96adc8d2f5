r"""y = relu(bn(conv(x, w)) + residual), all of it in one kernel.

    y[m][n] = relu(scale[n] sum_k a[m][k] w[n][k] + shift[n] + r[m][n])

an implicit matrix product (see ``_implicit_gemm.py``), batch norm folded in the epilogue from its
live parameters. Bytes: x, w, the residual and y once each, if the L2 cache holds what neighbouring
programs share; for that they run in groups of 8 rows of tiles. Flops: 2 m n k. In bfloat16 on an
H100 that is memory-bound below 300 flops a byte: every 1x1 with a residual, all of ResNet's stage 1
and most of stage 2. So what would be passes of their own are options here: a batch norm and ReLU
before the convolution (on the way from memory to the product), a batch norm on the residual, the
statistics of the result for the batch norm behind it, and a second convolution that is added (a
block's shortcut), as more depth in the same sum.

Tiles and their reasons are in ``_conv_plan.py``. From sm_90 on, filters and the pixels of 1x1
convolutions come by tensor descriptors: one thread asks for a whole tile and its tail past the
tensor's end is zeros; the pixels under a tap are no rectangle of memory and come by pointers.

Where even small tiles are few, the depth is split: each part's sums go to memory in float32, and a
finishing kernel adds them in order. Statistics leave each tile of rows as mean and M2, from two
passes over registers, and are merged in float64 by a kernel that goes over them in order (Chan,
Golub and LeVeque). No atomics: the same bits every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._prims_common import suggest_memory_format
from triton.tools.tensor_descriptor import TensorDescriptor

from ._common import REGISTERS, cdiv, check_map, check_same, on_device, vector
from ._conv_plan import (
    FINISH_TILE,
    GROUP_M,
    ConvConfig,
    mode_of,
    parts_of,
    plan,
    precision_of,
    steps_of,
)
from ._conv_shape import check_pair, conv_shape
from ._implicit_gemm import accumulate, finish, halves, multiply, swizzle

#: Channels of a program, and slabs at a time, of the kernel that merges statistics.
STATISTICS_C, STATISTICS_S = 32, 32


@triton.jit
def conv_bn_add_relu_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # (N, H, W, C); with X_DESCRIPTOR a descriptor of it as (N H W, C)
    w_ptr,  # (K, KH KW group_c + C2); with W_DESCRIPTOR a descriptor of it
    second_ptr,  # (N, H2, W2, C2), or None
    y_ptr, residual_ptr,  # (M, K); residual or None
    conv_bias_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr,  # (K,) any float, or None
    residual_scale_ptr, residual_shift_ptr,  # (K,) any float, or None
    in_scale_ptr, in_shift_ptr,  # (C,) any float, or None
    partial_ptr,  # (splits, M, K) float32, or None: sums of a part of the depth, and no y
    statistics_ptr,  # (tiles of rows, 2, K) float32, or None: mean, M2
    M, K, H, W, C, OH, OW, KH, KW,
    stride_h, stride_w, pad_h, pad_w, dil_h, dil_w,
    group_c, group_k, w_stride, H2, W2, C2, stride2_h, stride2_w,
    steps, steps_per_split, eps,
    RELU: tl.constexpr, MODE: tl.constexpr, EVEN_C: tl.constexpr, PRECISION: tl.constexpr,
    X_DESCRIPTOR: tl.constexpr, W_DESCRIPTOR: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A tile of one group's filters; program axes are tiles, groups, splits."""
    tile_m, tile_n = swizzle(
        tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(group_k, BLOCK_N), GROUP_M
    )
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
        H, W, C, KH, KW, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, group_c, w_stride,
        MODE, EVEN_C, PRECISION, X_DESCRIPTOR, W_DESCRIPTOR, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if second_ptr is not None:
        pixels = second_ptr + (image.to(tl.int64) * H2 * W2 * C2)[:, None]
        pixels += ((oy * stride2_h * W2 + ox * stride2_w) * C2)[:, None]
        more = tl.cdiv(C2, BLOCK_K)
        depth = KH * KW * group_c
        # Not pipelined as one loop with the first: its places in memory are others.
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

    # In parts, because a thread may own a whole row of the tile, with a scale and a shift for each
    # of its columns: all at once would not fit into registers.
    if PARTS == 4:
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        quarters = halves(left, BLOCK_M, BLOCK_N // 2) + halves(right, BLOCK_M, BLOCK_N // 2)
    elif PARTS == 2:
        quarters = halves(acc, BLOCK_M, BLOCK_N)
    else:
        quarters = (acc,)
    for i in tl.static_range(PARTS):
        columns = tile_n * BLOCK_N + i * (BLOCK_N // PARTS) + tl.arange(0, BLOCK_N // PARTS)
        _leave(
            quarters[i], y_ptr, residual_ptr, conv_bias_ptr, weight_ptr, bias_ptr, mean_ptr,
            var_ptr, residual_scale_ptr, residual_shift_ptr, partial_ptr, statistics_ptr,
            m, group * group_k + columns, row_valid, columns < group_k, split, tile_m, M, K, eps,
            RELU, BLOCK_M,
        )  # fmt: skip


@triton.jit
def _leave(  # type: ignore[no-untyped-def]
    acc,  # (BLOCK_M, columns) float32
    y_ptr, residual_ptr, conv_bias_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr,
    residual_scale_ptr, residual_shift_ptr, partial_ptr, statistics_ptr,  # as the kernel's
    m, channel, row_valid, channel_valid, split, tile_m, M, K, eps,
    RELU: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Stores some columns of a tile: as they are, or finished, with their statistics if wanted."""
    if partial_ptr is not None:
        at = (split.to(tl.int64) * M + m)[:, None] * K + channel[None, :]
        tl.store(partial_ptr + at, acc, mask=row_valid[:, None] & channel_valid[None, :])
    else:
        v = finish(
            acc, y_ptr, residual_ptr, conv_bias_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr,
            residual_scale_ptr, residual_shift_ptr, m, channel, row_valid, channel_valid, K, eps,
            RELU,
        )  # fmt: skip
        if statistics_ptr is not None:
            count = tl.minimum(M - tile_m * BLOCK_M, BLOCK_M).to(tl.float32)
            rough = tl.sum(tl.where(row_valid[:, None], v, 0.0), 0) / count
            d = tl.where(row_valid[:, None], v - rough[None, :], 0.0)
            left = tl.sum(d, 0)
            to = statistics_ptr + tile_m.to(tl.int64) * 2 * K + channel
            tl.store(to, rough + left / count, mask=channel_valid)
            tl.store(to + K, tl.sum(d * d, 0) - left * left / count, mask=channel_valid)


@triton.jit
def conv_split_finish_kernel(  # type: ignore[no-untyped-def]
    partial_ptr,  # (splits, M, K) float32
    y_ptr, residual_ptr,  # (M, K); residual or None
    conv_bias_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr,  # (K,) any float, or None
    residual_scale_ptr, residual_shift_ptr,  # (K,) any float, or None
    M, K, splits, eps,
    RELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds the parts of a sum in order, and finishes as the convolution does."""
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
        residual_scale_ptr, residual_shift_ptr, m, n, m < M, n < K, K, eps, RELU,
    )  # fmt: skip


@triton.jit
def conv_statistics_kernel(  # type: ignore[no-untyped-def]
    statistics_ptr,  # (slabs, 2, K) float32: mean, M2 of block_m rows, and of what is left
    mean_ptr, var_ptr,  # (K,) float32
    M, K, slabs, slab_rows,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance of each channel."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = tl.zeros((BLOCK_C,), tl.float64) + M
    mean = tl.zeros((BLOCK_C,), tl.float64)
    for s0 in range(0, slabs, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        valid = (s < slabs)[:, None] & (c < K)[None, :]
        at = statistics_ptr + s.to(tl.int64)[:, None] * 2 * K + c[None, :]
        share = tl.minimum(M - s * slab_rows, slab_rows).to(tl.float64)
        mean += tl.sum(tl.load(at, mask=valid, other=0.0).to(tl.float64) * share[:, None], 0)
    mean = mean / rows
    m2 = tl.zeros((BLOCK_C,), tl.float64)
    for s0 in range(0, slabs, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        valid = (s < slabs)[:, None] & (c < K)[None, :]
        at = statistics_ptr + s.to(tl.int64)[:, None] * 2 * K + c[None, :]
        share = tl.minimum(M - s * slab_rows, slab_rows).to(tl.float64)
        delta = tl.load(at, mask=valid, other=0.0).to(tl.float64) - mean[None, :]
        part = tl.load(at + K, mask=valid, other=0.0).to(tl.float64)
        m2 += tl.sum(tl.where(valid, part + delta * delta * share[:, None], 0.0), 0)
    tl.store(mean_ptr + c, mean.to(tl.float32), mask=c < K)
    tl.store(var_ptr + c, (m2 / rows).to(tl.float32), mask=c < K)


class Affine(NamedTuple):
    """Batch norm behind a convolution with a bias; also scale and shift, as weight and bias."""

    conv_bias: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    eps: float = 0.0

    def checked(self, op: str, names: Sequence[str], channels: int, x: Tensor) -> Affine:
        """With each vector checked by its name, and dense."""
        dense = [vector(op, *pair, channels, x) for pair in zip(names, self[:5], strict=True)]
        return Affine(dense[0], dense[1], dense[2], dense[3], dense[4], self.eps)


BATCH_NORM = ("conv_bias", "bn_weight", "bn_bias", "mean", "var")
FOLDED = ("", "scale", "shift", "", "")


class Second(NamedTuple):
    """A convolution by 1x1 that is added: its input and its stride."""

    x: Tensor
    stride: tuple[int, int]


class ConvCall:
    """One call of the convolution: its sizes, and operands as kernels take them."""

    def __init__(
        self,
        op: str,
        x: Tensor,
        weight: Tensor,
        weight_shape: Sequence[int],
        geometry: tuple[Sequence[int], Sequence[int], Sequence[int], int],
        affine: Affine,
        names: Sequence[str],
        residual: Tensor | None = None,
        residual_affine: tuple[Tensor | None, Tensor | None] = (None, None),
        prologue: tuple[Tensor | None, Tensor | None] = (None, None),
        second: Second | None = None,
        relu: bool = True,
    ) -> None:
        s = conv_shape(op, x, weight_shape, *geometry)
        self.op, self.shape, self.like, self.relu = op, s, x, relu
        self.x = self.map(x)
        self.second = second and self._second(second)
        self.depth = s.depth + (second.x.shape[1] if second else 0)
        check_same(op, "packed", weight.reshape(-1), [s.k * self.depth], x)
        self.weight = weight.contiguous().view(s.k, self.depth)
        self.affine = affine.checked(op, names, s.k, x)
        check_same(op, "residual", residual, s.result, x)
        self.residual = None if residual is None else self.map(residual)
        for what, (scale, shift) in (("residual", residual_affine), ("in", prologue)):
            if (scale is None) != (shift is None):
                raise ValueError(f"{op}: {what}_scale, {what}_shift: expected both or neither")
        self.residual_affine = [
            vector(op, f"residual_{name}", v, s.k, x)
            for name, v in zip(("scale", "shift"), residual_affine, strict=True)
        ]
        self.prologue = [
            vector(op, f"in_{name}", v, s.c, x)
            for name, v in zip(("scale", "shift"), prologue, strict=True)
        ]

    @staticmethod
    def map(t: Tensor) -> Tensor:
        """``t`` as NHWC."""
        return t.contiguous(memory_format=torch.channels_last)

    def _second(self, second: Second) -> Second:
        op, s, (x, stride) = self.op, self.shape, second
        check_map(op, "x2", x)
        stride = check_pair(op, "stride2", stride, 1)
        size = [(n - 1) // by + 1 for n, by in zip(x.shape[2:], stride, strict=True)]
        if s.groups != 1:
            raise ValueError(f"{op}: groups: expected 1, got {s.groups}")
        if x.shape[0] != s.n or size != [s.out_h, s.out_w]:
            raise ValueError(
                f"{op}: x2: expected {s.n} images with a pixel for each of {s.out_h} x {s.out_w} "
                f"results, got {list(x.shape)} with stride {list(stride)}"
            )
        check_same(op, "x2", x, x.shape, self.like)
        if x.shape[1:].numel() >= 2**31:
            raise ValueError(
                f"{op}: x2: expected less than 2^31 elements in an image, got {list(x.shape)}"
            )
        return Second(self.map(x), stride)

    def empty(self, channels: int | None = None) -> Tensor:
        """An NHWC map of the result's size."""
        n, k, h, w = self.shape.result
        return torch.empty(
            (n, channels or k, h, w),
            dtype=self.like.dtype,
            device=self.like.device,
            memory_format=torch.channels_last,
        )

    def choose(self, may_split: bool) -> ConvConfig:
        """The plan's configuration."""
        second = self.second.x.shape[1] if self.second else 0
        return plan(self.shape, self.x, second=second, may_split=may_split)

    def operands(self, config: ConvConfig) -> dict[str, Any]:
        """Maps and filters, as descriptors where these can be; and the way through the depth."""
        s, size = self.shape, self.x.element_size()
        mode = mode_of(s, config)
        even = s.group_c % config.block_k == 0

        def fits(t: Tensor, row: int) -> bool:
            return config.descriptors and t.data_ptr() % 16 == 0 and row * size % 16 == 0

        # A tile of filters may not reach into the next tap, nor one of pixels into another group.
        by_tile = mode == "pointwise" and s.groups == 1 and self.second is None
        x_rows = s.n * s.h * s.w
        w_fits = fits(self.weight, self.depth) and mode != "flat" and (even or by_tile)
        x_fits = fits(self.x, s.c) and by_tile
        x: Any = self.x
        w: Any = self.weight
        if w_fits:
            w = TensorDescriptor(
                w, [s.k, self.depth], [self.depth, 1], [config.block_n, config.block_k]
            )
        if x_fits:
            flat = self.x.permute(0, 2, 3, 1).view(x_rows, s.c)
            x = TensorDescriptor(flat, [x_rows, s.c], [s.c, 1], [config.block_m, config.block_k])
        return {
            "x_ptr": x,
            "w_ptr": w,
            "MODE": mode,
            "EVEN_C": even and mode != "flat",
            "PRECISION": precision_of(self.x),
            "X_DESCRIPTOR": x_fits,
            "W_DESCRIPTOR": w_fits,
        }

    def geometry(self) -> dict[str, Any]:
        """The sizes that ``accumulate`` is told."""
        s = self.shape
        return {
            "H": s.h, "W": s.w, "C": s.c, "KH": s.kh, "KW": s.kw,
            "stride_h": s.stride[0], "stride_w": s.stride[1],
            "pad_h": s.padding[0], "pad_w": s.padding[1],
            "dil_h": s.dilation[0], "dil_w": s.dilation[1],
            "group_c": s.group_c, "w_stride": self.depth,
        }  # fmt: skip

    def epilogue(self) -> dict[str, Any]:
        """What ``finish`` is told of channels."""
        a = self.affine
        return {
            "conv_bias_ptr": a.conv_bias, "weight_ptr": a.weight, "bias_ptr": a.bias,
            "mean_ptr": a.mean, "var_ptr": a.var, "eps": float(a.eps),
            "residual_ptr": self.residual,
            "residual_scale_ptr": self.residual_affine[0],
            "residual_shift_ptr": self.residual_affine[1],
            "K": self.shape.k, "RELU": self.relu,
        }  # fmt: skip

    def run(self, config: ConvConfig | None, statistics: Tensor | None = None) -> Tensor:
        """The result, NHWC."""
        s, y = self.shape, self.empty()
        if y.numel() == 0:
            return y
        config = config or self.choose(may_split=True)
        second, (h2, w2, c2, stride2) = None, (1, 1, 1, (1, 1))
        if self.second:
            second, stride2 = self.second
            c2, h2, w2 = second.shape[1:]
        steps = steps_of(s, config)
        all_steps = steps + (cdiv(c2, config.block_k) if self.second else 0)
        partial = None
        if config.split_k > 1:
            partial = torch.empty(
                (config.split_k, s.rows, s.k), dtype=torch.float32, device=y.device
            )
        tiles = cdiv(s.rows, config.block_m) * cdiv(s.group_k, config.block_n)
        with on_device(y):
            conv_bn_add_relu_kernel[(tiles, s.groups, config.split_k)](
                **self.operands(config), **self.geometry(), **self.epilogue(),
                second_ptr=second, y_ptr=y, partial_ptr=partial, statistics_ptr=statistics,
                in_scale_ptr=self.prologue[0], in_shift_ptr=self.prologue[1],
                M=s.rows, OH=s.out_h, OW=s.out_w, group_k=s.group_k,
                H2=h2, W2=w2, C2=c2, stride2_h=stride2[0], stride2_w=stride2[1],
                steps=steps, steps_per_split=cdiv(all_steps, config.split_k),
                GROUP_M=GROUP_M, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
                BLOCK_K=config.block_k, PARTS=parts_of(config), num_warps=config.warps,
                num_stages=config.stages, maxnreg=REGISTERS,
            )  # fmt: skip
            if partial is not None:
                m, n, warps = FINISH_TILE
                conv_split_finish_kernel[(cdiv(s.rows, m), cdiv(s.k, n))](
                    partial, y, **self.epilogue(), M=s.rows, splits=config.split_k,
                    BLOCK_M=m, BLOCK_N=n, num_warps=warps, maxnreg=REGISTERS,
                )  # fmt: skip
        return y

    def run_with_statistics(self, config: ConvConfig | None) -> tuple[Tensor, Tensor, Tensor]:
        """The result, and the mean and biased variance of each of its channels."""
        s = self.shape
        config = (config or self.choose(may_split=False))._replace(split_k=1)
        mean = torch.empty((s.k,), dtype=torch.float32, device=self.x.device)
        var = torch.empty_like(mean)
        if s.rows == 0:
            return self.empty(), mean.zero_(), var.zero_()
        slabs = cdiv(s.rows, config.block_m)
        statistics = torch.empty((slabs, 2, s.k), dtype=torch.float32, device=mean.device)
        y = self.run(config, statistics)
        with on_device(y):
            conv_statistics_kernel[(cdiv(s.k, STATISTICS_C),)](
                statistics, mean, var, s.rows, s.k, slabs, config.block_m,
                BLOCK_S=STATISTICS_S, BLOCK_C=STATISTICS_C, num_warps=4, maxnreg=REGISTERS,
            )  # fmt: skip
        return y, mean, var


def _filters(op: str, weight: Tensor, x: Tensor) -> Tensor:
    """``weight`` as [k][kh][kw][c / groups]."""
    check_same(op, "weight", weight, weight.shape, x)
    return weight.permute(0, 2, 3, 1).reshape(-1) if weight.dim() == 4 else weight


def conv_bn_add_relu(
    x: Tensor,
    weight: Tensor,
    conv_bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    eps: float,
    relu: bool,
    *,
    in_scale: Tensor | None = None,
    in_shift: Tensor | None = None,
    config: ConvConfig | None = None,
) -> Tensor:
    r""":math:`y = \max(0, \gamma (w * x + b - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta + r)`.

    Args:
        x: ``(N, C, H, W)``; float32, float16 or bfloat16; channels_last is not copied.
        weight: ``(K, C / groups, kh, kw)``, dtype of ``x``.
        conv_bias: ``(K,)``, any float, or None.
        bn_weight: Likewise; None means 1.
        bn_bias: Likewise; None means 0.
        mean: ``(K,)``, any float.
        var: As ``mean``.
        residual: Shape of the result, dtype of ``x``, or None.
        stride: In pixels, (height, width), as all of these.
        padding: Zeros on each side.
        dilation: Distance between taps.
        groups: Independent groups of channels.
        eps: Added to the variance.
        relu: False leaves the maximum out.
        in_scale: ``(C,)``, any float. With it the convolution is of
            :math:`\max(0, x \cdot \mathrm{scale} + \mathrm{shift})`, rounded to the dtype of ``x``;
            padding stays zero.
        in_shift: As ``in_scale``.
        config: Forces a configuration.

    Returns:
        ``(N, K, OH, OW)``, dtype and memory format of ``x``.

    Raises:
        ValueError: Wrong rank, shape or device, or a kernel larger than the padded map.
        TypeError: Wrong dtype.
    """
    op = "conv_bn_add_relu"
    check_map(op, "x", x)
    call = ConvCall(
        op,
        x,
        _filters(op, weight, x),
        weight.shape,
        (stride, padding, dilation, groups),
        Affine(conv_bias, bn_weight, bn_bias, mean, var, eps),
        BATCH_NORM,
        residual,
        prologue=(in_scale, in_shift),
        relu=relu,
    )
    return call.run(config).contiguous(memory_format=suggest_memory_format(x))


def conv_bn_add_relu_packed(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
    winograd: bool = False,
    *,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    config: ConvConfig | None = None,
) -> Tensor:
    r""":math:`y = \max(0, \mathrm{scale} \cdot (w * x) + \mathrm{shift} + r)`, NHWC.

    Args:
        x: As :func:`conv_bn_add_relu`.
        packed: The weight as a vector, [k][kh][kw][c / groups], dtype of ``x``.
        scale: ``(K,)``, any float.
        shift: As ``scale``.
        residual: See there.
        weight_shape: ``(K, C / groups, kh, kw)``.
        stride: See there, and so all up to ``relu``.
        padding: See there.
        dilation: See there.
        groups: See there.
        relu: See there.
        winograd: The CPU's; not used.
        residual_scale: ``(K,)``, any float: the residual is a map before its own batch norm.
        residual_shift: As ``residual_scale``.
        config: Forces a configuration.

    Returns:
        ``(N, K, OH, OW)``, dtype of ``x``, channels_last.

    Raises:
        ValueError: As :func:`conv_bn_add_relu`.
        TypeError: Wrong dtype.
    """
    call = ConvCall(
        "conv_bn_add_relu_packed",
        x,
        packed,
        weight_shape,
        (stride, padding, dilation, groups),
        Affine(weight=scale, bias=shift),
        FOLDED,
        residual,
        residual_affine=(residual_scale, residual_shift),
        relu=relu,
    )
    return call.run(config)


def conv_conv_add_relu_packed(
    x: Tensor,
    x2: Tensor,
    packed: Tensor,
    shift: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    stride2: Sequence[int],
    relu: bool,
    *,
    config: ConvConfig | None = None,
) -> Tensor:
    r""":math:`y = \max(0, w * x + w_2 * x_2 + \mathrm{shift})` as one sum, NHWC.

    Args:
        x: As :func:`conv_bn_add_relu`.
        x2: A map of whose every ``stride2``-th pixel the 1x1 convolution :math:`w_2` is taken.
        packed: Filter by filter, w as [kh][kw][c] and then the filter of :math:`w_2`, each times
            its scale.
        shift: ``(K,)``, any float.
        weight_shape: ``(K, C, kh, kw)`` of w.
        stride: Of w.
        padding: Of w.
        dilation: Of w.
        stride2: Of :math:`w_2`.
        relu: False leaves the maximum out.
        config: Forces a configuration.

    Returns:
        ``(N, K, OH, OW)``, dtype of ``x``, channels_last.

    Raises:
        ValueError: As :func:`conv_bn_add_relu`.
        TypeError: Wrong dtype.
    """
    call = ConvCall(
        "conv_conv_add_relu_packed",
        x,
        packed,
        weight_shape,
        (stride, padding, dilation, 1),
        Affine(bias=shift),
        FOLDED,
        second=Second(x2, (stride2[0], stride2[1])),
        relu=relu,
    )
    return call.run(config)


def conv_statistics(
    x: Tensor,
    weight: Tensor,
    conv_bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    in_scale: Tensor | None = None,
    in_shift: Tensor | None = None,
    config: ConvConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A convolution, and of its rounded result the mean and the biased variance of each channel.

    Args:
        x: As :func:`conv_bn_add_relu`, and so all arguments.
        weight: See there.
        conv_bias: See there.
        stride: See there.
        padding: See there.
        dilation: See there.
        groups: See there.
        in_scale: See there.
        in_shift: See there.
        config: See there; its split is not used.

    Returns:
        The result in the memory format of ``x``; mean and variance, ``(K,)`` float32.

    Raises:
        ValueError: As :func:`conv_bn_add_relu`.
        TypeError: Wrong dtype.
    """
    op = "conv_statistics"
    check_map(op, "x", x)
    call = ConvCall(
        op,
        x,
        _filters(op, weight, x),
        weight.shape,
        (stride, padding, dilation, groups),
        Affine(bias=conv_bias),
        ("", "", "conv_bias", "", ""),
        prologue=(in_scale, in_shift),
        relu=False,
    )
    y, mean, var = call.run_with_statistics(config)
    return y.contiguous(memory_format=suggest_memory_format(x)), mean, var
