"""Fake implementations of the training primitives: all their maps are channels_last."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .fakes import accumulator, conv_shape, fake, pool_shape


def _map(like: Tensor, shape: Any, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(
        list(shape),
        dtype=dtype or like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )


def _vector(like: Tensor, channels: Any) -> Tensor:
    return like.new_empty((channels,), dtype=accumulator(like))


@fake("conv_forward")
def _(  # type: ignore[no-untyped-def]
    x, x_scale, x_shift, weight, stride, padding, dilation, groups, statistics, winograd,
    activation=1,
):  # fmt: skip
    channels = weight.shape[0] if statistics else 0
    z = _map(x, conv_shape(x, weight.shape, stride, padding, dilation))
    return z, _vector(x, channels), _vector(x, channels)


@fake("conv_backward")
def _(  # type: ignore[no-untyped-def]
    g, z, a, b, c, x, x_scale, x_shift, x_mean, weight, add, stride, padding, dilation, groups,
    need_input, need_weight, sums, winograd, activation=1,
):  # fmt: skip
    channels = x.shape[1] if sums and need_input else 0
    return (
        _map(x, x.shape) if need_input else x.new_empty((0,)),
        torch.empty_like(weight) if need_weight else weight.new_empty((0,)),
        _vector(x, channels),
        _vector(x, channels),
    )


@fake("block_end")
def _(z, scale, shift, shortcut, shortcut_scale, shortcut_shift, activation):  # type: ignore[no-untyped-def]
    return _map(z, z.shape)


@fake("block_end_backward")
def _(dy, y, z, mean, shortcut, shortcut_mean, sums, activation=1):  # type: ignore[no-untyped-def]
    channels = z.shape[1] if sums else 0
    return (
        z.new_empty((0,)) if y is None else _map(z, z.shape),
        _vector(z, channels),
        _vector(z, channels),
        _vector(z, channels if shortcut is not None else 0),
    )


@fake("bn_coefficients")
def _(mean, var, weight, bias, eps):  # type: ignore[no-untyped-def]
    return torch.empty_like(mean), torch.empty_like(mean)


@fake("bn_update_running")
def _(mean, var, running_mean, running_var, momentum, count):  # type: ignore[no-untyped-def]
    return None


@fake("bn_backward_coefficients")
def _(sum_g, sum_g_xc, mean, var, weight, eps, count):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(mean) for _ in range(5))


@fake("stem_end")
def _(z, scale, shift, kernel, stride, padding, activation=1):  # type: ignore[no-untyped-def]
    shape = pool_shape(list(z.shape), kernel, stride, padding)
    return _map(z, shape), _map(z, shape, torch.uint8)


@fake("stem_end_backward")
def _(  # type: ignore[no-untyped-def]
    dy, index, z, scale, shift, mean, kernel, stride, padding, sums, activation=1
):
    channels = z.shape[1] if sums else 0
    return _map(z, z.shape), _vector(z, channels), _vector(z, channels)
