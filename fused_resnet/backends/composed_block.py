"""A frozen residual block as a sequence of calls of a single-convolution operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from .activation import Activation

#: Called with the arguments of the operator ``conv_bn_add_relu_packed``, up to ``activation``.
Conv = Callable[..., Tensor]


def residual_block(
    conv: Conv,
    x: Tensor,
    packed: Sequence[Tensor],
    scale: Sequence[Tensor],
    shift: Sequence[Tensor],
    bottleneck: bool,
    stride: int,
    dilation: int,
    groups: int,
    activation: int = Activation.RELU,
) -> Tensor:
    """The formula of :func:`fused_resnet.ops.residual_block`, one convolution at a time.

    Args:
        conv: Runs one convolution: ``(x, packed, scale, shift, residual, weight_shape, stride,
            padding, dilation, groups, activation)``.
        x: Input, ``(N, C, H, W)``.
        packed: Packed filters of each convolution: the main branch's in order, followed by the
            shortcut's if it has one.
        scale: Scale of each convolution's output channels, ``(K,)``.
        shift: Shift of each convolution's output channels, ``(K,)``.
        bottleneck: Whether the block is a bottleneck rather than a basic block.
        stride: Stride of the block in both directions.
        dilation: Distance between the taps of a bottleneck's 3x3 filters.
        groups: Number of independent groups of channels of a bottleneck's 3x3 convolution.
        activation: Activation after each convolution of the main branch; the last one follows the
            addition.

    Returns:
        ``(N, K, OH, OW)``.
    """
    own = 3 if bottleneck else 2
    middle = 1 if bottleneck else 0  # the convolution that has the stride

    def run(i: int, h: Tensor, residual: Tensor | None, act: int) -> Tensor:
        size = 3 if i < own and (i == 1 or not bottleneck) else 1
        g, d = (groups, dilation) if i == middle else (1, 1)
        s, p = stride if i in (middle, own) else 1, d * (size // 2)
        shape = (scale[i].shape[0], h.shape[1] // g, size, size)
        return conv(
            h, packed[i], scale[i], shift[i], residual, shape, (s, s), (p, p), (d, d), g, act
        )

    residual = run(own, x, None, Activation.NONE) if len(packed) > own else x
    h = x
    for i in range(own - 1):
        h = run(i, h, None, activation)
    return run(own - 1, h, residual, activation)
