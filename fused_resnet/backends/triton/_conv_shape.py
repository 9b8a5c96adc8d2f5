"""The checked sizes of a 2-d convolution: ``csrc/conv_shape.h`` in Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ._common import check_map


class ConvShape(NamedTuple):
    """The sizes of a convolution.

    Attributes:
        n: Images.
        h: Height of the input.
        w: Width of the input.
        c: Channels of the input.
        k: Filters.
        kh: Height of the filters.
        kw: Width of the filters.
        stride: Stride of the convolution, ``(height, width)``.
        padding: Zeros on each side, ``(height, width)``.
        dilation: Distance between the filters' taps, ``(height, width)``.
        groups: Number of independent groups of channels.
    """

    n: int
    h: int
    w: int
    c: int
    k: int
    kh: int
    kw: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def group_c(self) -> int:
        """Input channels of a group."""
        return self.c // self.groups

    @property
    def group_k(self) -> int:
        """Filters of a group."""
        return self.k // self.groups

    @property
    def out_h(self) -> int:
        """Height of the result."""
        return window(self.h, self.kh, self.stride[0], self.padding[0], self.dilation[0])

    @property
    def out_w(self) -> int:
        """Width of the result."""
        return window(self.w, self.kw, self.stride[1], self.padding[1], self.dilation[1])

    @property
    def rows(self) -> int:
        """Pixels of the result, all images together."""
        return self.n * self.out_h * self.out_w

    @property
    def depth(self) -> int:
        """Number of products in each element of the result."""
        return self.kh * self.kw * self.group_c

    @property
    def pointwise(self) -> bool:
        """Whether each pixel of the result depends on the same pixel of the input only."""
        return self[5:10] == (1, 1, (1, 1), (0, 0), self.dilation)

    @property
    def result(self) -> tuple[int, int, int, int]:
        """Shape of the result, (N, K, OH, OW)."""
        return self.n, self.k, self.out_h, self.out_w


def window(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    """Number of positions of a window along one axis."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def check_pair(op: str, name: str, v: Sequence[int], least: int) -> tuple[int, int]:
    """Two ints, each at least ``least``."""
    if len(v) != 2 or min(v) < least:
        raise ValueError(f"{op}: {name}: expected two ints >= {least}, got {list(v)}")
    return int(v[0]), int(v[1])


def conv_shape(
    op: str,
    x: Tensor,
    weight: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> ConvShape:
    """The sizes of a convolution of ``x`` by filters of shape ``weight``, checked."""
    check_map(op, "x", x)
    strides = check_pair(op, "stride", stride, 1)
    paddings = check_pair(op, "padding", padding, 0)
    dilations = check_pair(op, "dilation", dilation, 1)
    if len(weight) != 4 or min(weight) <= 0:
        raise ValueError(
            f"{op}: weight: expected 4 positive sizes (K, C / groups, kh, kw), got {list(weight)}"
        )
    if groups < 1 or weight[0] % groups:
        raise ValueError(
            f"{op}: groups: expected a divisor of the {weight[0]} output channels, got {groups}"
        )
    if x.shape[1] != weight[1] * groups:
        raise ValueError(f"{op}: x: expected {weight[1] * groups} channels, got {x.shape[1]}")
    n, c, h, w = x.shape
    s = ConvShape(n, h, w, c, weight[0], weight[2], weight[3], strides, paddings, dilations, groups)
    if s.out_h < 1 or s.out_w < 1:
        raise ValueError(
            f"{op}: x: expected a map at least as large as the dilated kernel, got "
            f"{list(x.shape)} for weight {list(weight)}"
        )
    # Kernels count the pixels of a batch and the elements of an image in 32 bits, padding included.
    image = (h + 2 * paddings[0]) * (w + 2 * paddings[1]) * c
    if image >= 2**31 or s.rows >= 2**31 - 2**16:
        raise ValueError(
            f"{op}: x: expected less than 2^31 elements in an image and pixels in the result, got "
            f"{list(x.shape)}"
        )
    return s
