r"""A frozen residual block; the end of a bottleneck in one kernel.

The 3x3's result is kept on chip:

    h[m][j] = relu(scale1[j] sum_k a[m][k] w1[j][k] + shift1[j])        j < 64 or 128
    y[m][n] = relu(scale2[n] sum_j h[m][j] w2[n][j] + shift2[n] + r[m][n])

A program makes h for its pixels with all middle channels at once, as one tile of an ordinary
convolution; rounds it to the storage type, as if it went to memory; and multiplies it by w2, 64
output channels at a time. h is an operand of that product straight from registers on sm_80 and
sm_90, and passes through shared memory where the tensor core reads it there.

Bytes: x, r and y once each; h never, which between separate kernels is written and read: in
ResNet's stage 1 a fifth of the bytes of both. Flops as separate: 2 m (j k + n j). w2 (32 or 128
KiB) stays in the L2 cache. More middle channels would leave no registers for the second product,
and those stages are not bound by memory: they are chains of convolutions, as basic blocks are. A
shortcut is the same sum as the block's last convolution where it comes joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._common import REGISTERS, cdiv, channel_affine, check_same, on_device, relu, vector
from ._conv_plan import ConvConfig as Tile
from ._conv_plan import mode_of, precision_of, steps_of
from ._implicit_gemm import accumulate, finish
from .conv_bn_add_relu import (
    FOLDED,
    Affine,
    ConvCall,
    conv_bn_add_relu_packed,
    conv_conv_add_relu_packed,
)


class BlockConfig(NamedTuple):
    """Pixels, middle channels, depth of a step, output channels at a time; warps and stages."""

    block_m: int
    middle: int
    block_k: int
    block_n: int
    warps: int
    stages: int


#: By middle channels.
CONFIGS: dict[int, BlockConfig] = {
    64: BlockConfig(128, 64, 64, 64, 8, 3),
    128: BlockConfig(128, 128, 64, 64, 8, 3),
}


@triton.jit
def residual_block_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # (N, H, W, C)
    w1_ptr,  # (MIDDLE, KH KW C)
    scale1_ptr, shift1_ptr,  # (MIDDLE,) any float
    w2_ptr,  # (K, MIDDLE)
    scale2_ptr, shift2_ptr,  # (K,) any float
    residual_ptr, y_ptr,  # (M, K)
    M, K, H, W, C, OH, OW, KH, KW,
    stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, group_c, w_stride, steps,
    MODE: tl.constexpr, EVEN_C: tl.constexpr, MIDDLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """All channels of a tile of pixels."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.arange(0, MIDDLE)
    image = m // (OH * OW)
    pixel = m - image * (OH * OW)
    oy = pixel // OW
    ox = pixel - oy * OW
    acc = accumulate(
        tl.zeros((BLOCK_M, MIDDLE), tl.float32),
        x_ptr, w1_ptr, None, None, image, oy, ox, m < M, 0, 0, j < MIDDLE, 0, 0, steps,
        H, W, C, KH, KW, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, group_c, w_stride,
        MODE, EVEN_C, "half", False, False, BLOCK_M, MIDDLE, BLOCK_K,
    )  # fmt: skip
    scale, shift = channel_affine(j, j < MIDDLE, None, scale1_ptr, shift1_ptr, None, None, 0.0)
    h = relu(acc * scale[None, :] + shift[None, :]).to(y_ptr.dtype.element_ty)
    for n0 in range(0, K, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        w2 = tl.load(
            w2_ptr + n.to(tl.int64)[None, :] * MIDDLE + j[:, None], mask=(n < K)[None, :], other=0.0
        )
        finish(
            tl.dot(h, w2), y_ptr, residual_ptr, None, scale2_ptr, shift2_ptr, None, None,
            None, None, m, n, m < M, n < K, K, 0.0, True,
        )  # fmt: skip


class BlockConv(NamedTuple):
    """A packed convolution of the block, with the affine step behind it."""

    packed: Tensor
    scale: Tensor
    shift: Tensor
    weight_shape: tuple[int, int, int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def run(self, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        """The convolution by itself."""
        return conv_bn_add_relu_packed(
            x, self.packed, self.scale, self.shift, residual, *self[3:], relu
        )


def _take_apart(
    x: Tensor,
    packed: Sequence[Tensor],
    scale: Sequence[Tensor],
    shift: Sequence[Tensor],
    bottleneck: bool,
    stride: int,
    dilation: int,
    groups: int,
) -> list[BlockConv]:
    """The block's convolutions, then the shortcut's if there is one; see csrc/residual_block.h."""
    op = "residual_block"
    own, given = (3 if bottleneck else 2), len(packed)
    if given not in (own, own + 1):
        raise ValueError(f"{op}: packed: expected {own} or {own + 1} tensors, got {given}")
    if len(scale) != given or len(shift) != given:
        raise ValueError(
            f"{op}: scale, shift: expected {given} tensors, got {len(scale)} and {len(shift)}"
        )
    if x.dim() != 4:
        raise ValueError(f"{op}: x: expected 4 dimensions (N, C, H, W), got {list(x.shape)}")
    if not bottleneck and (dilation, groups) != (1, 1):
        raise ValueError(
            f"{op}: dilation, groups: expected 1 in a basic block, got {dilation} and {groups}"
        )

    def conv(i: int, channels: int, size: int, s: int = 1, d: int = 1, g: int = 1) -> BlockConv:
        if g < 1 or channels % g:
            raise ValueError(f"{op}: groups: expected a divisor of {channels} channels, got {g}")
        pad = 0 if size == 1 else d
        shape = (scale[i].numel(), channels // g, size, size)
        return BlockConv(packed[i], scale[i], shift[i], shape, (s, s), (pad, pad), (d, d), g)

    c = x.shape[1]
    if bottleneck:
        convs = [
            conv(0, c, 1),
            conv(1, scale[0].numel(), 3, stride, dilation, groups),
            conv(2, scale[1].numel(), 1),
        ]
    else:
        convs = [conv(0, c, 3, stride), conv(1, scale[0].numel(), 3)]
    return convs + ([conv(own, c, 1, stride)] if given > own else [])


def _end(
    x: Tensor, first: BlockConv, second: BlockConv, residual: Tensor, config: BlockConfig | None
) -> Tensor:
    """The last two convolutions: one kernel where there is one for these channels, else two."""
    op = "residual_block"
    middle = first.weight_shape[0]
    config = config or CONFIGS.get(middle)
    if config is None or precision_of(x) != "half" or first.groups != 1:
        return second.run(first.run(x, None, True), residual, True)
    affine = Affine(weight=first.scale, bias=first.shift)
    call = ConvCall(op, x, first.packed, first.weight_shape, first[4:], affine, FOLDED)
    s, k = call.shape, second.weight_shape[0]
    check_same(op, "packed", second.packed, [k * middle], x)
    check_same(op, "residual", residual, (s.n, k, s.out_h, s.out_w), x)
    y = call.empty(k)
    if y.numel() == 0:
        return y
    tile = Tile(config.block_m, middle, config.block_k, config.warps, config.stages)
    mode = mode_of(s, tile)
    with on_device(y):
        residual_block_kernel[(cdiv(s.rows, config.block_m),)](
            call.x, call.weight, call.affine.weight, call.affine.bias,
            second.packed.contiguous(),
            vector(op, "scale", second.scale, k, x), vector(op, "shift", second.shift, k, x),
            call.map(residual), y, M=s.rows, K=k, OH=s.out_h, OW=s.out_w, steps=steps_of(s, tile),
            **call.geometry(), MODE=mode,
            EVEN_C=mode != "flat" and s.group_c % config.block_k == 0, MIDDLE=middle,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            num_warps=config.warps, num_stages=config.stages, maxnreg=REGISTERS,
        )  # fmt: skip
    return y


def residual_block(
    x: Tensor,
    packed: Sequence[Tensor],
    scale: Sequence[Tensor],
    shift: Sequence[Tensor],
    joined: Tensor | None,
    joined_shift: Tensor | None,
    bottleneck: bool,
    stride: int,
    dilation: int,
    groups: int,
    winograd: bool,
    *,
    config: BlockConfig | None = None,
) -> Tensor:
    """A frozen basic block, or a bottleneck with the stride on its 3x3.

    Args:
        x: ``(N, C, H, W)``; float32, float16 or bfloat16; channels_last is not copied.
        packed: Weights of the block's convolutions in order, and then, if there is one more, of the
            shortcut's 1x1; each a vector, [k][kh][kw][c / groups], dtype of ``x``.
        scale: ``(K,)`` of each, any float.
        shift: As ``scale``.
        joined: The last convolution's and the shortcut's filters, times their scales, one after the
            other for each output channel; then they are one sum.
        joined_shift: The sum of their shifts, ``(K,)``.
        bottleneck: 1x1, 3x3, 1x1; else 3x3, 3x3.
        stride: Of the bottleneck's 3x3, or of the basic block's first; and of the shortcut.
        dilation: Of the bottleneck's 3x3.
        groups: Of the bottleneck's 3x3.
        winograd: For the CPU; not looked at here.
        config: Forces a configuration of the kernel that keeps the middle on chip.

    Returns:
        ``(N, K, OH, OW)``, dtype of ``x``, channels_last.

    Raises:
        ValueError: Wrong number of tensors, rank, shape or device.
        TypeError: Wrong dtype.
    """
    convs = _take_apart(x, packed, scale, shift, bottleneck, stride, dilation, groups)
    own = 3 if bottleneck else 2
    shortcut = convs[own] if len(convs) > own else None
    if joined is not None and joined_shift is not None and shortcut is not None:
        h = x
        for conv in convs[: own - 1]:
            h = conv.run(h, None, True)
        last = convs[own - 1]
        return conv_conv_add_relu_packed(
            h, x, joined, joined_shift, *last[3:7], shortcut.stride, True
        )
    residual = x if shortcut is None else shortcut.run(x, None, False)
    if bottleneck:
        return _end(convs[0].run(x, None, True), convs[1], convs[2], residual, config)
    return convs[1].run(convs[0].run(x, None, True), residual, True)
