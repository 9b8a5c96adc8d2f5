r"""The stem: y = max_pool(relu(conv(x, w) * scale + shift)), without storing the convolution.

ResNet's: 3 channels of 224 x 224, 64 filters of 7 x 7, stride 2; then 3 x 3 pooling, stride 2. An
image in 16 bits: 0.30 MB of x are read and 0.40 MB of y written, where the convolution's result
would be 1.6 MB written and read again; 236 Mflop.

A program computes one tile of pooled pixels for 64 filters: 5 x 5 of them need 11 x 11 pixels of
the convolution, 121 of the 128 rows of its GEMM; the rows between neighbouring tiles are computed
twice (11 x 11 / (10 x 10), 21% more). The depth is traversed as one axis (ky, kx, c) (see
``_implicit_gemm.py``), since blocks of 3 channels cannot be loaded as tiles: x is gathered, from
the L1 cache for most taps.

Loads of x are asynchronous in tf32 alone: cp.async copies 4 bytes at least, and two neighbours of
the gathered 16-bit elements are not known to be one aligned word; the code for 16 bits is the same
with two to four stages. Nor is the next tile loaded ahead. A loop over tiles around all of this,
flattened or not, was compiled ahead of time for sm_80 and sm_90: 16 bits still have no asynchronous
load, and a thread needs 200 to 255 registers in place of 140 to 178; tf32 needs 255 in place of 153
to 200, and on sm_80 spills unless flattened.

The rounded results are pooled along rows and then along columns, in kernel_w and kernel_h steps of
``tl.gather`` through shared memory: 6 instead of the 9 of a direct 3 x 3 window. Pixels outside of
the convolution's map are minus infinity, and NaN is propagated.

Designed for one program of 8 warps per multiprocessor in strict float32, two otherwise; 16 KiB of
shared memory in half precision, for the tile that is gathered from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..activation import Activation
from ._activation import activate
from ._common import REGISTERS, cdiv, channel_affine, check_map, on_device, power_of_two
from ._conv_call import BATCH_NORM, FOLDED, Affine, ConvCall, filters
from ._conv_plan import precision_of
from ._conv_shape import ConvShape, check_pair, window
from ._implicit_gemm import accumulate


class StemConfig(NamedTuple):
    """A tile of the stem.

    Attributes:
        block_m: Pixels of the convolution.
        block_n: Filters.
        block_k: Depth of a step.
        warps: Warps of the program.
        stages: Stages of its pipeline.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


#: By the precision of products. The second of each is for maps with too few of the first.
CONFIGS: dict[str, list[StemConfig]] = {
    "half": [StemConfig(128, 64, 32, 8, 2), StemConfig(64, 64, 32, 8, 2)],
    "tf32": [StemConfig(128, 64, 32, 8, 2), StemConfig(64, 64, 32, 8, 2)],
    "ieee": [StemConfig(64, 32, 16, 4, 2)],
}


@triton.jit
def _larger(best, v):  # type: ignore[no-untyped-def]
    """The larger, or NaN if there is one.

    Args:
        best: Largest values so far.
        v: Values to compare with.
    """
    return tl.where((v > best) | (v != v), v, best)


@triton.jit
def conv_bn_relu_maxpool_kernel(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, y_ptr,
    conv_bias_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr,
    K, H, W, OH, OW, PH, PW,
    stride_h, stride_w, pad_h, pad_w, dil_h, dil_w,
    pool_pad_h, pool_pad_w, tiles_y, tiles_x, eps,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    POOL_H: tl.constexpr, POOL_W: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    BLOCK_MIDDLE: tl.constexpr, BLOCK_OUT: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = max_pool(act(bn(conv(x, w)))), for a tile of pooled pixels and a block of filters.

    Args:
        x_ptr: Input, (N, H, W, C).
        w_ptr: Filters, (K, KH KW C).
        y_ptr: Receives the result, (N, PH, PW, K).
        conv_bias_ptr: Bias of the convolution, (K,) any float, or None for 0.
        weight_ptr: Weight of the batch norm, (K,) any float, or None for 1.
        bias_ptr: Bias of the batch norm, (K,) any float, or None for 0.
        mean_ptr: Mean of the batch norm, (K,) any float, or None for 0.
        var_ptr: Variance of the batch norm, (K,) any float, or None: the weight is the scale.
        K: Number of filters.
        H: Height of the input.
        W: Width of the input.
        OH: Height of the convolution's result.
        OW: Width of the convolution's result.
        PH: Height of the pooled result.
        PW: Width of the pooled result.
        stride_h: Vertical stride.
        stride_w: Horizontal stride.
        pad_h: Rows of zeros above the input.
        pad_w: Columns of zeros left of the input.
        dil_h: Rows from one tap to the next.
        dil_w: Columns from one tap to the next.
        pool_pad_h: Rows of minus infinity above the convolution's result.
        pool_pad_w: Columns of minus infinity left of the convolution's result.
        tiles_y: Rows of tiles in an image.
        tiles_x: Columns of tiles in an image.
        eps: Added to the variance.
        C: Channels of the input, a constant as a step divides by it.
        KH: Height of the filters.
        KW: Width of the filters.
        POOL_H: Height of the pool's window.
        POOL_W: Width of the pool's window.
        STEP_H: Vertical stride of the pool.
        STEP_W: Horizontal stride of the pool.
        TILE_H: Rows of pooled pixels of a program.
        TILE_W: Columns of pooled pixels of a program.
        BLOCK_MIDDLE: Pixels of the tile once pooled along rows, as a power of two.
        BLOCK_OUT: Pixels of the tile once pooled, as a power of two.
        ACTIVATION: Number of the activation in front of the pool.
        PRECISION: Of the products: ``"half"``, ``"tf32"`` or ``"ieee"``.
        BLOCK_M: Pixels of the convolution's result in a tile.
        BLOCK_N: Filters of a tile.
        BLOCK_K: Terms of a step.
    """
    ROWS: tl.constexpr = (TILE_H - 1) * STEP_H + POOL_H
    COLS: tl.constexpr = (TILE_W - 1) * STEP_W + POOL_W
    tile = tl.program_id(0)
    image = tile // (tiles_y * tiles_x)
    within = tile - image * (tiles_y * tiles_x)
    py0 = within // tiles_x * TILE_H
    px0 = within % tiles_x * TILE_W
    i = tl.arange(0, BLOCK_M)
    oy = py0 * STEP_H - pool_pad_h + i // COLS
    ox = px0 * STEP_W - pool_pad_w + i % COLS
    in_map = (i < ROWS * COLS) & (oy >= 0) & (oy < OH) & (ox >= 0) & (ox < OW)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    images = tl.zeros((BLOCK_M,), tl.int32) + image
    acc = accumulate(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
        x_ptr, w_ptr, None, None, images, oy, ox, in_map, 0, tl.program_id(1) * BLOCK_N, n < K,
        0, 0, tl.cdiv(KH * KW * C, BLOCK_K),
        H, W, C, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, C, KH * KW * C, KH, KW, C,
        0, "flat", False, PRECISION, False, False, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    scale, shift = channel_affine(
        n, n < K, conv_bias_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, eps
    )
    v = activate(acc * scale[None, :] + shift[None, :], ACTIVATION).to(y_ptr.dtype.element_ty)
    v = tl.where(in_map[:, None], v, float("-inf")).to(y_ptr.dtype.element_ty)

    # Along rows: pixel (r, q) of (ROWS, TILE_W) is the largest of v's from (r, q STEP_W) on.
    j = tl.arange(0, BLOCK_MIDDLE)
    first = tl.where(j < ROWS * TILE_W, j // TILE_W * COLS + j % TILE_W * STEP_W, 0)
    middle = tl.full((BLOCK_MIDDLE, BLOCK_N), float("-inf"), tl.float32)
    for b in tl.static_range(POOL_W):
        at = tl.broadcast_to((first + b)[:, None], (BLOCK_MIDDLE, BLOCK_N))
        middle = _larger(middle, tl.gather(v, at, 0).to(tl.float32))
    row_pooled = middle.to(y_ptr.dtype.element_ty)

    o = tl.arange(0, BLOCK_OUT)
    first = tl.where(o < TILE_H * TILE_W, o // TILE_W * STEP_H * TILE_W + o % TILE_W, 0)
    best = tl.full((BLOCK_OUT, BLOCK_N), float("-inf"), tl.float32)
    for b in tl.static_range(POOL_H):
        at = tl.broadcast_to((first + b * TILE_W)[:, None], (BLOCK_OUT, BLOCK_N))
        best = _larger(best, tl.gather(row_pooled, at, 0).to(tl.float32))
    py = py0 + o // TILE_W
    px = px0 + o % TILE_W
    valid = (o < TILE_H * TILE_W) & (py < PH) & (px < PW)
    at = ((image.to(tl.int64) * PH + py) * PW + px)[:, None] * K + n[None, :]
    tl.store(y_ptr + at, best.to(y_ptr.dtype.element_ty), mask=valid[:, None] & (n < K)[None, :])


class Pool(NamedTuple):
    """The window of the max-pool, its stride, and its padding with minus infinity.

    Attributes:
        kernel: Window of the max-pool, ``(height, width)``.
        stride: Stride of the max-pool, ``(height, width)``.
        padding: Padding with minus infinity on each side, ``(height, width)``.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def size(self, s: ConvShape) -> tuple[int, int]:
        """Height and width of the pooled map.

        Args:
            s: Sizes of the convolution.
        """
        sizes = [
            window(n, k, by, pad) for n, k, by, pad in zip((s.out_h, s.out_w), *self, strict=True)
        ]
        return sizes[0], sizes[1]


def _pool(
    op: str, s: ConvShape, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Pool:
    pool = Pool(
        check_pair(op, "pool_kernel", kernel, 1),
        check_pair(op, "pool_stride", stride, 1),
        check_pair(op, "pool_padding", padding, 0),
    )
    if any(2 * p > k for p, k in zip(pool.padding, pool.kernel, strict=True)):
        raise ValueError(
            f"{op}: pool_padding: expected at most half of pool_kernel {list(kernel)}, "
            f"got {list(padding)}"
        )
    if min(pool.size(s)) < 1:
        raise ValueError(
            f"{op}: pool_kernel: expected at most the padded map of {s.out_h} x {s.out_w}, "
            f"got {list(kernel)}"
        )
    return pool


def tile_of(config: StemConfig, pool: Pool, pooled: tuple[int, int]) -> tuple[int, int] | None:
    """The tile of pooled pixels that covers the map with the fewest tiles; None if none fits.

    Args:
        config: The tile of the convolution.
        pool: The max-pool.
        pooled: Height and width of the pooled map.

    Returns:
        ``(rows, columns)`` of pooled pixels.
    """
    best = None
    for h in range(1, min(pooled[0], config.block_m) + 1):
        rows = (h - 1) * pool.stride[0] + pool.kernel[0]
        # As many columns as still fit.
        most = (config.block_m // rows - pool.kernel[1]) // pool.stride[1] + 1
        w = min(most, pooled[1])
        if w < 1:
            break
        tiles = cdiv(pooled[0], h) * cdiv(pooled[1], w)
        # Among equal numbers of tiles, the one with the fewest pixels to gather.
        if best is None or (tiles, rows * w) < best[0]:
            best = (tiles, rows * w), (h, w)
    return best and best[1]


def _run(call: ConvCall, pool: Pool, config: StemConfig | None) -> Tensor:
    """The stem in one kernel where a tile fits, else the convolution and PyTorch's max-pool."""
    s, x = call.shape, call.x
    pooled = pool.size(s)
    candidates = [config] if config else CONFIGS[precision_of(x)]
    tiles = [tile_of(c, pool, pooled) for c in candidates]
    fitting = [(c, t) for c, t in zip(candidates, tiles, strict=True) if t is not None]
    if not fitting or s.groups != 1 or max(pool.kernel) > 8:
        return torch.nn.functional.max_pool2d(call.run(None), *pool)
    # Small maps would use only a part of a large tile.
    config, (tile_h, tile_w) = min(
        fitting,
        key=lambda ct: cdiv(pooled[0], ct[1][0]) * cdiv(pooled[1], ct[1][1]) * ct[0].block_m,
    )
    tiles_y, tiles_x = cdiv(pooled[0], tile_h), cdiv(pooled[1], tile_w)
    y = torch.empty(
        (s.n, s.k, *pooled), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    if y.numel() == 0:
        return y
    rows = (tile_h - 1) * pool.stride[0] + pool.kernel[0]
    sizes: dict[str, Any] = call.geometry()
    del sizes["group_c"], sizes["w_stride"], sizes["TAP_C"]
    affine: dict[str, Any] = call.epilogue()
    for name in ("residual_ptr", "residual_scale_ptr", "residual_shift_ptr"):
        del affine[name]
    with on_device(y):
        conv_bn_relu_maxpool_kernel[(s.n * tiles_y * tiles_x, cdiv(s.k, config.block_n))](
            x, call.weight, y, **sizes, **affine,
            OH=s.out_h, OW=s.out_w, PH=pooled[0], PW=pooled[1],
            pool_pad_h=pool.padding[0], pool_pad_w=pool.padding[1],
            tiles_y=tiles_y, tiles_x=tiles_x,
            POOL_H=pool.kernel[0], POOL_W=pool.kernel[1],
            STEP_H=pool.stride[0], STEP_W=pool.stride[1],
            TILE_H=tile_h, TILE_W=tile_w,
            BLOCK_MIDDLE=max(16, power_of_two(rows * tile_w)),
            BLOCK_OUT=max(16, power_of_two(tile_h * tile_w)),
            PRECISION=precision_of(x), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            BLOCK_K=config.block_k, num_warps=config.warps, num_stages=config.stages,
            maxnreg=REGISTERS,
        )  # fmt: skip
    return y


def conv_bn_relu_maxpool(
    x: Tensor,
    weight: Tensor,
    conv_bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    eps: float,
    pool_kernel: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
    activation: int = Activation.RELU,
    *,
    config: StemConfig | None = None,
) -> Tensor:
    r"""The stem: convolution, batch norm, an activation, here ReLU, and max-pool.

    .. math:: y = \mathrm{maxpool}(\max(0, \gamma (w * x + b - \mu) / \sqrt{\sigma^2 + \epsilon}
        + \beta))

    Args:
        x: Image, ``(N, C, H, W)``; float32, float16 or bfloat16; channels_last is not copied.
        weight: Filters :math:`w`, ``(K, C / groups, kh, kw)``, dtype of ``x``.
        conv_bias: Bias :math:`b`, ``(K,)``, any float; None means 0.
        bn_weight: Scale :math:`\gamma`, ``(K,)``, any float; None means 1.
        bn_bias: Shift :math:`\beta`, ``(K,)``, any float; None means 0.
        mean: Running mean :math:`\mu`, ``(K,)``, any float.
        var: Running variance :math:`\sigma^2`, ``(K,)``, any float.
        stride: Stride of the convolution, ``(height, width)``.
        padding: Zeros on each side of ``x``, ``(height, width)``.
        dilation: Distance between the filter's taps, ``(height, width)``.
        groups: Number of independent groups of channels; with more than one, the max-pool is a
            separate operation.
        eps: Added to the variance.
        pool_kernel: Window of the max-pool, ``(height, width)``.
        pool_stride: Stride of the max-pool, ``(height, width)``.
        pool_padding: Padding of the max-pool with minus infinity on each side,
            ``(height, width)``.
        activation: Activation in front of the pool.
        config: Forces a configuration; None chooses one.

    Returns:
        ``(N, K, PH, PW)``, dtype and memory format of ``x``.

    Raises:
        ValueError: Wrong rank, shape or device, or a kernel or window larger than its padded map.
        TypeError: Wrong dtype.
    """
    op = "conv_bn_relu_maxpool"
    check_map(op, "x", x)
    call = ConvCall(
        op,
        x,
        filters(op, weight, x),
        weight.shape,
        (stride, padding, dilation, groups),
        Affine(conv_bias, bn_weight, bn_bias, mean, var, eps),
        BATCH_NORM,
        activation=activation,
    )
    pool = _pool(op, call.shape, pool_kernel, pool_stride, pool_padding)
    return _run(call, pool, config).contiguous(memory_format=suggest_memory_format(x))


def conv_bn_relu_maxpool_packed(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pool_kernel: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
    activation: int = Activation.RELU,
    *,
    config: StemConfig | None = None,
) -> Tensor:
    """The stem with a packed weight and a folded batch norm.

    Args:
        x: Image, ``(N, C, H, W)``; float32, float16 or bfloat16; channels_last is not copied.
        packed: The filters as a vector, [k][kh][kw][c / groups], dtype of ``x``.
        scale: Scale of each output channel, ``(K,)``, any float.
        shift: Shift of each output channel, ``(K,)``, any float.
        weight_shape: Shape of the weight that was packed, ``(K, C / groups, kh, kw)``.
        stride: Stride of the convolution, ``(height, width)``.
        padding: Zeros on each side of ``x``, ``(height, width)``.
        dilation: Distance between the filter's taps, ``(height, width)``.
        groups: Number of independent groups of channels; with more than one, the max-pool is a
            separate operation.
        pool_kernel: Window of the max-pool, ``(height, width)``.
        pool_stride: Stride of the max-pool, ``(height, width)``.
        pool_padding: Padding of the max-pool with minus infinity on each side,
            ``(height, width)``.
        activation: Activation in front of the pool.
        config: Forces a configuration; None chooses one.

    Returns:
        ``(N, K, PH, PW)``, dtype of ``x``, channels_last.

    Raises:
        ValueError: Wrong rank, shape or device, or a kernel or window larger than its padded map.
        TypeError: Wrong dtype.
    """
    op = "conv_bn_relu_maxpool_packed"
    call = ConvCall(
        op,
        x,
        packed,
        weight_shape,
        (stride, padding, dilation, groups),
        Affine(weight=scale, bias=shift),
        FOLDED,
        activation=activation,
    )
    return _run(call, _pool(op, call.shape, pool_kernel, pool_stride, pool_padding), config)
