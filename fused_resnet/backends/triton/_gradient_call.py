"""The operands of one call of ``conv_backward``, checked, and whether our kernels take them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._common import check_same
from ._conv_shape import conv_shape
from ._training_operands import check_together, first_map, map_operand, vector_operand


class GradientCall:
    """Checked operands: maps in channels_last, vectors in float32.

    Args:
        op: Name of the operation, for messages.
        g: Gradient after the batch norm of the convolution, ``(N, K, OH, OW)``.
        z: Result of the convolution, or None.
        a: Factor of ``g`` in :math:`dz`, ``(K,)``.
        b: Factor of ``z`` in :math:`dz`, ``(K,)``, there when ``z`` is.
        c: Constant term of :math:`dz`, ``(K,)``, there when ``z`` is.
        x: Input, ``(N, C, H, W)``.
        x_scale: Scale of the batch norm before the convolution, ``(C,)``; None for none.
        x_shift: Shift of that batch norm, ``(C,)``, there when ``x_scale`` is.
        x_mean: Mean of ``x`` in each channel, ``(C,)``, for the sums; None for none.
        weight: Filters of the convolution, ``(K, C / groups, kh, kw)``.
        add: Map that is added to the input's gradient, shape of ``x``; None for none.
        geometry: Stride, padding and dilation as ``(height, width)``, and the number of groups.
        activation: Between ``x`` and the convolution, with ``x_scale``.

    Attributes:
        shape: The checked sizes of the convolution.
    """

    def __init__(
        self,
        op: str,
        g: Tensor,
        z: Tensor | None,
        a: Tensor,
        b: Tensor | None,
        c: Tensor | None,
        x: Tensor,
        x_scale: Tensor | None,
        x_shift: Tensor | None,
        x_mean: Tensor | None,
        weight: Tensor,
        add: Tensor | None,
        geometry: tuple[Sequence[int], Sequence[int], Sequence[int], int],
        activation: int,
    ) -> None:
        s = self.shape = conv_shape(op, x, list(weight.shape), *geometry)
        check_same(op, "weight", weight, weight.shape, x)
        check_together(op, z=z, b=b)
        check_together(op, z=z, c=c)
        check_together(op, x_scale=x_scale, x_shift=x_shift)
        if add is not None and x_scale is not None:
            raise ValueError(f"{op}: add: expected None with x_scale, got a tensor")
        self.activation = 0 if x_scale is None else int(activation)
        self.x = first_map(op, "x", x)
        self.weight = weight
        gradient = map_operand(op, "g", g, s.result, x)
        assert gradient is not None
        self.g = gradient
        self.z = map_operand(op, "z", z, s.result, x)
        self.add = map_operand(op, "add", add, x.shape, x)
        self.a, self.b, self.c = (
            vector_operand(op, name, v, s.k, x) for name, v in (("a", a), ("b", b), ("c", c))
        )
        self.x_scale, self.x_shift, self.x_mean = (
            vector_operand(op, name, v, s.c, x)
            for name, v in (("x_scale", x_scale), ("x_shift", x_shift), ("x_mean", x_mean))
        )

    @property
    def takes(self) -> bool:
        """Whether our kernels compute these gradients; PyTorch's convolution else.

        Ours have strides of 1 and 2, no groups and no dilation, and count the elements of an image
        in 32 bits. With fewer channels than a tensor core multiplies at a time, as in the stem,
        most of a tile would be padding.
        """
        s = self.shape
        image = max(s.h * s.w * s.c, s.out_h * s.out_w * s.k)
        return (
            s.groups == 1
            and s.dilation == (1, 1)
            and set(s.stride) <= {1, 2}
            and min(s.c, s.k) >= 16
            and image < 2**31
            and s.n * s.h * s.w < 2**31 - 2**16
        )

    def filters(self) -> Tensor:
        """The weight in the order [k][kh][kw][c], copied only if it has another."""
        return self.weight.permute(0, 2, 3, 1).contiguous()
