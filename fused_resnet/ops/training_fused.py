"""Training primitives that only Triton has: several of the others in one kernel.

Units use them where their backend has them. ``conv_bn_forward`` is ``conv_forward`` with
statistics, ``bn_coefficients``, ``bn_update_running`` and the count of batches: the kernel that
finishes the statistics does them all, and reads the batch norm's parameters in their own dtype.
``block_end_backward_recomputed`` is ``block_end_backward`` without the block's result, whose sign
it computes again from what its sums read anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .fakes import accumulator, conv_shape
from .flops import conv_flops

#: By the operator's name.
SCHEMAS = {
    "conv_bn_forward": (
        "conv_bn_forward(Tensor x, Tensor? x_scale, Tensor? x_shift, Tensor weight, "
        "Tensor? bn_weight, Tensor? bn_bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
        "Tensor(c!)? batches, int[2] stride, int[2] padding, int[2] dilation, int groups, "
        "float momentum, float eps, bool winograd, int activation=1) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "block_end_backward_recomputed": (
        "block_end_backward_recomputed(Tensor dy, Tensor z, Tensor mean, Tensor scale, "
        "Tensor shift, Tensor? shortcut, Tensor? shortcut_mean, Tensor? shortcut_scale, "
        "Tensor? shortcut_shift, bool sums, int activation=1) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
}


def _conv_bn_forward(  # type: ignore[no-untyped-def]
    x, x_scale, x_shift, weight, bn_weight, bn_bias, running_mean, running_var, batches, stride,
    padding, dilation, groups, momentum, eps, winograd, activation=1,
):  # fmt: skip
    z = torch.empty(
        conv_shape(x, weight.shape, stride, padding, dilation),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    vectors = [x.new_empty((weight.shape[0],), dtype=accumulator(x)) for _ in range(4)]
    return z, *vectors


def _block_end_backward_recomputed(  # type: ignore[no-untyped-def]
    dy, z, mean, scale, shift, shortcut, shortcut_mean, shortcut_scale, shortcut_shift, sums,
    activation=1,
):  # fmt: skip
    channels = z.shape[1] if sums else 0
    sizes = (channels, channels, channels if shortcut is not None else 0)
    g = torch.empty(z.shape, dtype=z.dtype, device=z.device, memory_format=torch.channels_last)
    return g, *(z.new_empty((n,), dtype=accumulator(z)) for n in sizes)


def _conv_bn_flops(  # type: ignore[no-untyped-def]
    x, x_scale, x_shift, weight, bn_weight, bn_bias, running_mean, running_var, batches, stride,
    padding, dilation, *_, **__,
):  # fmt: skip
    return conv_flops(x, weight, stride, padding, dilation)


#: The flop formulas, by the operator's name.
FLOPS: dict[str, Callable[..., int]] = {"conv_bn_forward": _conv_bn_flops}

#: The fake implementations, by the operator's name.
FAKES: dict[str, Callable[..., Any]] = {
    "conv_bn_forward": _conv_bn_forward,
    "block_end_backward_recomputed": _block_end_backward_recomputed,
}
