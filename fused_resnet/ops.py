"""The operations as functions: checks, the choice of a backend, and the call. Nothing else.

Arguments follow :func:`torch.nn.functional.batch_norm` and :func:`torch.nn.functional.conv2d`.
All are differentiable in every floating-point argument but the running statistics, work under
``torch.compile(fullgraph=True)``, ``torch.export`` and autocast, and keep the memory format they
are given (channels_last is the fast one). Arithmetic is at least float32 for float32, bfloat16 and
float16 tensors and float64 for float64; a result is rounded once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, reference
from ._registrations import OPERATORS
from .backends import current_backend, select
from .checks import Pair
from .choice import chosen
from .packed_ops import (
    conv_bn_add_relu_packed,
    conv_bn_relu_maxpool_packed,
    pack_conv_weight,
    residual_block,
    unpack_conv_weight,
)
from .reference import IntOrPair

__all__ = [
    "bn_add_relu",
    "conv_bn_add_relu",
    "conv_bn_add_relu_packed",
    "conv_bn_relu_maxpool",
    "conv_bn_relu_maxpool_packed",
    "pack_conv_weight",
    "residual_block",
    "unpack_conv_weight",
]


def bn_add_relu(
    x: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
) -> Tensor:
    r"""Batch norm, an optional residual and ReLU in one pass over memory.

    .. math:: y = \max(0,\; \gamma (x - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta + r)

    :math:`\mu, \sigma^2` are the running statistics, or those of the batch (biased variance) when
    training, which then also move the running ones: ``running = (1 - momentum) * running +
    momentum * batch``, with the unbiased variance.

    Args:
        x: ``(N, C, H, W)``; float32, float64, bfloat16 or float16.
        bn_weight: :math:`\gamma`, ``(C,)``, dtype of ``x`` or float32; None means 1.
        bn_bias: :math:`\beta`, as ``bn_weight``; None means 0.
        running_mean: ``(C,)``, updated in place when training; None keeps no statistics.
        running_var: As ``running_mean``.
        residual: :math:`r`, shape and dtype of ``x``; None means 0.
        training: Use and record the statistics of the batch.
        momentum: Weight of the batch in the running statistics.
        eps: Added to the variance.
        relu: False leaves the maximum out.

    Returns:
        ``(N, C, H, W)``, dtype and memory format of ``x``.

    Raises:
        ValueError: Wrong rank, shape or device; no running statistics when not training; a single
            value per channel when training.
        TypeError: Wrong dtype.

    Source:
        Ioffe and Szegedy, "Batch Normalization", 2015; He et al., "Deep Residual Learning for Image
        Recognition", 2015. Semantics are those of ``torch.nn.functional.batch_norm``.
    """
    op = "bn_add_relu"
    checks.feature_map(op, "x", x)
    _check_bn(op, x, x.shape[1], bn_weight, bn_bias, running_mean, running_var)
    count = x.shape[0] * x.shape[2] * x.shape[3]
    checks.statistics(op, running_mean, running_var, training, count, tuple(x.shape))
    checks.residual(op, residual, tuple(x.shape), x)

    backend = select(op, x)
    if backend == "reference":
        return reference.bn_add_relu(
            x,
            bn_weight,
            bn_bias,
            running_mean,
            running_var,
            residual,
            training=training,
            momentum=momentum,
            eps=eps,
            relu=relu,
        )
    arguments = (
        x, bn_weight, bn_bias, running_mean, running_var, residual, training, eps, relu,
    )  # fmt: skip
    backend = chosen(op, backend, arguments)
    y, mean, var = OPERATORS[backend].bn_add_relu(*arguments)
    if training and running_mean is not None and running_var is not None:
        _update_running(running_mean, running_var, mean, var, momentum, count)
    return y


def conv_bn_add_relu(
    x: Tensor,
    conv_weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None = None,
    *,
    conv_bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
) -> Tensor:
    r"""Convolution, batch norm, an optional residual and ReLU.

    .. math:: y = \max(0,\; \gamma (w * x + b - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta + r)

    In inference one kernel does it all, with batch norm, residual and ReLU applied while the
    convolution's result is still in registers; that result is never stored, and the gradient does
    not need it (see ``_registrations.py``). In training the batch statistics need all of it first:
    the convolution is PyTorch's and what follows is :func:`bn_add_relu`. Where ``cuda`` or
    ``triton`` was asked for by name it is that backend's, and leaves the statistics as it goes.

    Args:
        x: ``(N, C, H, W)``; float32, float64, bfloat16 or float16.
        conv_weight: :math:`w`, ``(K, C / groups, kh, kw)``, dtype of ``x``.
        bn_weight: :math:`\gamma`, ``(K,)``, dtype of ``x`` or float32; None means 1.
        bn_bias: :math:`\beta`, as ``bn_weight``; None means 0.
        running_mean: ``(K,)``, updated in place when training; None keeps no statistics.
        running_var: As ``running_mean``.
        residual: :math:`r`, shape and dtype of the result; None means 0.
        conv_bias: :math:`b`, ``(K,)``; None means 0.
        stride: Of the convolution, an int or ``(height, width)``.
        padding: Zeros on each side, an int or ``(height, width)``.
        dilation: Distance between taps, an int or ``(height, width)``.
        groups: Number of independent groups of channels.
        training: Use and record the statistics of the batch.
        momentum: Weight of the batch in the running statistics.
        eps: Added to the variance.
        relu: False leaves the maximum out.

    Returns:
        ``(N, K, OH, OW)``, dtype and memory format of ``x``.

    Raises:
        ValueError: Wrong rank, shape, channel count or device; a kernel larger than the padded map;
            no running statistics when not training; a single value per channel when training.
        TypeError: Wrong dtype.

    Source:
        As :func:`bn_add_relu`. Under autocast ``x`` and ``conv_weight`` are cast as
        ``torch.nn.functional.conv2d`` casts them.
    """
    op = "conv_bn_add_relu"
    checks.feature_map(op, "x", x)
    x, conv_weight, conv_bias = _autocast(x, conv_weight, conv_bias)
    shape, stride, padding, dilation = _check_conv(
        op, x, conv_weight, conv_bias, stride, padding, dilation, groups
    )
    _check_bn(op, x, shape[1], bn_weight, bn_bias, running_mean, running_var)
    count = shape[0] * shape[2] * shape[3]
    checks.statistics(op, running_mean, running_var, training, count, shape)
    checks.residual(op, residual, shape, x)

    backend = select(op, x)
    if backend != "reference" and not training:
        arguments = (
            x, conv_weight, conv_bias, bn_weight, bn_bias, running_mean, running_var, residual,
            stride, padding, dilation, groups, eps, relu,
        )  # fmt: skip
        backend = chosen(op, backend, arguments)
        return OPERATORS[backend].conv_bn_add_relu(*arguments)
    if current_backend() in ("cuda", "triton"):
        operators = OPERATORS[backend]
        z, mean, var = operators.conv_statistics(
            x, conv_weight, conv_bias, stride, padding, dilation, groups
        )
        y = operators.bn_add_relu_apply(z, bn_weight, bn_bias, mean, var, residual, eps, relu)
        if running_mean is not None and running_var is not None:
            _update_running(running_mean, running_var, mean, var, momentum, count)
        return y
    z = F.conv2d(x, conv_weight, conv_bias, stride, padding, dilation, groups)
    return bn_add_relu(
        z,
        bn_weight,
        bn_bias,
        running_mean,
        running_var,
        residual,
        training=training,
        momentum=momentum,
        eps=eps,
        relu=relu,
    )


def conv_bn_relu_maxpool(
    x: Tensor,
    conv_weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    conv_bias: Tensor | None = None,
    stride: IntOrPair = 2,
    padding: IntOrPair = 3,
    dilation: IntOrPair = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    pool_kernel: IntOrPair = 3,
    pool_stride: IntOrPair = 2,
    pool_padding: IntOrPair = 1,
) -> Tensor:
    r"""The stem of a ResNet: convolution, batch norm, ReLU and max-pool.

    .. math:: y = \mathrm{maxpool}(\max(0,\;
        \gamma (w * x + b - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta))

    In inference one kernel keeps the rows of the large map that a pooled row needs in the cache and
    never writes the map; when a gradient is wanted, or in training, the pool follows
    :func:`conv_bn_add_relu` as an operation of its own.

    Args:
        x: ``(N, C, H, W)``; float32, float64, bfloat16 or float16.
        conv_weight: As in :func:`conv_bn_add_relu`, and so all up to ``eps``.
        bn_weight: See there.
        bn_bias: See there.
        running_mean: See there.
        running_var: See there.
        conv_bias: See there.
        stride: See there.
        padding: See there.
        dilation: See there.
        groups: See there.
        training: See there.
        momentum: See there.
        eps: See there.
        pool_kernel: Window of the max-pool, an int or ``(height, width)``.
        pool_stride: Its step.
        pool_padding: Its padding with minus infinity, at most half the window.

    Returns:
        ``(N, K, PH, PW)``, dtype and memory format of ``x``.

    Raises:
        ValueError: As :func:`conv_bn_add_relu`; a pool window larger than the padded map, or
            padding of more than half of it.
        TypeError: Wrong dtype.

    Source:
        He et al., 2015, table 1.
    """
    op = "conv_bn_relu_maxpool"
    checks.feature_map(op, "x", x)
    x, conv_weight, conv_bias = _autocast(x, conv_weight, conv_bias)
    shape, stride, padding, dilation = _check_conv(
        op, x, conv_weight, conv_bias, stride, padding, dilation, groups
    )
    _check_bn(op, x, shape[1], bn_weight, bn_bias, running_mean, running_var)
    pool = checks.pool(op, shape, pool_kernel, pool_stride, pool_padding)

    backend = select(op, x)
    one_pass = backend != "reference" and not training
    if one_pass and not _wants_grad(x, conv_weight, conv_bias, bn_weight, bn_bias):
        checks.statistics(op, running_mean, running_var, training, 0, shape)
        arguments = (
            x, conv_weight, conv_bias, bn_weight, bn_bias, running_mean, running_var, stride,
            padding, dilation, groups, eps, *pool,
        )  # fmt: skip
        backend = chosen(op, backend, arguments)
        return OPERATORS[backend].conv_bn_relu_maxpool(*arguments)
    y = conv_bn_add_relu(
        x,
        conv_weight,
        bn_weight,
        bn_bias,
        running_mean,
        running_var,
        conv_bias=conv_bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        training=training,
        momentum=momentum,
        eps=eps,
    )
    return F.max_pool2d(y, *pool)


def _autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast what ``conv2d`` would cast; batch norm's parameters stay as they are."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype is torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _check_conv(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: IntOrPair,
    padding: IntOrPair,
    dilation: IntOrPair,
    groups: int,
) -> tuple[tuple[int, ...], Pair, Pair, Pair]:
    """The shape of the result, and stride, padding and dilation as pairs."""
    geometry = (
        checks.pair(op, "stride", stride, 1),
        checks.pair(op, "padding", padding, 0),
        checks.pair(op, "dilation", dilation, 1),
    )
    return checks.convolution(op, x, weight, bias, *geometry, groups), *geometry


def _check_bn(
    op: str,
    x: Tensor,
    channels: int,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
) -> None:
    checks.channel_vector(op, "bn_weight", weight, channels, x)
    checks.channel_vector(op, "bn_bias", bias, channels, x)
    checks.channel_vector(op, "running_mean", running_mean, channels, x)
    checks.channel_vector(op, "running_var", running_var, channels, x)


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


@torch.no_grad()
def _update_running(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    momentum: float,
    count: int,
) -> None:
    """``running = (1 - momentum) * running + momentum * batch``, the variance made unbiased."""
    if count == 0:  # an empty batch has no statistics
        return
    # Not seen by autograd, as in PyTorch: a call of the same batch norm that PyTorch ran before has
    # saved these tensors for its backward, which does not use them.
    running_mean, running_var = running_mean.data, running_var.data
    running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
    running_var.mul_(1 - momentum).add_(var, alpha=momentum * count / (count - 1))
