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

from ..backends.activation import NAMES, Activation
from ..backends.constant import assume_constant_result
from ..backends.folding import fold
from ..ops.fakes import accumulator
from ..ops.packed import pack_conv_weight, packed_dtype, residual_block
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
        x: ``(N, C, H, W)``, which fits the tensors.
        layers: The convolutions and batch norms of the main branch, and then the projection's.
        tensors: Of each layer; the statistics are the running ones.
        length: Number of layers of the main branch; the shortcut is the identity where there are
            no more.
        activation: Behind each layer of the main branch; the last one's is behind the addition.
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
    dtype = _packed_dtype(x.dtype)
    with torch.no_grad():
        for layer, t in zip(layers, tensors, strict=True):
            weight = t.weight.to(x.dtype).to(dtype)  # rounded as PyTorch's
            packed.append(pack_conv_weight(weight, layer.groups))
            mean, var = t.running_mean, t.running_var
            assert mean is not None
            assert var is not None
            affine = fold(None, t.bn_weight, t.bn_bias, mean, var, layer.eps, accumulator(x))
            scale.append(affine[0])
            shift.append(affine[1])
        return residual_block(
            x, packed, scale, shift, bottleneck=length == 3, stride=middle.stride[0],
            dilation=middle.dilation[0], groups=middle.groups, winograd=winograd,
            activation=NAMES[activation],
        )  # fmt: skip


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
