"""Packs weights into the layout of the convolution kernels: [k][kh][kw][c / groups]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pack_conv_weight(weight: Tensor, groups: int) -> Tensor:
    """Pack a weight for the kernels.

    Args:
        weight: Filters of the convolution, ``(K, C / groups, kh, kw)``.
        groups: Number of independent groups of channels.

    Returns:
        A copy as a vector in the order [k][kh][kw][c / groups], dtype of ``weight``.

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
        packed: The result of :func:`pack_conv_weight`.
        weight_shape: Shape of the weight that was packed, ``(K, C / groups, kh, kw)``.
        groups: Number of groups that the weight was packed for; the layout does not depend on it.

    Returns:
        A contiguous copy of the weight, ``weight_shape``.

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
