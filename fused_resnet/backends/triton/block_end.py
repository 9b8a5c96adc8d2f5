r"""The end of a residual block: y = relu(z * scale + shift + the shortcut [* scale + shift]).

Memory-bound: z and the shortcut are read and y is written, 3 elements moved for up to 6 flops;
2 without a shortcut, where it is also how a normalised map is made that a convolution of PyTorch's
reads. Tiles are those of ``_bn_map.py``; designed for four programs on a multiprocessor, with 64
registers a thread.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._activation import activate
from ._bn_map import BnConfig, BnMap, map_offsets
from ._common import channel_vector
from ._training_operands import check_together, first_map, like_map, map_operand, vector_operand


@triton.jit
def block_end_kernel(  # type: ignore[no-untyped-def]
    z_ptr, shortcut_ptr, y_ptr,
    scale_ptr, shift_ptr,
    shortcut_scale_ptr, shortcut_shift_ptr,
    R, C, P, slab_rows,
    ACTIVATION: tl.constexpr, LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = act(z * scale + shift + s), s the shortcut or its batch norm, for a slab of rows.

    Forwards: a slab's beginning is the oldest of what z's kernel left in the L2.

    Args:
        z_ptr: Result of the last convolution, (R, C).
        shortcut_ptr: Result of the shortcut, (R, C), or None for 0.
        y_ptr: Receives the result, (R, C).
        scale_ptr: Scale of the batch norm of z, (C,) float32.
        shift_ptr: Shift of the batch norm of z, (C,) float32.
        shortcut_scale_ptr: Scale of the shortcut's batch norm, (C,) float32, or None.
        shortcut_shift_ptr: Shift of the shortcut's batch norm, (C,) float32, or None.
        R: Pixels of the batch: the rows of the map.
        C: Channels of the map.
        P: Pixels of an image.
        slab_rows: Rows of a slab; the last slab may have fewer.
        ACTIVATION: Number of the activation.
        LAST: Whether a pixel's channels are neighbours in memory (NHWC), or its plane's pixels
            (NCHW).
        BLOCK_R: Rows of a tile.
        BLOCK_C: Channels of a tile.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    scale = channel_vector(scale_ptr, c, c < C, 1.0)
    shift = channel_vector(shift_ptr, c, c < C, 0.0)
    shortcut_scale = channel_vector(shortcut_scale_ptr, c, c < C, 1.0)
    shortcut_shift = channel_vector(shortcut_shift_ptr, c, c < C, 0.0)
    begin = tl.program_id(1) * slab_rows
    end = tl.minimum(begin + slab_rows, R)
    for r0 in range(begin, end, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        valid = (r < end)[:, None] & (c < C)[None, :]
        at = map_offsets(r, c, C, P, LAST)
        v = tl.load(z_ptr + at, mask=valid, other=0.0).to(tl.float32)
        v = v * scale[None, :] + shift[None, :]
        if shortcut_ptr is not None:
            s = tl.load(shortcut_ptr + at, mask=valid, other=0.0).to(tl.float32)
            if shortcut_scale_ptr is not None:
                s = s * shortcut_scale[None, :] + shortcut_shift[None, :]
            v += s
        tl.store(y_ptr + at, activate(v, ACTIVATION).to(y_ptr.dtype.element_ty), mask=valid)


def block_end(
    z: Tensor,
    scale: Tensor,
    shift: Tensor,
    shortcut: Tensor | None,
    shortcut_scale: Tensor | None,
    shortcut_shift: Tensor | None,
    activation: int,
    *,
    config: BnConfig | None = None,
) -> Tensor:
    r""":math:`y = \max(0,\; z \cdot \mathrm{scale} + \mathrm{shift} + s)`.

    Args:
        z: Result of the last convolution, ``(N, K, H, W)``; float32, float16 or bfloat16;
            channels_last is not copied.
        scale: Scale of the batch norm after it, ``(K,)`` float32.
        shift: Shift of the batch norm after it, ``(K,)`` float32.
        shortcut: Result of the shortcut, shape and dtype of ``z``; None means :math:`s = 0`.
        shortcut_scale: Scale of the batch norm of a projection, ``(K,)`` float32: then :math:`s` is
            the shortcut times this plus its shift; None means the shortcut as it is.
        shortcut_shift: Shift of that batch norm, ``(K,)`` float32, there when ``shortcut_scale``
            is.
        activation: Activation that is applied to the sum; the formula has ReLU, and none leaves the
            maximum out.
        config: The tile, one of :data:`._bn_map.CONFIGS`; None chooses one.

    Returns:
        :math:`y`, shape and dtype of ``z``, channels_last.

    Raises:
        ValueError: Wrong rank, shape or device, or half of an affine step.
        TypeError: Wrong dtype.
    """
    op = "block_end"
    zs = first_map(op, "z", z)
    channels = z.shape[1]
    check_together(op, shortcut_scale=shortcut_scale, shortcut_shift=shortcut_shift)
    if shortcut is None and shortcut_scale is not None:
        raise ValueError(f"{op}: shortcut: expected a tensor with shortcut_scale, got None")
    call = BnMap(op, zs, config)
    y = like_map(z, z.shape)
    call.launch(
        block_end_kernel,
        zs,
        map_operand(op, "shortcut", shortcut, z.shape, z),
        y,
        vector_operand(op, "scale", scale, channels, z),
        vector_operand(op, "shift", shift, channels, z),
        vector_operand(op, "shortcut_scale", shortcut_scale, channels, z),
        vector_operand(op, "shortcut_shift", shortcut_shift, channels, z),
        ACTIVATION=int(activation),
    )
    return y
