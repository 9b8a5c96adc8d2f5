"""Fake (meta) implementations: the shapes, dtypes and strides of the operators' results.

They run under ``torch.compile`` and ``torch.export``, and for meta tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .. import _C
from .program_shapes import program_shapes, windows

#: By the name of the operator; the same for all libraries.
FAKES: dict[str, Callable[..., Any]] = {}


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that adds a function to :data:`FAKES`.

    Args:
        name: Name of the operator.
    """

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        FAKES[name] = function
        return function

    return add


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype of statistics and of sums over a feature map.

    Args:
        x: The feature map.
    """
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _map_like(x: Tensor, shape: list[Any]) -> Tensor:
    """An empty feature map in the dtype and memory format of ``x``."""
    return torch.empty(
        shape, dtype=x.dtype, device=x.device, memory_format=suggest_memory_format(x)
    )


def conv_shape(
    x: Tensor, weight_shape: Any, stride: list[int], padding: list[int], dilation: list[int]
) -> list[Any]:
    """The sizes ``(N, K, OH, OW)`` of a convolution's result.

    Args:
        x: Input, ``(N, C, H, W)``.
        weight_shape: Shape of the filters, ``(K, C / groups, kh, kw)``.
        stride: Stride of the convolution, ``(height, width)``.
        padding: Zeros on each side, ``(height, width)``.
        dilation: Distance between the filter's taps, ``(height, width)``.
    """
    size = windows(x.shape, weight_shape[2:], stride, padding, dilation)
    return [x.shape[0], weight_shape[0], *size]


def pool_shape(
    shape: list[Any], kernel: list[int], stride: list[int], padding: list[int]
) -> list[Any]:
    """The sizes of a max-pool's result.

    Args:
        shape: Shape of the map that is pooled, ``(N, C, H, W)``.
        kernel: Window of the pool, ``(height, width)``.
        stride: Stride of the pool, ``(height, width)``.
        padding: Padding on each side, ``(height, width)``.
    """
    return [shape[0], shape[1], *windows(shape, kernel, stride, padding)]


@fake("bn_add_relu")
def _(x, weight, bias, mean, var, residual, training, eps, activation):  # type: ignore[no-untyped-def]
    channels = x.shape[1] if training else 0
    statistic = x.new_empty((channels,), dtype=accumulator(x))
    return _map_like(x, x.shape), statistic, torch.empty_like(statistic)


@fake("bn_add_relu_backward")
def _(grad, x, y, weight, mean, var, training, eps, activation, need_residual):  # type: ignore[no-untyped-def]
    vector = x.new_empty((x.shape[1],), dtype=accumulator(x))
    residual = _map_like(x, x.shape) if need_residual else x.new_empty((0,))
    return _map_like(x, x.shape), vector, torch.empty_like(vector), residual


@fake("bn_add_relu_apply")
def _(x, weight, bias, mean, var, residual, eps, activation):  # type: ignore[no-untyped-def]
    return _map_like(x, x.shape)


@fake("conv_bn_add_relu")
def _(  # type: ignore[no-untyped-def]
    x, weight, conv_bias, bn_weight, bn_bias, mean, var, residual, stride, padding, dilation,
    groups, eps, activation,
):  # fmt: skip
    return _map_like(x, conv_shape(x, weight.shape, stride, padding, dilation))


@fake("conv_statistics")
def _(x, weight, conv_bias, stride, padding, dilation, groups):  # type: ignore[no-untyped-def]
    z = _map_like(x, conv_shape(x, weight.shape, stride, padding, dilation))
    statistic = x.new_empty((weight.shape[0],), dtype=accumulator(x))
    return z, statistic, torch.empty_like(statistic)


@fake("conv_bn_relu_maxpool")
def _(  # type: ignore[no-untyped-def]
    x, weight, conv_bias, bn_weight, bn_bias, mean, var, stride, padding, dilation, groups, eps,
    pool_kernel, pool_stride, pool_padding, activation=1,
):  # fmt: skip
    shape = conv_shape(x, weight.shape, stride, padding, dilation)
    return _map_like(x, pool_shape(shape, pool_kernel, pool_stride, pool_padding))


@fake("pack_conv_weight")
def _(weight, groups):  # type: ignore[no-untyped-def]
    if weight.device.type == "cuda":
        return weight.new_empty((weight.numel(),))
    numel = _C.packed_conv_weight_numel(list(weight.shape), groups, weight.dtype)
    return weight.new_empty((numel,), dtype=_C.packed_conv_weight_dtype(weight.dtype))


@fake("unpack_conv_weight")
def _(packed, weight_shape, groups):  # type: ignore[no-untyped-def]
    return packed.new_empty(weight_shape)


@fake("conv_bn_add_relu_packed")
def _(  # type: ignore[no-untyped-def]
    x, packed, scale, shift, residual, weight_shape, stride, padding, dilation, groups,
    activation, winograd=False,
):  # fmt: skip
    shape = conv_shape(x, weight_shape, stride, padding, dilation)
    return x.new_empty(shape).to(memory_format=torch.channels_last)


@fake("conv_bn_relu_maxpool_packed")
def _(  # type: ignore[no-untyped-def]
    x, packed, scale, shift, weight_shape, stride, padding, dilation, groups, pool_kernel,
    pool_stride, pool_padding, activation=1,
):  # fmt: skip
    shape = conv_shape(x, weight_shape, stride, padding, dilation)
    shape = pool_shape(shape, pool_kernel, pool_stride, pool_padding)
    return x.new_empty(shape).to(memory_format=torch.channels_last)


@fake("conv_bn_add_relu_planned")
def _(  # type: ignore[no-untyped-def]
    x, packed, scale, shift, residual, residual_scale, residual_shift, weight_shape, stride,
    padding, dilation, groups, activation, tile, split_k,
):  # fmt: skip
    shape = conv_shape(x, weight_shape, stride, padding, dilation)
    return x.new_empty(shape).to(memory_format=torch.channels_last)


@fake("conv_conv_add_relu_packed")
def _(  # type: ignore[no-untyped-def]
    x, x2, packed, shift, weight_shape, stride, padding, dilation, stride2, activation
):  # fmt: skip
    shape = conv_shape(x, weight_shape, stride, padding, dilation)
    return x.new_empty(shape).to(memory_format=torch.channels_last)


@fake("residual_block")
def _(  # type: ignore[no-untyped-def]
    x, packed, scale, shift, concatenated, concatenated_shift, bottleneck, stride, dilation,
    groups, winograd, activation=1,
):  # fmt: skip
    channels = scale[2 if bottleneck else 1].shape[0]
    size = windows(x.shape, (1, 1), (stride, stride), (0, 0))
    return x.new_empty([x.shape[0], channels, *size]).to(memory_format=torch.channels_last)


@fake("run_program")
def _(x, tensors, steps, outputs):  # type: ignore[no-untyped-def]
    shapes = program_shapes(x.shape, steps)
    results = []
    for value in outputs:
        result = x.new_empty(shapes[value - 1].result)
        is_map = result.dim() == 4
        results.append(result.to(memory_format=torch.channels_last) if is_map else result)
    return results
