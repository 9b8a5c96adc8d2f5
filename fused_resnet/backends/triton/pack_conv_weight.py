"""Weights as the convolutions' kernels read them: [k][kh][kw][c / groups], filter by filter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pack_conv_weight(weight: Tensor, groups: int) -> Tensor:
    """Lay a weight out for the kernels, in its own dtype.

    Args:
        weight: ``(K, C / groups, kh, kw)``.
        groups: Independent groups of channels.

    Returns:
        A vector, a copy.

    Raises:
        ValueError: Wrong rank, or groups that do not divide K.
    """
    op = "pack_conv_weight"
    if weight.dim() != 4:
        raise ValueError(f"{op}: weight: expected 4 dimensions, got {list(weight.shape)}")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(
            f"{op}: groups: expected a divisor of the {weight.shape[0]} output channels, "
            f"got {groups}"
        )
    filters = weight.permute(0, 2, 3, 1)
    return filters.clone(memory_format=torch.contiguous_format).view(-1)


def unpack_conv_weight(packed: Tensor, weight_shape: Sequence[int], groups: int) -> Tensor:
    """The exact inverse of :func:`pack_conv_weight`.

    Args:
        packed: A packed weight.
        weight_shape: ``(K, C / groups, kh, kw)``.
        groups: As it was packed.

    Returns:
        The weight, a copy, contiguous.

    Raises:
        ValueError: ``packed`` does not belong to that shape.
    """
    k, c, kh, kw = weight_shape
    if list(packed.shape) != [k * c * kh * kw]:
        raise ValueError(
            f"unpack_conv_weight: packed: expected shape {[k * c * kh * kw]}, "
            f"got {list(packed.shape)}"
        )
    filters = packed.reshape(k, kh, kw, c).permute(0, 3, 1, 2)
    return filters.clone(memory_format=torch.contiguous_format)
