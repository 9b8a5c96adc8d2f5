"""The stem's kernel: a convolution, batch norm, activation and max-pool, tile by tile."""

from __future__ import annotations

import triton
import triton.language as tl

from ._activation import activate
from ._common import channel_affine
from ._implicit_gemm import accumulate
from ._stem_patch import load_patch, multiply_patch, skew


@triton.jit
def _larger(best, v):  # type: ignore[no-untyped-def]
    """The larger, or NaN if there is one.

    Args:
        best: Largest values so far.
        v: Values to compare with.
    """
    return tl.maximum(best, v, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _place(  # type: ignore[no-untyped-def]
    tile, tiles_y, tiles_x, TILE_H: tl.constexpr, TILE_W: tl.constexpr
):
    """Image of a tile, and its first row and column of pooled pixels.

    Args:
        tile: Number of the tile.
        tiles_y: Rows of tiles in an image.
        tiles_x: Columns of tiles in an image.
        TILE_H: Rows of pooled pixels of a tile.
        TILE_W: Columns of pooled pixels of a tile.
    """
    image = tile // (tiles_y * tiles_x)
    within = tile - image * (tiles_y * tiles_x)
    return image, within // tiles_x * TILE_H, within % tiles_x * TILE_W


@triton.jit
def _pool_tile(  # type: ignore[no-untyped-def]
    acc, y_ptr, scale, shift,
    image, py0, px0, in_map, n, K, PH, PW,
    POOL_H: tl.constexpr, POOL_W: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    BLOCK_MIDDLE: tl.constexpr, BLOCK_OUT: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Batch norm, activation and max-pool of a tile's sums, and its store.

    Args:
        acc: Sums of the convolution, (BLOCK_M, BLOCK_N) float32.
        y_ptr: Receives the result, (N, PH, PW, K).
        scale: Scale of the batch norm, (BLOCK_N,) float32.
        shift: Shift of the batch norm, (BLOCK_N,) float32.
        image: Number of the image.
        py0: First row of pooled pixels.
        px0: First column of pooled pixels.
        in_map: Which of the sums are pixels of the convolution's result, (BLOCK_M,).
        n: Filters of the tile.
        K: Number of filters.
        PH: Height of the pooled result.
        PW: Width of the pooled result.
        POOL_H: Height of the pool's window.
        POOL_W: Width of the pool's window.
        STEP_H: Vertical stride of the pool.
        STEP_W: Horizontal stride of the pool.
        TILE_H: Rows of pooled pixels of a tile.
        TILE_W: Columns of pooled pixels of a tile.
        BLOCK_MIDDLE: Pixels of the tile once pooled along rows, as a power of two.
        BLOCK_OUT: Pixels of the tile once pooled, as a power of two.
        ACTIVATION: Number of the activation in front of the pool.
        BLOCK_N: Filters of a tile.
    """
    ROWS: tl.constexpr = (TILE_H - 1) * STEP_H + POOL_H
    COLS: tl.constexpr = (TILE_W - 1) * STEP_W + POOL_W
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


@triton.jit
def conv_bn_relu_maxpool_kernel(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, y_ptr,
    conv_bias_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr,
    K, H, W, OH, OW, PH, PW,
    stride_h, stride_w, pad_h, pad_w, dil_h, dil_w,
    pool_pad_h, pool_pad_w, tiles, tiles_y, tiles_x, w_stride, image_size, row_size, eps,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    POOL_H: tl.constexpr, POOL_W: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    PATCH_H: tl.constexpr, PATCH_W: tl.constexpr,
    BLOCK_MIDDLE: tl.constexpr, BLOCK_OUT: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = max_pool(act(bn(conv(x, w)))), by tiles of pooled pixels and blocks of filters.

    With a patch, a program computes one tile after another, and loads the next one's patch before
    it computes; without, it computes one tile.

    Args:
        x_ptr: Input, (N, H, W, C).
        w_ptr: Filters, (K, w_stride), of which KH KW C are used; zeros behind them, to whole
            blocks, with a patch.
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
        tiles: Tiles of all images.
        tiles_y: Rows of tiles in an image.
        tiles_x: Columns of tiles in an image.
        w_stride: Elements from one filter to the next.
        image_size: Elements of an image.
        row_size: Elements of a row of an image.
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
        PATCH_H: Rows of the patch of x under a tile, as a power of two; 0 to gather from x itself.
        PATCH_W: Elements of a row of the patch, as a power of two.
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
    i = tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(0)
    image, py0, px0 = _place(first, tiles_y, tiles_x, TILE_H, TILE_W)
    if PATCH_H == 0:
        oy = py0 * STEP_H - pool_pad_h + i // COLS
        ox = px0 * STEP_W - pool_pad_w + i % COLS
        in_map = (i < ROWS * COLS) & (oy >= 0) & (oy < OH) & (ox >= 0) & (ox < OW)
        acc = accumulate(
            tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
            x_ptr, w_ptr, None, None, tl.zeros((BLOCK_M,), tl.int32) + image, oy, ox, in_map,
            0, tl.program_id(1) * BLOCK_N, n < K, 0, 0, tl.cdiv(KH * KW * C, BLOCK_K),
            H, W, C, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, C, w_stride, KH, KW, C,
            0, "flat", False, PRECISION, False, False, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        scale, shift = channel_affine(
            n, n < K, conv_bias_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, eps
        )
        _pool_tile(
            acc, y_ptr, scale, shift,
            image, py0, px0, in_map, n, K, PH, PW, POOL_H, POOL_W, STEP_H, STEP_W,
            TILE_H, TILE_W, BLOCK_MIDDLE, BLOCK_OUT, ACTIVATION, BLOCK_N,
        )  # fmt: skip
    else:
        scale, shift = channel_affine(
            n, n < K, conv_bias_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, eps
        )
        window = i // COLS * stride_h * PATCH_W + i % COLS * stride_w * C
        window = tl.where(i < ROWS * COLS, window, 0)
        y = (py0 * STEP_H - pool_pad_h) * stride_h - pad_h
        x = (px0 * STEP_W - pool_pad_w) * stride_w - pad_w
        following = load_patch(
            x_ptr, image, y, x, first < tiles, H, image_size, row_size, PATCH_H, PATCH_W, C
        )
        for tile in range(first, tiles, tl.num_programs(0)):
            patch = following
            image, py0, px0 = _place(tile + tl.num_programs(0), tiles_y, tiles_x, TILE_H, TILE_W)
            y = (py0 * STEP_H - pool_pad_h) * stride_h - pad_h
            x = (px0 * STEP_W - pool_pad_w) * stride_w - pad_w
            following = load_patch(
                x_ptr, image, y, x, tile + tl.num_programs(0) < tiles, H, image_size, row_size,
                PATCH_H, PATCH_W, C,
            )  # fmt: skip
            image, py0, px0 = _place(tile, tiles_y, tiles_x, TILE_H, TILE_W)
            oy = py0 * STEP_H - pool_pad_h + i // COLS
            ox = px0 * STEP_W - pool_pad_w + i % COLS
            in_map = (i < ROWS * COLS) & (oy >= 0) & (oy < OH) & (ox >= 0) & (ox < OW)
            acc = multiply_patch(
                tl.zeros((BLOCK_M, BLOCK_N), tl.float32), patch, w_ptr,
                window + skew((px0 * STEP_W - pool_pad_w) * stride_w - pad_w, C), n, n < K,
                w_stride, KH, KW, C, PATCH_W, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            _pool_tile(
                acc, y_ptr, scale, shift,
                image, py0, px0, in_map, n, K, PH, PW, POOL_H, POOL_W, STEP_H, STEP_W,
                TILE_H, TILE_W, BLOCK_MIDDLE, BLOCK_OUT, ACTIVATION, BLOCK_N,
            )  # fmt: skip
