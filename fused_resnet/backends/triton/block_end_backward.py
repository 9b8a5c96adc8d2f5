r"""The gradient in front of a block's activation, and the sums for its batch norms' gradients.

    g = dy where y > 0,  sum g,  sum g (z - mean),  sum g (s - mean_s)

Memory-bound: dy, y, z and the shortcut's s are read and g is written, 3 to 5 elements moved for up
to 8 flops. Where the scales and shifts of the forward are given, y is not read: its sign is
computed again from z and the shortcut, by the forward's own formula.

The sums may cancel, so they are kept as pairs of float32 (Knuth's two-sum) and added in float64 in
a fixed order. Tiles are those of ``_bn_map.py``; designed for two programs on a multiprocessor,
with 128 registers a thread, because of the sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import Activation
from ._activation import gradient
from ._bn_map import BnConfig, BnMap, map_offsets
from ._channel_sums import channel_sums, two_sum
from ._common import channel_vector
from ._training_operands import (
    check_together,
    first_map,
    like_map,
    map_operand,
    nothing,
    vector_operand,
)


@triton.jit
def block_end_backward_kernel(  # type: ignore[no-untyped-def]
    dy_ptr, y_ptr, z_ptr, shortcut_ptr,
    g_ptr,
    mean_ptr, shortcut_mean_ptr,
    scale_ptr, shift_ptr,
    shortcut_scale_ptr, shortcut_shift_ptr,
    partial_ptr,
    R, C, P, slab_rows,
    SHORTCUT_SUM: tl.constexpr, ACTIVATION: tl.constexpr,
    LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """g = dy where y > 0, sum g, sum g (z - mean), sum g (s - mean_s), for a slab of rows.

    Args:
        dy_ptr: Gradient of the result y, (R, C).
        y_ptr: Result of the block, (R, C), or None: no mask, or one from ``scale_ptr``.
        z_ptr: Result of the last convolution, (R, C), or None.
        shortcut_ptr: Result of the shortcut's convolution, (R, C), or None.
        g_ptr: Receives g, (R, C); None without an activation.
        mean_ptr: Mean of z, (C,) float32.
        shortcut_mean_ptr: Mean of the shortcut, (C,) float32, or None.
        scale_ptr: Scale of the batch norm of z, (C,) float32, or None: the mask is that of
            ``y_ptr``.
        shift_ptr: Shift of that batch norm, (C,) float32, or None.
        shortcut_scale_ptr: Scale of the shortcut's batch norm, (C,) float32, or None.
        shortcut_shift_ptr: Shift of the shortcut's batch norm, (C,) float32, or None.
        partial_ptr: Receives the sums of each slab, (slabs, 2 or 3, C) float64; None for no sums.
        R: Pixels of the batch: the rows of the map.
        C: Channels of the map.
        P: Pixels of an image.
        slab_rows: Rows of a slab; the last slab may have fewer.
        SHORTCUT_SUM: Whether the third sum is wanted.
        ACTIVATION: Number of the activation.
        LAST: Whether a pixel's channels are neighbours in memory (NHWC), or its plane's pixels
            (NCHW).
        BLOCK_R: Rows of a tile.
        BLOCK_C: Channels of a tile.
    """
    slab = tl.program_id(1)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean = channel_vector(mean_ptr, c, c < C, 0.0)
    shortcut_mean = channel_vector(shortcut_mean_ptr, c, c < C, 0.0)
    scale = channel_vector(scale_ptr, c, c < C, 1.0)
    shift = channel_vector(shift_ptr, c, c < C, 0.0)
    shortcut_scale = channel_vector(shortcut_scale_ptr, c, c < C, 1.0)
    shortcut_shift = channel_vector(shortcut_shift_ptr, c, c < C, 0.0)
    begin = slab * slab_rows
    end = tl.minimum(begin + slab_rows, R)
    zero = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    sum_high, sum_low, dot_high, dot_low, side_high, side_low = zero, zero, zero, zero, zero, zero
    for r0 in range(begin, end, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        valid = (r < end)[:, None] & (c < C)[None, :]
        at = map_offsets(r, c, C, P, LAST)
        g = tl.load(dy_ptr + at, mask=valid, other=0.0).to(tl.float32)
        if z_ptr is not None:
            z = tl.load(z_ptr + at, mask=valid, other=0.0).to(tl.float32)
        if shortcut_ptr is not None:
            s = tl.load(shortcut_ptr + at, mask=valid, other=0.0).to(tl.float32)
        if y_ptr is not None:
            v = tl.load(y_ptr + at, mask=valid, other=0.0).to(tl.float32)
            g = gradient(g, v, ACTIVATION)
        elif scale_ptr is not None:
            v = z * scale[None, :] + shift[None, :]
            if shortcut_ptr is not None:
                if shortcut_scale_ptr is not None:
                    v += s * shortcut_scale[None, :] + shortcut_shift[None, :]
                else:
                    v += s
            g = gradient(g, v, ACTIVATION)
        if g_ptr is not None:
            tl.store(g_ptr + at, g.to(g_ptr.dtype.element_ty), mask=valid)
        if partial_ptr is not None:
            sum_high, sum_low = two_sum(sum_high, sum_low, g)
            zc = tl.where(valid, z - mean[None, :], 0.0)
            dot_high, dot_low = two_sum(dot_high, dot_low, g * zc)
            if SHORTCUT_SUM:
                sc = tl.where(valid, s - shortcut_mean[None, :], 0.0)
                side_high, side_low = two_sum(side_high, side_low, g * sc)
    if partial_ptr is not None:
        # High and low are widened before they are summed: in float32 low would be lost.
        J: tl.constexpr = 3 if SHORTCUT_SUM else 2
        to = partial_ptr + slab.to(tl.int64) * J * C + c
        sums = tl.sum(sum_high.to(tl.float64), 0) + tl.sum(sum_low.to(tl.float64), 0)
        dots = tl.sum(dot_high.to(tl.float64), 0) + tl.sum(dot_low.to(tl.float64), 0)
        tl.store(to, sums, mask=c < C)
        tl.store(to + C, dots, mask=c < C)
        if SHORTCUT_SUM:
            sides = tl.sum(side_high.to(tl.float64), 0) + tl.sum(side_low.to(tl.float64), 0)
            tl.store(to + 2 * C, sides, mask=c < C)


class Recomputed(NamedTuple):
    """The scales and shifts of :func:`.block_end`, from which the sign of its result is computed.

    Attributes:
        scale: Scale of the last batch norm, ``(K,)`` float32.
        shift: Shift of the last batch norm, ``(K,)`` float32.
        shortcut_scale: Scale of the shortcut's batch norm, ``(K,)`` float32; None for none.
        shortcut_shift: Shift of the shortcut's batch norm, ``(K,)`` float32; None for none.
    """

    scale: Tensor
    shift: Tensor
    shortcut_scale: Tensor | None = None
    shortcut_shift: Tensor | None = None


def block_end_backward(
    dy: Tensor,
    y: Tensor | None,
    z: Tensor,
    mean: Tensor,
    shortcut: Tensor | None,
    shortcut_mean: Tensor | None,
    sums: bool,
    activation: int = Activation.RELU,
    *,
    recomputed: Recomputed | None = None,
    config: BnConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""The gradient in front of a block's activation and its sums.

    :math:`g = dy \cdot [y > 0]`, :math:`\sum g`, :math:`\sum g (z - \mu)`,
    :math:`\sum g (s - \mu_s)`.

    Args:
        dy: Gradient of ``y``, shape and dtype of ``z``.
        y: The block's result; None where it has no activation, or with ``recomputed``.
        z: Result of the last convolution, ``(N, K, H, W)``; float32, float16 or bfloat16.
        mean: Mean of ``z`` in each channel, ``(K,)`` float32.
        shortcut: Result of the shortcut's convolution, shape of ``dy``; None for no such sum.
        shortcut_mean: Mean of ``shortcut`` in each channel, ``(K,)`` float32, there when
            ``shortcut`` is.
        sums: Whether the sums are wanted.
        activation: Activation of the forward; not used without ``y`` and ``recomputed``.
        recomputed: Given without ``y``: the mask is computed from ``z`` and ``shortcut``.
        config: The tile, one of :data:`._bn_map.CONFIGS`; None chooses one.

    Returns:
        :math:`g` (empty without a mask), channels_last, and the three sums, ``(K,)`` float32,
        empty when they are not wanted.

    Raises:
        ValueError: Wrong rank, shape or device, or a shortcut without its mean.
        TypeError: Wrong dtype.
    """
    op = "block_end_backward"
    zs = first_map(op, "z", z)
    channels = z.shape[1]
    check_together(op, shortcut=shortcut, shortcut_mean=shortcut_mean)
    call = BnMap(op, zs, config)
    if sums and shortcut is not None:
        # Half the rows: three pairs of sums would not fit into 128 registers.
        call = BnMap(op, zs, call.config._replace(block_r=call.config.block_r // 2))
    masked = y is not None or recomputed is not None
    g = like_map(z, z.shape) if masked else torch.empty(0, dtype=z.dtype, device=z.device)
    given: tuple[Tensor | None, ...] = recomputed or (None,) * len(Recomputed._fields)
    affine = [
        vector_operand(op, name, v, channels, z)
        for name, v in zip(Recomputed._fields, given, strict=True)
    ]
    partial = None
    if sums:
        count = 2 if shortcut is None else 3
        partial = call.floats(call.slabs, count, channels, dtype=torch.float64)
    operands = (
        map_operand(op, "dy", dy, z.shape, z),
        map_operand(op, "y", y, z.shape, z),
        zs if sums or recomputed else None,
        map_operand(op, "shortcut", shortcut, z.shape, z) if sums or recomputed else None,
        g if masked else None,
        vector_operand(op, "mean", mean, channels, z),
        vector_operand(op, "shortcut_mean", shortcut_mean, channels, z),
    )
    if masked or sums:
        call.launch(
            block_end_backward_kernel, *operands, *affine, partial,
            SHORTCUT_SUM=sums and shortcut is not None,
            ACTIVATION=int(activation) if masked else 0,
        )  # fmt: skip
    if partial is None:
        return g, nothing(z), nothing(z), nothing(z)
    found = channel_sums(partial)
    return g, found[0], found[1], found[2] if shortcut is not None else nothing(z)


def block_end_backward_recomputed(
    dy: Tensor,
    z: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    shortcut: Tensor | None,
    shortcut_mean: Tensor | None,
    shortcut_scale: Tensor | None,
    shortcut_shift: Tensor | None,
    sums: bool,
    activation: int = Activation.RELU,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r""":func:`block_end_backward` without the block's result, whose sign is computed again.

    Args:
        dy: Gradient of the block's result, shape and dtype of ``z``.
        z: Result of the last convolution, ``(N, K, H, W)``; float32, float16 or bfloat16.
        mean: Mean of ``z`` in each channel, ``(K,)`` float32.
        scale: Scale of the last batch norm in the forward, ``(K,)`` float32.
        shift: Shift of the last batch norm in the forward, ``(K,)`` float32.
        shortcut: Result of the shortcut's convolution, shape of ``dy``; None for no shortcut.
        shortcut_mean: Mean of ``shortcut`` in each channel, ``(K,)`` float32, there when
            ``shortcut`` is.
        shortcut_scale: Scale of the shortcut's batch norm in the forward, ``(K,)`` float32, there
            when ``shortcut`` is.
        shortcut_shift: Shift of the shortcut's batch norm in the forward, ``(K,)`` float32, there
            when ``shortcut`` is.
        sums: Whether the sums are wanted.
        activation: Activation of the forward.

    Returns:
        :math:`g`, channels_last, and the sums :math:`\sum g`, :math:`\sum g (z - \mu)` and
        :math:`\sum g (s - \mu_s)`, ``(K,)`` float32, empty when they are not wanted.

    Raises:
        ValueError: Wrong rank, shape or device, or a shortcut without its vectors.
        TypeError: Wrong dtype.
    """
    check_together(
        "block_end_backward_recomputed", shortcut=shortcut, shortcut_scale=shortcut_scale
    )
    recomputed = Recomputed(scale, shift, shortcut_scale, shortcut_shift)
    return block_end_backward(
        dy, None, z, mean, shortcut, shortcut_mean, sums, activation, recomputed=recomputed
    )
