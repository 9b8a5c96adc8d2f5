"""Operands of the training primitives for one convolution, whose masks no rounding can turn.

The vectors have 8 significant bits: with maps of half precision a product with them is exact in
float32, and so is the sum where it nearly cancels. The sign that ReLU asks for is then the same in
float32 and in float64, and a gradient's error is one of arithmetic alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .operands import feature_map, vector
from .shapes import Layer


class TrainingOperands(NamedTuple):
    """What a convolution's forward and backward read.

    Attributes:
        x: Input of the convolution, ``(N, C, H, W)``, channels_last.
        scale: Scale of the batch norm before the convolution, ``(C,)``, float32.
        shift: Shift of the batch norm before the convolution, ``(C,)``, float32.
        mean: Mean of ``x`` in each channel, ``(C,)``.
        weight: Filters of the convolution, ``(K, C, kh, kw)``, channels_last.
        g: The gradient of the batch norm's output, shape of the result.
        z: The convolution's result.
        a: Factor of ``g`` in ``dz = a g + b z + c``, ``(K,)``.
        b: Factor of ``z`` in ``dz``, ``(K,)``.
        c: Constant term of ``dz``, ``(K,)``.
    """

    x: Tensor
    scale: Tensor
    shift: Tensor
    mean: Tensor
    weight: Tensor
    g: Tensor
    z: Tensor
    a: Tensor
    b: Tensor
    c: Tensor

    def double(self) -> TrainingOperands:
        """In float64, plainly laid out."""
        return TrainingOperands(*(t.double().contiguous() for t in self))

    def forward(self, layer: Layer, prologue: bool) -> tuple[Any, ...]:
        """The arguments of ``conv_forward``.

        Args:
            layer: The convolution.
            prologue: Whether the batch norm before it is applied while the input is read.
        """
        before = (self.scale, self.shift) if prologue else (None, None)
        return self.x, *before, self.weight, *layer.geometry, True, False

    def backward(
        self, layer: Layer, prologue: bool, need_input: bool, need_weight: bool
    ) -> tuple[Any, ...]:
        """The arguments of ``conv_backward``.

        Args:
            layer: The convolution.
            prologue: Whether the batch norm before it is applied while the input is read.
            need_input: Whether the data gradient is wanted.
            need_weight: Whether the weight gradient is wanted.
        """
        before = (self.scale, self.shift, self.mean) if prologue else (None, None, None)
        sums = prologue and need_input
        return (
            self.g, self.z, self.a, self.b, self.c, self.x, *before, self.weight, None,
            *layer.geometry, need_input, need_weight, sums, False,
        )  # fmt: skip


def training_operands(
    layer: Layer, batch: int, dtype: torch.dtype, g: torch.Generator
) -> TrainingOperands:
    """Operands of a layer.

    Args:
        layer: The convolution.
        batch: Number of images.
        dtype: Storage type of the maps.
        g: Generator of the random numbers, on the device of the operands.
    """

    def coarse(size: int, scale: float, mean: float = 0.0) -> Tensor:
        return vector(size, g, scale, mean).bfloat16().float()

    c, k = layer.channels, layer.filters
    return TrainingOperands(
        feature_map(layer.input(batch), dtype, g),
        coarse(c, 0.2, 1.0),
        coarse(c, 0.3),
        coarse(c, 0.1),
        feature_map(layer.weight_shape, dtype, g, (2 / layer.depth) ** 0.5),
        feature_map(layer.result(batch), dtype, g),
        feature_map(layer.result(batch), dtype, g),
        coarse(k, 0.2, 1.0),
        coarse(k, 0.1),
        coarse(k, 0.1),
    )
