r"""The stem's image in patches: loaded by 16 bytes, a tile ahead, and gathered on chip.

The pixels of x under a tile of the convolution are a rectangle, whose rows are runs of memory. A
program loads it once, from a multiple of 8 elements on, by 16 bytes a thread and with zeros outside
of the image. :func:`multiply_patch` then takes each element of the matrix a from that patch: term k
= (ky, kx, c) of a pixel lies ky rows and kx C + c elements from the first of its window. Nothing is
asked of an element but whether k is within the depth.

Triton's ``tl.gather`` stores its source in shared memory, each time, and reads it from there.
Between tiles the patch is in registers, 8 of a thread in 16 bits, so that the next tile's loads are
in flight while this one's is multiplied and pooled.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._implicit_gemm import multiply


@triton.jit
def load_patch(  # type: ignore[no-untyped-def]
    x_ptr, image, y, x, valid, H, image_size, ROW,
    PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """PATCH_H rows of PATCH_W elements of an image, (PATCH_H PATCH_W,); zeros outside of it.

    Args:
        x_ptr: Input, (N, H, W, C).
        image: Number of the image.
        y: The patch's first row, which may be negative.
        x: Column of the first pixel, which may be negative; the patch begins up to 7 elements
            before it, see :func:`skew`.
        valid: Whether there is such a patch.
        H: Height of the input.
        image_size: Elements of an image.
        ROW: Elements of a row of an image.
        PATCH_H: Rows of the patch.
        PATCH_W: Elements of a row of the patch.
        C: Channels of the input.
    """
    rows = y + tl.arange(0, PATCH_H)
    columns = (x * C >> 3) * 8 + tl.arange(0, PATCH_W)
    inside = ((rows >= 0) & (rows < H) & valid)[:, None] & ((columns >= 0) & (columns < ROW))[None]
    at = image.to(tl.int64) * image_size + (rows * ROW)[:, None] + columns[None, :]
    return tl.reshape(tl.load(x_ptr + at, mask=inside, other=0.0), (PATCH_H * PATCH_W,))


@triton.jit
def skew(x, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """Elements from a patch's beginning to its first pixel.

    Args:
        x: Column of the first pixel, which may be negative.
        C: Channels of the input.
    """
    return x * C - (x * C >> 3) * 8


@triton.jit
def multiply_patch(  # type: ignore[no-untyped-def]
    acc, patch, w_ptr, window, n, filter_valid, w_stride,
    KH: tl.constexpr, KW: tl.constexpr, C: tl.constexpr, PATCH_W: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc[m][n] + sum_k patch[window[m] + place of k] w[n][k].

    Args:
        acc: Sums so far, (BLOCK_M, BLOCK_N) float32.
        patch: Elements of the image, rows of PATCH_W of them.
        w_ptr: Filters, (K, w_stride): KH KW C terms, and zeros to the end of the last block.
        window: Place in the patch of the first element of each pixel's window, (BLOCK_M,).
        n: Filters of the tile.
        filter_valid: Which of the filters exist.
        w_stride: Elements from one filter to the next.
        KH: Height of the filters.
        KW: Width of the filters.
        C: Channels of the input.
        PATCH_W: Elements of a row of the patch.
        PRECISION: Of the products: ``"half"``, ``"tf32"`` or ``"ieee"``.
        BLOCK_M: Pixels of a tile.
        BLOCK_N: Filters of a tile.
        BLOCK_K: Terms of a step.
    """
    columns = w_ptr + (n.to(tl.int64) * w_stride)[None, :]
    for k0 in range(0, KH * KW * C, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        k_valid = k < KH * KW * C
        place = k + k // (KW * C) * (PATCH_W - KW * C)
        at = tl.where(k_valid[None, :], window[:, None] + place[None, :], 0)
        a = tl.gather(patch, tl.reshape(at, (BLOCK_M * BLOCK_K,)), 0)
        # Behind the depth is a zero, whatever the patch has: no product with an infinity.
        a = tl.where(k_valid[None, :], tl.reshape(a, (BLOCK_M, BLOCK_K)), 0.0).to(patch.dtype)
        b = tl.load(columns + k[:, None], mask=filter_valid[None, :], other=0.0)
        acc = multiply(acc, a, b, PRECISION)
    return acc
