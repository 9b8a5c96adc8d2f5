r"""The end of a stem: y = maxpool(relu(z * scale + shift)), and its gradient.

Memory-bound. Forward: z is read once, if neighbouring windows meet in the cache, and y and a byte
for each of its elements are written: the place of the first largest value in its window. Backward:
each element of z gathers from the windows that it lies in, so no two programs write to one element
and nothing is added atomically; z, dy and the bytes are read, g is written.

Tiles are those of ``_bn_map.py``, of pooled pixels in the forward and of z's in the backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import Activation
from ._activation import activate, gradient
from ._bn_map import BnConfig, BnMap
from ._channel_sums import channel_sums, two_sum
from ._common import REGISTERS, cdiv, channel_vector, check_same
from ._conv_shape import check_pair, window
from ._training_operands import first_map, like_map, map_operand, nothing, vector_operand

#: A place in a window is stored in a byte.
MOST_PLACES = 255


@triton.jit
def stem_end_kernel(  # type: ignore[no-untyped-def]
    z_ptr,
    y_ptr, index_ptr,
    scale_ptr, shift_ptr,
    H, W, PH, PW, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w,
    R, C, P, slab_rows,
    ACTIVATION: tl.constexpr,
    LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = maxpool(act(z * scale + shift)) and the places of the maxima, for a slab of its pixels.

    Args:
        z_ptr: Result of the stem's convolution, (N, H, W, C).
        y_ptr: Receives the result, (N, PH, PW, C).
        index_ptr: Receives the place of the first largest value in its window, (N, PH, PW, C)
            bytes.
        scale_ptr: Scale of the batch norm of z, (C,) float32.
        shift_ptr: Shift of the batch norm of z, (C,) float32.
        H: Height of z.
        W: Width of z.
        PH: Height of the pooled map.
        PW: Width of the pooled map.
        kernel_h: Height of the pool's window.
        kernel_w: Width of the pool's window.
        stride_h: Vertical stride of the pool.
        stride_w: Horizontal stride of the pool.
        pad_h: Rows of the pool's border above z.
        pad_w: Columns of the pool's border left of z.
        R: Pooled pixels of the batch: the rows of the result.
        C: Channels of the map.
        P: Pooled pixels of an image.
        slab_rows: Rows of a slab; the last slab may have fewer.
        ACTIVATION: Number of the activation in front of the pool.
        LAST: Not used: all maps are NHWC.
        BLOCK_R: Rows of a tile.
        BLOCK_C: Channels of a tile.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    scale = channel_vector(scale_ptr, c, c < C, 1.0)
    shift = channel_vector(shift_ptr, c, c < C, 0.0)
    begin = tl.program_id(1) * slab_rows
    end = tl.minimum(begin + slab_rows, R)
    for r0 in range(begin, end, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        image = r // P
        pixel = r - image * P
        py = pixel // PW
        top = py * stride_h - pad_h
        left = (pixel - py * PW) * stride_w - pad_w
        maps = z_ptr + (image.to(tl.int64) * H * W * C)[:, None] + c[None, :]
        best = tl.full((BLOCK_R, BLOCK_C), float("-inf"), tl.float32)
        place = tl.zeros((BLOCK_R, BLOCK_C), tl.int32)
        for dy in range(0, kernel_h):
            for dx in range(0, kernel_w):
                iy = top + dy
                ix = left + dx
                inside = (r < end) & (iy >= 0) & (iy < H) & (ix >= 0) & (ix < W)
                valid = inside[:, None] & (c < C)[None, :]
                v = tl.load(maps + ((iy * W + ix) * C)[:, None], mask=valid, other=0.0)
                v = activate(v.to(tl.float32) * scale[None, :] + shift[None, :], ACTIVATION)
                # Of rounded values: those that are equal then are ties, and the first wins.
                v = v.to(y_ptr.dtype.element_ty).to(tl.float32)
                larger = valid & ((v > best) | (v != v))
                best = tl.where(larger, v, best)
                place = tl.where(larger, dy * kernel_w + dx, place)
        at = r.to(tl.int64)[:, None] * C + c[None, :]
        valid = (r < end)[:, None] & (c < C)[None, :]
        tl.store(y_ptr + at, best.to(y_ptr.dtype.element_ty), mask=valid)
        tl.store(index_ptr + at, place.to(tl.uint8), mask=valid)


@triton.jit
def stem_end_backward_kernel(  # type: ignore[no-untyped-def]
    dy_ptr, index_ptr,
    z_ptr, g_ptr,
    scale_ptr, shift_ptr, mean_ptr,
    partial_ptr,
    W, PH, PW, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w,
    windows_h, windows_w,
    R, C, P, slab_rows,
    ACTIVATION: tl.constexpr,
    LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """g = act'(z * scale + shift) dy, gathered from the windows, and its sums, for a slab of z.

    Args:
        dy_ptr: Gradient of the result, (N, PH, PW, C).
        index_ptr: Place of the first largest value in its window, (N, PH, PW, C) bytes.
        z_ptr: Result of the stem's convolution, (N, H, W, C).
        g_ptr: Receives g, (N, H, W, C).
        scale_ptr: Scale of the batch norm of z, (C,) float32.
        shift_ptr: Shift of the batch norm of z, (C,) float32.
        mean_ptr: Mean of z, (C,) float32.
        partial_ptr: Receives sum g and sum g (z - mean) of each slab, (slabs, 2, C) float64; or
            None.
        W: Width of z.
        PH: Height of the pooled map.
        PW: Width of the pooled map.
        kernel_h: Height of the pool's window.
        kernel_w: Width of the pool's window.
        stride_h: Vertical stride of the pool.
        stride_w: Horizontal stride of the pool.
        pad_h: Rows of the pool's border above z.
        pad_w: Columns of the pool's border left of z.
        windows_h: Windows that an element lies in, at most, vertically.
        windows_w: Windows that an element lies in, at most, horizontally.
        R: Pixels of the batch: the rows of the map.
        C: Channels of the map.
        P: Pixels of an image.
        slab_rows: Rows of a slab; the last slab may have fewer.
        ACTIVATION: Number of the activation in front of the pool.
        LAST: Not used: all maps are NHWC.
        BLOCK_R: Rows of a tile.
        BLOCK_C: Channels of a tile.
    """
    slab = tl.program_id(1)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    scale = channel_vector(scale_ptr, c, c < C, 1.0)
    shift = channel_vector(shift_ptr, c, c < C, 0.0)
    mean = channel_vector(mean_ptr, c, c < C, 0.0)
    begin = slab * slab_rows
    end = tl.minimum(begin + slab_rows, R)
    zero = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    sum_high, sum_low, dot_high, dot_low = zero, zero, zero, zero
    for r0 in range(begin, end, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        valid = (r < end)[:, None] & (c < C)[None, :]
        image = r // P
        pixel = r - image * P
        row = pixel // W
        y0 = row + pad_h
        x0 = pixel - row * W + pad_w
        pooled = (image.to(tl.int64) * PH * PW * C)[:, None] + c[None, :]
        g = zero
        for i in range(0, windows_h):
            for j in range(0, windows_w):
                py = y0 // stride_h - i
                px = x0 // stride_w - j
                dy = y0 - py * stride_h
                dx = x0 - px * stride_w
                lies = (py >= 0) & (py < PH) & (dy < kernel_h)
                lies = lies & (px >= 0) & (px < PW) & (dx < kernel_w)
                inside = valid & lies[:, None]
                at = pooled + ((py * PW + px) * C)[:, None]
                place = tl.load(index_ptr + at, mask=inside, other=0).to(tl.int32)
                chosen = inside & (place == (dy * kernel_w + dx)[:, None])
                g += tl.load(dy_ptr + at, mask=chosen, other=0.0).to(tl.float32)
        at = r.to(tl.int64)[:, None] * C + c[None, :]
        z = tl.load(z_ptr + at, mask=valid, other=0.0).to(tl.float32)
        g = gradient(g, z * scale[None, :] + shift[None, :], ACTIVATION)
        rounded = g.to(g_ptr.dtype.element_ty)
        tl.store(g_ptr + at, rounded, mask=valid)
        if partial_ptr is not None:
            g = tl.where(valid, rounded.to(tl.float32), 0.0)
            zc = tl.where(valid, z - mean[None, :], 0.0)
            sum_high, sum_low = two_sum(sum_high, sum_low, g)
            dot_high, dot_low = two_sum(dot_high, dot_low, g * zc)
    if partial_ptr is not None:
        sums = tl.sum(sum_high.to(tl.float64), 0) + tl.sum(sum_low.to(tl.float64), 0)
        dots = tl.sum(dot_high.to(tl.float64), 0) + tl.sum(dot_low.to(tl.float64), 0)
        to = partial_ptr + slab.to(tl.int64) * 2 * C + c
        tl.store(to, sums, mask=c < C)
        tl.store(to + C, dots, mask=c < C)


def _pool(
    op: str, z: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], list[int]]:
    """Kernel, stride and padding, checked, and the shape of the pooled map."""
    kernels = check_pair(op, "kernel", kernel, 1)
    strides = check_pair(op, "stride", stride, 1)
    paddings = check_pair(op, "padding", padding, 0)
    if kernels[0] * kernels[1] > MOST_PLACES:
        raise ValueError(f"{op}: kernel: expected at most {MOST_PLACES} places, got {list(kernel)}")
    if any(2 * p > k for p, k in zip(paddings, kernels, strict=True)):
        raise ValueError(
            f"{op}: padding: expected at most half of kernel {list(kernel)}, got {list(padding)}"
        )
    sizes = [
        window(n, k, by, pad)
        for n, k, by, pad in zip(z.shape[2:], kernels, strides, paddings, strict=True)
    ]
    if min(sizes) < 1:
        raise ValueError(
            f"{op}: kernel: expected at most the padded map of {list(z.shape)}, got {list(kernel)}"
        )
    return kernels, strides, paddings, [*z.shape[:2], *sizes]


def stem_end(
    z: Tensor,
    scale: Tensor,
    shift: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    activation: int = Activation.RELU,
    *,
    config: BnConfig | None = None,
) -> tuple[Tensor, Tensor]:
    r""":math:`y = \mathrm{maxpool}(\max(0,\; z \cdot \mathrm{scale} + \mathrm{shift}))`.

    Args:
        z: Result of the stem's convolution, ``(N, K, H, W)``; float32, float16 or bfloat16;
            channels_last is not copied.
        scale: Scale of the batch norm after it, ``(K,)`` float32.
        shift: Shift of the batch norm after it, ``(K,)`` float32.
        kernel: Window of the pool, ``(height, width)``, at most 255 places.
        stride: Step of the pool, ``(height, width)``.
        padding: Border of the pool, ``(height, width)``.
        activation: Activation in front of the pool; the formula has ReLU.
        config: The tile, one of :data:`._bn_map.CONFIGS`; None chooses one.

    Returns:
        :math:`y`, ``(N, K, PH, PW)`` channels_last, and as ``uint8`` the place of the first largest
        value in its window, row by row.

    Raises:
        ValueError: Wrong rank, shape or device, or a window larger than the padded map.
        TypeError: Wrong dtype.
    """
    op = "stem_end"
    zs = first_map(op, "z", z)
    kernels, strides, paddings, shape = _pool(op, z, kernel, stride, padding)
    y, index = like_map(z, shape), like_map(z, shape, torch.uint8)
    BnMap(op, y, config).launch(
        stem_end_kernel, zs, y, index,
        vector_operand(op, "scale", scale, z.shape[1], z),
        vector_operand(op, "shift", shift, z.shape[1], z),
        *z.shape[2:], *shape[2:], *kernels, *strides, *paddings, ACTIVATION=int(activation),
    )  # fmt: skip
    return y, index


def stem_end_backward(
    dy: Tensor,
    index: Tensor,
    z: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    sums: bool,
    activation: int = Activation.RELU,
    *,
    config: BnConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The gradient of :func:`stem_end` after its batch norm, and that batch norm's sums.

    Args:
        dy: Gradient of the result, ``(N, K, PH, PW)``, dtype of ``z``.
        index: ``uint8``, shape of ``dy``, from :func:`stem_end`.
        z: Result of the stem's convolution, ``(N, K, H, W)``; float32, float16 or bfloat16.
        scale: Scale of the batch norm after it, ``(K,)`` float32.
        shift: Shift of the batch norm after it, ``(K,)`` float32.
        mean: Mean of ``z`` in each channel, ``(K,)`` float32.
        kernel: Window of the pool, ``(height, width)``.
        stride: Step of the pool, ``(height, width)``.
        padding: Border of the pool, ``(height, width)``.
        sums: Whether the sums are wanted.
        activation: Activation in front of the pool; the formula has ReLU.
        config: The tile, one of :data:`._bn_map.CONFIGS`; None chooses one.

    Returns:
        :math:`g`, shape of ``z``, channels_last; :math:`\sum g` and :math:`\sum g (z - \mu)`,
        ``(K,)`` float32, empty when they are not wanted.

    Raises:
        ValueError: Wrong rank, shape or device.
        TypeError: Wrong dtype.
    """
    op = "stem_end_backward"
    zs = first_map(op, "z", z)
    kernels, strides, paddings, shape = _pool(op, z, kernel, stride, padding)
    if index.dtype is not torch.uint8:
        raise TypeError(f"{op}: index: expected dtype uint8, got {index.dtype}")
    check_same(op, "index", index, shape, index.new_empty(0))
    call = BnMap(op, zs, config)
    g = like_map(z, z.shape)
    partial = call.floats(call.slabs, 2, z.shape[1], dtype=torch.float64) if sums else None
    vectors = (("scale", scale), ("shift", shift), ("mean", mean))
    call.launch(
        stem_end_backward_kernel,
        map_operand(op, "dy", dy, shape, z), index.contiguous(memory_format=torch.channels_last),
        zs, g, *(vector_operand(op, name, v, z.shape[1], z) for name, v in vectors), partial,
        z.shape[3], *shape[2:], *kernels, *strides, *paddings,
        *(cdiv(k, by) for k, by in zip(kernels, strides, strict=True)), ACTIVATION=int(activation),
        registers=REGISTERS,  # at two programs of a multiprocessor ptxas spills
    )  # fmt: skip
    if partial is None:
        return g, nothing(z), nothing(z)
    sum_g, sum_g_xc = channel_sums(partial)
    return g, sum_g, sum_g_xc
