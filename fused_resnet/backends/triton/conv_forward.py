"""A convolution between two batch norms: it applies the first and starts the second one.

The kernel is :mod:`._conv_kernels`' with its prologue and its statistics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..activation import Activation
from ._common import check_map
from ._conv_call import Affine, BatchNorm, ConvCall, filters
from ._conv_plan import ConvConfig
from ._training_operands import check_together, nothing, parameter_operand, vector_operand
from .bn_coefficients import bn_coefficients, bn_update_running
from .conv_around_pytorch import conv_around_pytorch


def _call(
    op: str,
    x: Tensor,
    x_scale: Tensor | None,
    x_shift: Tensor | None,
    weight: Tensor,
    geometry: tuple[Sequence[int], Sequence[int], Sequence[int], int],
    activation: int,
) -> ConvCall:
    check_map(op, "x", x)
    check_together(op, x_scale=x_scale, x_shift=x_shift)
    prologue = tuple(
        vector_operand(op, name, v, x.shape[1], x)
        for name, v in (("x_scale", x_scale), ("x_shift", x_shift))
    )
    return ConvCall(
        op,
        x,
        filters(op, weight, x),
        list(weight.shape),
        geometry,
        Affine(),
        ("",) * 5,
        prologue=(prologue[0], prologue[1]),
        activation=Activation.NONE,
        in_activation=activation,
    )


def conv_forward(
    x: Tensor,
    x_scale: Tensor | None,
    x_shift: Tensor | None,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    statistics: bool,
    winograd: bool,
    activation: int = Activation.RELU,
    *,
    pytorch: bool = False,
    config: ConvConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""A convolution of a map that is normalised while it is read, and its batch statistics.

    :math:`z = w * p(x)`, :math:`p(x) = \max(0, x \cdot \mathrm{scale} + \mathrm{shift})`.

    Args:
        x: Input, ``(N, C, H, W)``; float32, float16 or bfloat16; channels_last is not copied.
        x_scale: Scale of :math:`p`, ``(C,)`` float32; None means :math:`p(x) = x`.
        x_shift: Shift of :math:`p`, ``(C,)`` float32, there when ``x_scale`` is.
        weight: Filters :math:`w`, ``(K, C / groups, kh, kw)``, dtype of ``x``.
        stride: Stride of the convolution, ``(height, width)``.
        padding: Zeros on each side of :math:`p(x)`, ``(height, width)``.
        dilation: Distance between the filter's taps, ``(height, width)``.
        groups: Number of independent groups of channels.
        statistics: Whether mean and variance are wanted.
        winograd: Has no effect; an option of the CPU's kernels.
        activation: Activation that :math:`p` applies.
        pytorch: Whether PyTorch's convolution runs between our passes.
        config: Forces a configuration, of which split_k is ignored with statistics; None chooses
            one.

    Returns:
        :math:`z`, ``(N, K, OH, OW)``, channels_last; its mean and its biased variance, ``(K,)``
        float32, empty when they are not wanted.

    Raises:
        ValueError: Wrong rank, shape or device, or half of a prologue.
        TypeError: Wrong dtype.
    """
    geometry = (stride, padding, dilation, groups)
    call = _call("conv_forward", x, x_scale, x_shift, weight, geometry, activation)
    if pytorch:
        return conv_around_pytorch(call, weight, statistics)
    if not statistics:
        return call.run(config), nothing(x), nothing(x)
    return call.run_with_statistics(config)


def conv_bn_forward(
    x: Tensor,
    x_scale: Tensor | None,
    x_shift: Tensor | None,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    momentum: float,
    eps: float,
    winograd: bool,
    activation: int = Activation.RELU,
    *,
    pytorch: bool = False,
    config: ConvConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    r""":func:`conv_forward` with statistics, and the numbers of the batch norm that follows.

    The kernel that finishes the statistics computes scale and shift, updates the running statistics
    and counts the batch: no further launch, and no copy of a parameter in another dtype.

    Args:
        x: Input, ``(N, C, H, W)``; float32, float16 or bfloat16, with elements; channels_last is
            not copied.
        x_scale: Scale of :math:`p`, ``(C,)`` float32; None means :math:`p(x) = x`.
        x_shift: Shift of :math:`p`, ``(C,)`` float32, there when ``x_scale`` is.
        weight: Filters :math:`w`, ``(K, C / groups, kh, kw)``, dtype of ``x``.
        bn_weight: Weight of the batch norm, ``(K,)``, any float; None means 1.
        bn_bias: Bias of the batch norm, ``(K,)``, any float; None means 0.
        running_mean: Running mean, ``(K,)``, any float, written to; None for none.
        running_var: Running variance, ``(K,)``, any float, written to; there when ``running_mean``
            is.
        batches: ``int64`` scalar, counted up; None for none.
        stride: Stride of the convolution, ``(height, width)``.
        padding: Zeros on each side of :math:`p(x)`, ``(height, width)``.
        dilation: Distance between the filter's taps, ``(height, width)``.
        groups: Number of independent groups of channels.
        momentum: Weight of the batch in the running statistics.
        eps: Added to the variance.
        winograd: Has no effect; an option of the CPU's kernels.
        activation: Activation that :math:`p` applies.
        pytorch: Whether PyTorch's convolution runs between our passes.
        config: Forces a configuration, of which split_k is ignored; None chooses one.

    Returns:
        :math:`z`, ``(N, K, OH, OW)``, channels_last; its mean and biased variance, and scale and
        shift of the batch norm, ``(K,)`` float32.

    Raises:
        ValueError: Wrong rank, shape or device, half of a prologue or of the running statistics, or
            a single value per channel.
        TypeError: Wrong dtype.
    """
    op = "conv_bn_forward"
    geometry = (stride, padding, dilation, groups)
    call = _call(op, x, x_scale, x_shift, weight, geometry, activation)
    s = call.shape
    if s.rows < 2:
        raise ValueError(f"{op}: x: expected more than 1 value per channel, got {list(x.shape)}")
    check_together(op, running_mean=running_mean, running_var=running_var)
    named = {
        "bn_weight": bn_weight,
        "bn_bias": bn_bias,
        "running_mean": running_mean,
        "running_var": running_var,
    }
    gamma, beta, means, variances = (
        parameter_operand(op, name, v, s.k, x) for name, v in named.items()
    )
    # Where the running statistics have gaps, what is in ``means`` and ``variances`` is a copy.
    in_kernel = not pytorch and means is running_mean and variances is running_var
    if in_kernel:
        scale, shift = (torch.empty((s.k,), dtype=torch.float32, device=x.device) for _ in range(2))
        norm = BatchNorm(scale, shift, gamma, beta, means, variances, batches, eps, momentum)
        return (*call.run_with_statistics(config, norm), scale, shift)
    if pytorch:
        z, mean, var = conv_around_pytorch(call, weight, True)
    else:
        z, mean, var = call.run_with_statistics(config)
    if running_mean is not None and running_var is not None:
        bn_update_running(mean, var, running_mean, running_var, momentum, s.rows)
    if batches is not None:
        batches.add_(1)
    return z, mean, var, *bn_coefficients(mean, var, gamma, beta, eps)
