"""Weights, scales and shifts of a frozen residual block, and the block in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from cases import normal
from precisions import Precision
from shapes import channels_last
from tolerances import error
from torch import Tensor

from fused_resnet.backends.activation import Activation, activate


class Block:
    """A basic block or a bottleneck, by its channels behind each convolution."""

    def __init__(
        self, precision: Precision, channels: int, widths: list[int], stride: int, shortcut: bool,
        activation: Activation = Activation.RELU,
    ) -> None:  # fmt: skip
        self.precision, self.stride, self.activation = precision, stride, activation
        self.bottleneck = len(widths) == 3
        sizes = [1, 3, 1] if self.bottleneck else [3, 3]
        strides = [1, stride, 1] if self.bottleneck else [stride, 1]
        ins = [channels, *widths[:-1]]
        if shortcut:
            sizes, strides = [*sizes, 1], [*strides, stride]
            ins, widths = [*ins, channels], [*widths, widths[-1]]
        self.sizes, self.strides, self.shortcut = sizes, strides, shortcut
        self.weights = [
            normal(k, c, s, s, dtype=precision.dtype, scale=(c * s * s) ** -0.5)
            for k, c, s in zip(widths, ins, sizes, strict=True)
        ]
        wide = torch.float64 if precision.dtype is torch.float64 else torch.float32
        self.scale = [torch.rand(k, dtype=wide) + 0.5 for k in widths]
        self.shift = [torch.randn(k, dtype=wide) * 0.1 for k in widths]

    @property
    def own(self) -> int:
        """How many convolutions lie on the main path."""
        return 3 if self.bottleneck else 2

    def input(self, n: int, h: int, w: int) -> Tensor:
        """A map that the block takes, channels_last."""
        c = self.weights[0].shape[1]
        return channels_last(normal(n, c, h, w, dtype=self.precision.dtype))

    def plain(self, x: Tensor, exact: bool) -> Tensor:
        """In float64 with what is between the convolutions rounded as storage rounds it, or eager.

        Each kernel rounds its result once. Left unrounded, the truth would be no nearer to one
        implementation than to the other.
        """
        dtype = self.precision.dtype

        def conv(h: Tensor, i: int, residual: Tensor | None, plain: bool = False) -> Tensor:
            weight = self.weights[i]
            if exact:
                h, weight = self.precision.operand(h.to(dtype)), self.precision.operand(weight)
            z = F.conv2d(h, weight, None, self.strides[i], self.sizes[i] // 2)
            z = z * self.scale[i].to(z.dtype).view(-1, 1, 1) + self.shift[i].to(z.dtype).view(
                -1, 1, 1
            )
            z = z if residual is None else z + residual.to(z.dtype)
            return z if plain else activate(z, self.activation)

        residual = conv(x, self.own, None, True) if self.shortcut else x
        h = x
        for i in range(self.own - 1):
            h = conv(h, i, None)
        return conv(h, self.own - 1, residual)

    def concatenated(self) -> tuple[Tensor, Tensor]:
        """The last convolution's filters and the shortcut's, one behind the other, with scales."""
        parts = [
            (w.double() * s.double().view(-1, 1, 1, 1)).permute(0, 2, 3, 1).flatten(1)
            for w, s in zip(self.weights[-2:], self.scale[-2:], strict=True)
        ]
        return torch.cat(parts, 1).to(self.precision.dtype).flatten(), sum(self.shift[-2:])

    def fold_scales(self) -> None:
        """Makes the truth that of the concatenated weights: scales in them, rounded once."""
        for weight, scale in zip(self.weights[-2:], self.scale[-2:], strict=True):
            weight.copy_(weight.double() * scale.double().view(-1, 1, 1, 1))
            scale.fill_(1)

    def check(self, result: Tensor, x: Tensor, drift: float = 2e-5) -> None:
        """Compare with :meth:`plain`.

        What is between the convolutions differs in the last place of float32 where sums have
        another order. That now and then rounds to another tf32: ``drift`` is the limit then.
        """
        truth = self.plain(x, exact=True)
        if self.precision.tf32:
            assert error(result, truth) < drift
        else:
            self.precision.check(result, self.plain(x, exact=False), truth)

    def run(self, backend, x: Tensor, concatenate: bool = False) -> Tensor:
        both = self.concatenated() if concatenate else (None, None)
        with self.precision.set():
            return backend.ops.residual_block(
                x,
                [backend.ops.pack_conv_weight(w, 1) for w in self.weights],
                self.scale,
                self.shift,
                *both,
                self.bottleneck,
                self.stride,
                1,
                1,
                False,
                self.activation,
            )
