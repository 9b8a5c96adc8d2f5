"""The strides of maps with a single channel, row or column.

A dimension of one element may have any stride, so such a map can be in two memory formats at once.
PyTorch gives its results the strides of a new tensor: contiguous where that is one of the two.
"""

from __future__ import annotations

import torch
from torch import Tensor


def with_plain_strides(x: Tensor) -> Tensor:
    """A map with the strides of a new tensor of its memory format.

    Args:
        x: The map, ``(N, C, H, W)``, not under a transform.

    Returns:
        ``x`` itself, or a view with other strides in dimensions of one element. ``x`` while a
        compiler traces: it knows the strides of its own results, and asks for no others.
    """
    if torch.compiler.is_compiling() or 1 not in x.shape[1:]:
        return x
    n, c, h, w = x.shape
    if x.is_contiguous():
        if x.stride() == (c * h * w, h * w, w, 1):
            return x
        return x.view(-1).view(x.shape)
    if not x.is_contiguous(memory_format=torch.channels_last):
        return x
    if x.stride() == (c * h * w, 1, c * w, c):
        return x
    return x.permute(0, 2, 3, 1).view(-1).view(n, h, w, c).permute(0, 3, 1, 2)
