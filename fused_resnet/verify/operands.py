"""Seeded operands of the verified operations: maps, weights and batch norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.folding import fold

#: Tensors by the name of the argument.
Inputs = dict[str, Tensor]

#: The four vectors of a batch norm, in the order of every signature.
BATCH_NORM = ("bn_weight", "bn_bias", "running_mean", "running_var")


class Draw:
    """Draws normal numbers in float32 and converts them to an operation's dtypes and layout.

    Args:
        seed: Seed of the numbers, which are the same for every dtype and layout.
        dtype: Storage type of maps and convolution weights.
        affine: Storage type of the batch norm's vectors.
        layout: Memory format of maps and weights.

    Attributes:
        generator: Generator of the numbers.
    """

    def __init__(
        self, seed: int, dtype: torch.dtype, affine: torch.dtype, layout: torch.memory_format
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.affine, self.layout = dtype, affine, layout

    def _normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=self.generator) * scale + mean

    def feature_map(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        """A feature map.

        Args:
            shape: Sizes of the map, ``N, C, H, W``.
            scale: Standard deviation.
            mean: Mean.
        """
        drawn = self._normal(*shape, scale=scale, mean=mean)
        return drawn.to(self.dtype).contiguous(memory_format=self.layout)

    def conv_weight(self, k: int, c: int, kh: int, kw: int) -> Tensor:
        """``(K, C / groups, kh, kw)``, scaled so that maps after ReLU keep their variance.

        Args:
            k: Output channels.
            c: Input channels of a group.
            kh: Height of a filter.
            kw: Width of a filter.
        """
        return self.feature_map(k, c, kh, kw, scale=(2 / (c * kh * kw)) ** 0.5)

    def batch_norm(self, channels: int) -> Inputs:
        """The vectors of :data:`BATCH_NORM`, none of them at its initial value.

        Args:
            channels: Length of the vectors.
        """
        drawn = [
            self._normal(channels, scale=0.3, mean=1.0),
            self._normal(channels, scale=0.3),
            self._normal(channels, scale=0.3),
            self._normal(channels, scale=0.3).abs() + 0.7,
        ]
        return dict(zip(BATCH_NORM, (v.to(self.affine) for v in drawn), strict=True))


class Subject(NamedTuple):
    """One case of an operation: two functions whose results are compared.

    Attributes:
        name: Name of the case.
        unfused: Plain PyTorch, the truth in float64.
        fused: The operation.
        inputs: Draws the arguments of both.
    """

    name: str
    unfused: Callable[..., Tensor]
    fused: Callable[..., Tensor]
    inputs: Callable[[Draw], Inputs]


def folded(
    dtype: torch.dtype, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor
) -> tuple[Tensor, Tensor]:
    """A batch norm as scale and shift, in the dtype of a frozen network.

    Args:
        dtype: Storage type of the maps.
        weight: Weight of the batch norm, ``(C,)``.
        bias: Bias of the batch norm, ``(C,)``.
        mean: Running mean, ``(C,)``.
        var: Running variance, ``(C,)``.
    """
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    scale, shift = fold(None, weight, bias, mean, var, 1e-5, torch.float64)
    return scale.to(wide), shift.to(wide)
