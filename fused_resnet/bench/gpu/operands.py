"""Operands of a layer on the target, as a network has them. Needs no built extension."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .shapes import Layer

#: Storage types by precision; tf32 and float32 differ in how products are computed.
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "tf32": torch.float32,
    "float32": torch.float32,
}

EPS = 1e-5


class ConvOperands(NamedTuple):
    """A convolution, its batch norm, and the map that is added.

    Attributes:
        x: Input of the convolution, ``(N, C, H, W)``, channels_last.
        weight: Filters of the convolution, ``(K, C, kh, kw)``, channels_last.
        bn_weight: Weight of the batch norm, ``(K,)``, float32, as the batch norm's other vectors.
        bn_bias: Bias of the batch norm, ``(K,)``.
        mean: Running mean, ``(K,)``.
        var: Running variance, ``(K,)``.
        residual: Map that is added, shape of the result; None without an addition.
    """

    x: Tensor
    weight: Tensor
    bn_weight: Tensor
    bn_bias: Tensor
    mean: Tensor
    var: Tensor
    residual: Tensor | None

    @property
    def packed(self) -> Tensor:
        """The weight as CUDA's and Triton's kernels read it, [k][kh][kw][c]."""
        return self.weight.permute(0, 2, 3, 1).reshape(-1)

    @property
    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift of the folded batch norm, float32."""
        scale = self.bn_weight.double() * torch.rsqrt(self.var.double() + EPS)
        return scale.float(), (self.bn_bias.double() - self.mean.double() * scale).float()

    def named(self) -> dict[str, Any]:
        """By the names of the public functions."""
        found: dict[str, Any] = {"x": self.x, "conv_weight": self.weight}
        found |= {"bn_weight": self.bn_weight, "bn_bias": self.bn_bias}
        found |= {"running_mean": self.mean, "running_var": self.var}
        return found if self.residual is None else {**found, "residual": self.residual}

    def double(self, images: int | None = None) -> ConvOperands:
        """In float64, plainly laid out.

        Args:
            images: Number of the maps' images to keep; None keeps all.
        """

        def wide(t: Tensor) -> Tensor:
            return (t[:images] if t.dim() == 4 and t is not self.weight else t).double()

        found = [None if t is None else wide(t).contiguous() for t in self]
        return ConvOperands(*found)  # type: ignore[arg-type]


def feature_map(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, scale: float = 1.0
) -> Tensor:
    """Normal numbers, channels_last.

    Args:
        shape: Shape of the map, ``(N, C, H, W)``.
        dtype: Storage type.
        generator: Generator of the random numbers, on the device of the result.
        scale: Standard deviation of the numbers.
    """
    t = torch.empty(
        shape, dtype=dtype, device=generator.device, memory_format=torch.channels_last
    ).normal_(generator=generator)
    return t.mul_(scale) if scale != 1.0 else t


def vector(size: int, generator: torch.Generator, scale: float, mean: float = 0.0) -> Tensor:
    """Normal numbers, float32.

    Args:
        size: Length of the vector.
        generator: Generator of the random numbers, on the device of the result.
        scale: Standard deviation of the numbers.
        mean: Mean of the numbers.
    """
    return torch.randn(size, generator=generator, device=generator.device) * scale + mean


def conv_operands(
    layer: Layer, batch: int, dtype: torch.dtype, generator: torch.Generator
) -> ConvOperands:
    """A weight that keeps the variance, and a batch norm that is not the identity.

    Args:
        layer: The convolution.
        batch: Number of images.
        dtype: Storage type.
        generator: Generator of the random numbers, on the device of the operands.
    """
    k = layer.filters
    return ConvOperands(
        feature_map(layer.input(batch), dtype, generator),
        feature_map(layer.weight_shape, dtype, generator, (2 / layer.depth) ** 0.5),
        vector(k, generator, 0.2, 1.0),
        vector(k, generator, 0.3),
        vector(k, generator, 0.3),
        vector(k, generator, 0.2).abs() + 0.8,
        feature_map(layer.result(batch), dtype, generator) if layer.add else None,
    )
