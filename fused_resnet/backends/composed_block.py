"""A frozen residual block as the chain of its convolutions, whatever runs each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

#: Arguments as those of the operator ``conv_bn_add_relu_packed``, up to ``relu``.
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
) -> Tensor:
    """The block of :func:`fused_resnet.ops.residual_block`, each convolution by itself.

    Args:
        conv: Runs one: ``(x, packed, scale, shift, residual, weight_shape, stride, padding,
            dilation, groups, relu)``.
        x: ``(N, C, H, W)``, and so all else as there.
        packed: See there.
        scale: See there.
        shift: See there.
        bottleneck: See there.
        stride: See there.
        dilation: See there.
        groups: See there.

    Returns:
        ``(N, K, OH, OW)``.
    """
    own = 3 if bottleneck else 2
    middle = 1 if bottleneck else 0  # the convolution that has the stride

    def run(i: int, h: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        size = 3 if i < own and (i == 1 or not bottleneck) else 1
        g, d = (groups, dilation) if i == middle else (1, 1)
        s, p = stride if i in (middle, own) else 1, d * (size // 2)
        shape = (scale[i].shape[0], h.shape[1] // g, size, size)
        return conv(
            h, packed[i], scale[i], shift[i], residual, shape, (s, s), (p, p), (d, d), g, relu
        )

    residual = run(own, x, None, False) if len(packed) > own else x
    h = x
    for i in range(own - 1):
        h = run(i, h, None, True)
    return run(own - 1, h, residual, True)
