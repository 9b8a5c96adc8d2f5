"""Running a residual block of a network in training from which no gradient is wanted.

A backbone whose batch norms and parameters are frozen is such a block: it runs as in inference, and
what training permits, Winograd's algorithm, holds for it too. The live modules are read at every
call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..backends.activation import Activation
from ..backends.constant import assume_constant_result
from ..ops.checks import no_negative_eps
from ..ops.fakes import accumulator
from ..ops.packed import pack_conv_weight, packed_dtype
from ..ops.training_layer import as_dtype
from ..ops.training_spec import Layer, LayerTensors


def run_no_grad_block(
    x: Tensor,
    layers: Sequence[Layer],
    tensors: Sequence[LayerTensors],
    length: int,
    activation: Activation,
    winograd: bool,
) -> Tensor | None:
    """A block's result on the CPU, if it is one that :func:`fused_resnet.ops.residual_block` runs.

    Args:
        x: Input of the block, ``(N, C, H, W)``, which fits the tensors.
        layers: The convolutions and batch norms of the main branch, and then the projection's.
        tensors: Tensors of each layer; the statistics are the running ones.
        length: Number of layers of the main branch; the shortcut is the identity where there are
            no more.
        activation: Activation after each layer of the main branch; the last one's is after the
            addition.
        winograd: Whether Winograd's algorithm may run.

    Returns:
        None for every other geometry.
    """
    if suggest_memory_format(x) is not torch.channels_last or x.numel() == 0:
        return None
    middle = layers[length - 2]  # has the block's stride, dilation and groups
    found = [(tuple(t.weight.shape[2:]), *m[:4]) for m, t in zip(layers, tensors, strict=True)]
    if length not in (2, 3) or found != _geometry(middle, length, len(layers) > length):
        return None
    packed, scale, shift = [], [], []
    dtype, vectors = _packed_dtype(x.dtype), accumulator(x)
    with torch.no_grad():
        for layer, t in zip(layers, tensors, strict=True):
            no_negative_eps("residual_block", layer.eps)
            weight = as_dtype(as_dtype(t.weight, x.dtype), dtype)  # rounded as PyTorch's
            packed.append(pack_conv_weight(weight, layer.groups))
            # The running mean and variance, weight and bias.
            norm = [as_dtype(v, vectors) for v in (*t[3:5], *t[1:3])]
            affine = torch.ops.fused_resnet.bn_coefficients(*norm, layer.eps)
            scale.append(affine[0])
            shift.append(affine[1])
        y: Tensor = torch.ops.fused_resnet.residual_block(
            x, packed, scale, shift, None, None, length == 3, middle.stride[0],
            middle.dilation[0], middle.groups, winograd, activation,
        )  # fmt: skip
        return y


@assume_constant_result
def _packed_dtype(dtype: torch.dtype) -> torch.dtype:
    return packed_dtype(dtype, torch.device("cpu"))


def _geometry(middle: Layer, length: int, projection: bool) -> list[Any]:
    """Kernel, stride, padding, dilation and groups of each convolution that the operation runs."""
    stride, one = (middle.stride[0],) * 2, (1, 1)
    dilation, groups = ((middle.dilation[0],) * 2, middle.groups) if length == 3 else (one, 1)
    pointwise = (one, one, (0, 0), one, 1)
    widest = ((3, 3), stride, dilation, dilation, groups)
    last = pointwise if length == 3 else ((3, 3), one, one, one, 1)
    convs = [pointwise, widest, last][3 - length :]
    return [*convs, (one, stride, (0, 0), one, 1)] if projection else convs
