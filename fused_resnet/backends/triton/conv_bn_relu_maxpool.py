r"""The stem: y = max_pool(relu(conv(x, w) * scale + shift)), without storing the convolution.

ResNet's: 3 channels of 224 x 224, 64 filters of 7 x 7, stride 2; then 3 x 3 pooling, stride 2. An
image in 16 bits: 0.30 MB of x are read and 0.40 MB of y written, where the convolution's result
would be 1.6 MB written and read again; 236 Mflop.

A tile of pooled pixels for 64 filters is 8 x 3 of them for ResNet's, which need 17 x 7 pixels of
the convolution, 119 of the 128 rows of its GEMM; those between neighbouring tiles are computed
twice (17 x 7 / (16 x 6), 24% more). The depth is traversed as one axis (ky, kx, c), since blocks of
3 channels cannot be loaded as tiles.

Where rows of x are whole chunks of 16 elements, as ResNet's are, a program takes one tile after
another, and loads the rectangle of x under the next one by 16 bytes while it multiplies and pools
(see ``_stem_patch.py``). The filters are padded with zeros to whole steps, so that they are copied
by 16 bytes asynchronously. Elsewhere x is gathered from memory element by element, by
``_implicit_gemm.py``; a loop over tiles around that would need all registers of a thread.

The rounded results are pooled along rows and then along columns, in kernel_w and kernel_h steps of
``tl.gather`` through shared memory: 6 instead of the 9 of a direct 3 x 3 window. Pixels outside of
the convolution's map are minus infinity, and NaN is propagated.

A thread needs up to 255 registers, so a multiprocessor holds one program of 8 warps; 16 to 24 KiB
of shared memory in half precision, for the tiles that are gathered from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..activation import Activation
from ._common import REGISTERS, cdiv, check_map, multiprocessors, on_device, power_of_two
from ._conv_call import BATCH_NORM, FOLDED, Affine, ConvCall, filters
from ._conv_plan import precision_of
from ._conv_shape import ConvShape, check_pair, window
from ._device import device_of
from ._stem_kernels import conv_bn_relu_maxpool_kernel


class StemConfig(NamedTuple):
    """A tile of the stem.

    Attributes:
        block_m: Pixels of the convolution.
        block_n: Filters.
        block_k: Depth of a step.
        warps: Warps of the program.
        stages: Stages of its pipeline.
        spills: Architectures where ptxas has too few registers for it.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    spills: tuple[int, ...] = ()


#: By the precision of products. The second of each is for maps with too few of the first.
CONFIGS: dict[str, list[StemConfig]] = {
    "half": [StemConfig(128, 64, 32, 8, 2), StemConfig(64, 64, 32, 8, 2)],
    "tf32": [StemConfig(128, 64, 32, 8, 2, (86, 89, 120)), StemConfig(64, 64, 32, 8, 2)],
    "ieee": [StemConfig(64, 32, 16, 4, 2)],
}

#: Elements of the largest patch, of which a thread of 8 warps holds 16: 8 or 16 registers.
PATCH = 4096


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


def patch_of(s: ConvShape, pool: Pool, tile: tuple[int, int]) -> tuple[int, int]:
    """The patch of the image under a tile: rows, and elements of each; (0, 0) if it is too large.

    Args:
        s: Sizes of the convolution.
        pool: The max-pool.
        tile: Rows and columns of pooled pixels.
    """
    if s.dilation != (1, 1):
        return 0, 0
    rows, columns = (
        ((n - 1) * step + size - 1) * stride + taps
        for n, step, size, stride, taps in zip(
            tile, pool.stride, pool.kernel, s.stride, (s.kh, s.kw), strict=True
        )
    )
    # A patch begins at a multiple of 8 elements, up to 7 before its first pixel.
    patch = power_of_two(rows), power_of_two(columns * s.c + 7)
    return patch if patch[0] * patch[1] <= PATCH else (0, 0)


def _run(call: ConvCall, pool: Pool, config: StemConfig | None) -> Tensor:
    """The stem in one kernel where a tile fits, else the convolution and PyTorch's max-pool."""
    s, x = call.shape, call.x
    pooled = pool.size(s)
    arch = device_of(x).arch
    all_of_them = CONFIGS[precision_of(x)]
    candidates = [config] if config else [c for c in all_of_them if arch not in c.spills]
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
    # Rows of whole chunks, at an address that is one: else elements would be loaded one by one, and
    # a thread that holds addresses for each of a tile ahead has no registers left.
    chunks = s.w * s.c % 16 == 0 and x.data_ptr() % 16 == 0
    patch = patch_of(s, pool, (tile_h, tile_w)) if chunks else (0, 0)
    sizes: dict[str, Any] = call.geometry()
    del sizes["group_c"], sizes["TAP_C"]
    weight, count = call.weight, s.n * tiles_y * tiles_x
    programs = count
    if patch[0]:
        # Whole blocks of terms, whose rows begin at multiples of 16 bytes.
        depth = cdiv(s.depth, config.block_k) * config.block_k
        weight = torch.nn.functional.pad(weight, (0, depth - s.depth))
        sizes["w_stride"] = depth
        programs = min(count, multiprocessors(x))
    affine: dict[str, Any] = call.epilogue()
    for name in ("residual_ptr", "residual_scale_ptr", "residual_shift_ptr"):
        del affine[name]
    with on_device(y):
        conv_bn_relu_maxpool_kernel[(programs, cdiv(s.k, config.block_n))](
            x, weight, y, **sizes, **affine,
            OH=s.out_h, OW=s.out_w, PH=pooled[0], PW=pooled[1],
            pool_pad_h=pool.padding[0], pool_pad_w=pool.padding[1],
            tiles=count, tiles_y=tiles_y, tiles_x=tiles_x,
            image_size=s.h * s.w * s.c, row_size=s.w * s.c,
            POOL_H=pool.kernel[0], POOL_W=pool.kernel[1],
            STEP_H=pool.stride[0], STEP_W=pool.stride[1],
            TILE_H=tile_h, TILE_W=tile_w, PATCH_H=patch[0], PATCH_W=patch[1],
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
