"""Folds a batch norm in inference into a scale and a shift per channel."""

from __future__ import annotations

import torch
from torch import Tensor


def fold(
    conv_bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    r"""Scale and shift with :math:`\mathrm{bn}(z + b) = \mathrm{scale} \cdot z + \mathrm{shift}`.

    .. math:: \mathrm{scale} = \gamma / \sqrt{\sigma^2 + \epsilon}, \quad
        \mathrm{shift} = \beta + (b - \mu)\, \mathrm{scale}

    Args:
        conv_bias: Bias of the convolution :math:`b`, ``(K,)``; None means 0.
        bn_weight: Scale :math:`\gamma`, ``(K,)``; None means 1.
        bn_bias: Shift :math:`\beta`, ``(K,)``; None means 0.
        mean: Running mean :math:`\mu`, ``(K,)``.
        var: Running variance :math:`\sigma^2`, ``(K,)``.
        eps: Added to the variance.
        dtype: Dtype of the arithmetic and of the result.

    Returns:
        Scale and shift, ``(K,)`` each.
    """
    scale = torch.rsqrt(var.to(dtype) + eps)
    if bn_weight is not None:
        scale = scale * bn_weight.to(dtype)
    offset = -mean.to(dtype)
    if conv_bias is not None:
        offset = offset + conv_bias.to(dtype)
    shift = offset * scale
    return scale, shift if bn_bias is None else shift + bn_bias.to(dtype)
