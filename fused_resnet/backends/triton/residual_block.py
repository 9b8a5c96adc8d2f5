r"""A frozen residual block; the last two convolutions of a bottleneck in one kernel.

The result of the 3x3 convolution stays on chip:

    h[m][j] = act(scale1[j] sum_k a[m][k] w1[j][k] + shift1[j])        j < 64 or 128
    y[m][n] = act(scale2[n] sum_j h[m][j] w2[n][j] + shift2[n] + r[m][n])

A program computes h for its pixels and all middle channels, as one tile of an ordinary
convolution; rounds it to the storage type, as if it were stored; and multiplies it by w2, 64 output
channels at a time. On sm_80 and sm_90 h is an operand of that product directly from registers; on
architectures whose tensor cores read it from shared memory it passes through there.

Bytes: x, r and y once each. h, which separate kernels would write and read, is never stored: in
ResNet's stage 1 that is a fifth of the bytes of both. The flops are those of separate kernels,
2 m (j k + n j). w2 (32 or 128 KiB) stays in the L2 cache. More middle channels would leave no
registers for the second product, and those stages are not memory-bound: they run as single
convolutions, as basic blocks do. Where the filters of the shortcut are concatenated to those of the
last convolution, both are one GEMM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..activation import Activation
from ._activation import activate
from ._common import REGISTERS, cdiv, channel_affine, check_same, on_device, vector
from ._conv_call import FOLDED, Affine, ConvCall
from ._conv_plan import ConvConfig as Tile
from ._conv_plan import mode_of, precision_of, steps_of
from ._implicit_gemm import accumulate, finish
from .conv_bn_add_relu import conv_bn_add_relu_packed, conv_conv_add_relu_packed


class BlockConfig(NamedTuple):
    """A tile of the kernel.

    Attributes:
        block_m: Pixels.
        middle: Middle channels.
        block_k: Depth of a step.
        block_n: Output channels at a time.
        warps: Warps of the program.
        stages: Stages of its pipeline.
    """

    block_m: int
    middle: int
    block_k: int
    block_n: int
    warps: int
    stages: int


#: By the number of middle channels.
CONFIGS: dict[int, BlockConfig] = {
    64: BlockConfig(128, 64, 64, 64, 8, 3),
    128: BlockConfig(128, 128, 64, 64, 8, 3),
}


@triton.jit
def residual_block_kernel(  # type: ignore[no-untyped-def]
    x_ptr, w1_ptr,
    scale1_ptr, shift1_ptr,
    w2_ptr,
    scale2_ptr, shift2_ptr,
    residual_ptr, y_ptr,
    M, K, H, W, C, OH, OW,
    stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, group_c, w_stride, steps,
    KH: tl.constexpr, KW: tl.constexpr, TAP_C: tl.constexpr,
    ACTIVATION: tl.constexpr, MODE: tl.constexpr, EVEN_C: tl.constexpr, MIDDLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h = act(conv(x, w1) * scale1 + shift1), y = act(w2 h * scale2 + shift2 + residual).

    For all channels of a tile of pixels.

    Args:
        x_ptr: Input of the 3x3 convolution, (N, H, W, C).
        w1_ptr: Filters of the 3x3 convolution, (MIDDLE, KH KW C).
        scale1_ptr: Scale of its batch norm, (MIDDLE,) any float.
        shift1_ptr: Shift of its batch norm, (MIDDLE,) any float.
        w2_ptr: Filters of the last convolution, (K, MIDDLE).
        scale2_ptr: Scale of its batch norm, (K,) any float.
        shift2_ptr: Shift of its batch norm, (K,) any float.
        residual_ptr: Map that is added, (M, K), or None.
        y_ptr: Receives the result, (M, K).
        M: Pixels of the result in the batch: the rows of the GEMM.
        K: Filters of the last convolution.
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
        w_stride: Elements from one filter to the next.
        steps: Steps through the depth.
        KH: Height of the filters.
        KW: Width of the filters.
        TAP_C: Channels of a tap, which a step divides by; 0 for a single tap.
        ACTIVATION: Number of the activation after both.
        MODE: How the depth is traversed, from ``mode_of``: ``"pointwise"``, ``"taps"`` or
            ``"flat"``.
        EVEN_C: Whether a tap's channels are whole blocks.
        MIDDLE: Filters of the 3x3 convolution.
        BLOCK_M: Pixels of a tile.
        BLOCK_N: Filters of the last convolution at a time.
        BLOCK_K: Terms of a step.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.arange(0, MIDDLE)
    image = m // (OH * OW)
    pixel = m - image * (OH * OW)
    oy = pixel // OW
    ox = pixel - oy * OW
    acc = accumulate(
        tl.zeros((BLOCK_M, MIDDLE), tl.float32),
        x_ptr, w1_ptr, None, None, image, oy, ox, m < M, 0, 0, j < MIDDLE, 0, 0, steps,
        H, W, C, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, group_c, w_stride,
        KH, KW, TAP_C, 0, MODE, EVEN_C, "half", False, False, BLOCK_M, MIDDLE, BLOCK_K,
    )  # fmt: skip
    scale, shift = channel_affine(j, j < MIDDLE, None, scale1_ptr, shift1_ptr, None, None, 0.0)
    h = activate(acc * scale[None, :] + shift[None, :], ACTIVATION).to(y_ptr.dtype.element_ty)
    for n0 in range(0, K, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        w2 = tl.load(
            w2_ptr + n.to(tl.int64)[None, :] * MIDDLE + j[:, None], mask=(n < K)[None, :], other=0.0
        )
        finish(
            tl.dot(h, w2), y_ptr, residual_ptr, None, scale2_ptr, shift2_ptr, None, None,
            None, None, m, n, m < M, n < K, K, 0.0, ACTIVATION,
        )  # fmt: skip


class BlockConv(NamedTuple):
    """A packed convolution of the block.

    Attributes:
        packed: The filters as a vector, [k][kh][kw][c / groups].
        scale: Scale of each output channel, ``(K,)``.
        shift: Shift of each output channel, ``(K,)``.
        weight_shape: Shape of the filters, ``(K, C / groups, kh, kw)``.
        stride: Stride of the convolution, ``(height, width)``.
        padding: Zeros on each side, ``(height, width)``.
        dilation: Distance between the filters' taps, ``(height, width)``.
        groups: Number of independent groups of channels.
    """

    packed: Tensor
    scale: Tensor
    shift: Tensor
    weight_shape: tuple[int, int, int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def run(self, x: Tensor, residual: Tensor | None, activation: int) -> Tensor:
        """Run the convolution as a single operation.

        Args:
            x: Input, ``(N, C, H, W)``.
            residual: Map that is added, shape of the result; None for none.
            activation: Activation that is applied to the sum.
        """
        return conv_bn_add_relu_packed(
            x, self.packed, self.scale, self.shift, residual, *self[3:], activation
        )


def _decompose(
    x: Tensor,
    packed: Sequence[Tensor],
    scale: Sequence[Tensor],
    shift: Sequence[Tensor],
    bottleneck: bool,
    stride: int,
    dilation: int,
    groups: int,
) -> list[BlockConv]:
    """The convolutions of the main branch and of the shortcut; see csrc/residual_block.h."""
    op = "residual_block"
    own, count = (3 if bottleneck else 2), len(packed)
    if count not in (own, own + 1):
        raise ValueError(f"{op}: packed: expected {own} or {own + 1} tensors, got {count}")
    if len(scale) != count or len(shift) != count:
        raise ValueError(
            f"{op}: scale, shift: expected {count} tensors, got {len(scale)} and {len(shift)}"
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
    return convs + ([conv(own, c, 1, stride)] if count > own else [])


def _end(
    x: Tensor,
    first: BlockConv,
    second: BlockConv,
    residual: Tensor,
    activation: int,
    config: BlockConfig | None,
) -> Tensor:
    """The last two convolutions, in one kernel where it supports these channels, else in two."""
    op = "residual_block"
    middle = first.weight_shape[0]
    config = config or CONFIGS.get(middle)
    if config is None or precision_of(x) != "half" or first.groups != 1:
        return second.run(first.run(x, None, activation), residual, activation)
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
            **call.geometry(), ACTIVATION=int(activation), MODE=mode,
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
    concatenated: Tensor | None,
    concatenated_shift: Tensor | None,
    bottleneck: bool,
    stride: int,
    dilation: int,
    groups: int,
    winograd: bool,
    activation: int = Activation.RELU,
    *,
    config: BlockConfig | None = None,
) -> Tensor:
    """A frozen basic block, or a bottleneck with the stride on its 3x3.

    Args:
        x: Input, ``(N, C, H, W)``; float32, float16 or bfloat16; channels_last is not copied.
        packed: Filters of each convolution as a vector, [k][kh][kw][c / groups], dtype of ``x``:
            the main branch's in order, followed by the shortcut's 1x1 if it has one.
        scale: Scale of each convolution's output channels, ``(K,)``, any float.
        shift: Shift of each convolution's output channels, ``(K,)``, any float.
        concatenated: The filters of the last convolution and of the shortcut, multiplied by their
            scales and concatenated for each output channel, so that both run as one GEMM; None for
            two.
        concatenated_shift: The sum of the shifts of these two, ``(K,)``; None without
            ``concatenated``.
        bottleneck: Whether the convolutions are 1x1, 3x3 and 1x1 rather than 3x3 and 3x3.
        stride: Stride of the bottleneck's 3x3, or of the basic block's first convolution, and of
            the shortcut, in both directions.
        dilation: Distance between the taps of the bottleneck's 3x3 filters.
        groups: Number of independent groups of channels of the bottleneck's 3x3 convolution.
        winograd: Has no effect; an option of the CPU's kernels.
        activation: Activation after each convolution but the shortcut's; the last one follows the
            addition.
        config: Forces a configuration of the kernel for two convolutions; None chooses one.

    Returns:
        ``(N, K, OH, OW)``, dtype of ``x``, channels_last.

    Raises:
        ValueError: Wrong number of tensors, rank, shape or device.
        TypeError: Wrong dtype.
    """
    convs = _decompose(x, packed, scale, shift, bottleneck, stride, dilation, groups)
    own = 3 if bottleneck else 2
    shortcut = convs[own] if len(convs) > own else None
    if concatenated is not None and concatenated_shift is not None and shortcut is not None:
        h = x
        for conv in convs[: own - 1]:
            h = conv.run(h, None, activation)
        last = convs[own - 1]
        return conv_conv_add_relu_packed(
            h, x, concatenated, concatenated_shift, *last[3:7], shortcut.stride, activation
        )
    residual = x if shortcut is None else shortcut.run(x, None, Activation.NONE)
    if bottleneck:
        h = convs[0].run(x, None, activation)
        return _end(h, convs[1], convs[2], residual, activation, config)
    return convs[1].run(convs[0].run(x, None, activation), residual, activation)
