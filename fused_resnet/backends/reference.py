"""Every operation in plain PyTorch: the truth in float64, and the ``reference`` backend.

Nothing here is fused. Each function defines its operation by the calls that an unfused model makes,
in the same order, so autograd, double backward, ``torch.compile`` and all devices work. The
signatures are those of :mod:`fused_resnet.ops`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .activation import ActivationLike, activate, choose

IntOrPair = int | tuple[int, int]


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
    activation: ActivationLike = None,
) -> Tensor:
    r"""Batch norm, an optional residual and ReLU, as three calls of PyTorch.

    .. math:: y = \max(0,\; \gamma (x - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta + r)

    In inference :math:`\mu` and :math:`\sigma^2` are the running statistics; in training they are
    the mean and the biased variance of the batch.

    Args:
        x: Input, ``(N, C, H, W)``, any floating-point dtype.
        bn_weight: Scale :math:`\gamma`, ``(C,)``, dtype of ``x`` or float32; None means 1.
        bn_bias: Shift :math:`\beta`, ``(C,)``, dtype of ``x`` or float32; None means 0.
        running_mean: Running mean, ``(C,)``, updated in place when training; None when no running
            statistics are kept.
        running_var: Running (unbiased) variance, ``(C,)``, updated in place when training; None
            when no running statistics are kept.
        residual: Map that is added, :math:`r`, shape and dtype of ``x``; None means 0.
        training: Normalise with the statistics of the batch and update the running ones.
        momentum: Weight of the batch in the running statistics.
        eps: Added to the variance.
        relu: Whether to apply ReLU to the sum.
        activation: What is applied to the sum, ``"none"``, ``"relu"`` or ``"leaky_relu"`` (slope
            0.01); None for what ``relu`` says.

    Returns:
        ``(N, C, H, W)``, dtype and memory format of ``x``.

    Raises:
        ValueError: No such activation, or ``relu=False`` beside one.
    """
    y = F.batch_norm(x, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
    if residual is not None:
        y = y + residual
    return activate(y, choose("bn_add_relu", relu, activation))


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
    activation: ActivationLike = None,
) -> Tensor:
    r"""Convolution, batch norm, an optional residual and ReLU, as four calls of PyTorch.

    .. math:: y = \max(0,\; \gamma (w * x + b - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta + r)

    Args:
        x: Input, ``(N, C, H, W)``, any floating-point dtype.
        conv_weight: Filters :math:`w`, ``(K, C / groups, kh, kw)``, dtype of ``x``.
        bn_weight: Scale :math:`\gamma`, ``(K,)``, dtype of ``x`` or float32; None means 1.
        bn_bias: Shift :math:`\beta`, ``(K,)``, dtype of ``x`` or float32; None means 0.
        running_mean: Running mean, ``(K,)``, updated in place when training; None when no running
            statistics are kept.
        running_var: Running (unbiased) variance, ``(K,)``, updated in place when training; None
            when no running statistics are kept.
        residual: Map that is added, :math:`r`, shape and dtype of the result; None means 0.
        conv_bias: Bias of the convolution :math:`b`, ``(K,)``; None means 0.
        stride: Stride of the convolution, an int or ``(height, width)``.
        padding: Zeros on each side, an int or ``(height, width)``.
        dilation: Distance between the filter's taps, an int or ``(height, width)``.
        groups: Number of independent groups of channels.
        training: Normalise with the statistics of the batch and update the running ones.
        momentum: Weight of the batch in the running statistics.
        eps: Added to the variance.
        relu: Whether to apply ReLU to the sum.
        activation: What is applied to the sum, ``"none"``, ``"relu"`` or ``"leaky_relu"`` (slope
            0.01); None for what ``relu`` says.

    Returns:
        ``(N, K, OH, OW)``, dtype of ``x``.

    Raises:
        ValueError: No such activation, or ``relu=False`` beside one.
    """
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
        activation=activation,
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
    activation: ActivationLike = None,
) -> Tensor:
    r"""The stem of a ResNet: convolution, batch norm, ReLU and max-pool, as four calls of PyTorch.

    .. math:: y = \mathrm{maxpool}(\max(0,\;
        \gamma (w * x + b - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta))

    Args:
        x: Input, ``(N, C, H, W)``, any floating-point dtype.
        conv_weight: Filters :math:`w`, ``(K, C / groups, kh, kw)``, dtype of ``x``.
        bn_weight: Scale :math:`\gamma`, ``(K,)``, dtype of ``x`` or float32; None means 1.
        bn_bias: Shift :math:`\beta`, ``(K,)``, dtype of ``x`` or float32; None means 0.
        running_mean: Running mean, ``(K,)``, updated in place when training; None when no running
            statistics are kept.
        running_var: Running (unbiased) variance, ``(K,)``, updated in place when training; None
            when no running statistics are kept.
        conv_bias: Bias of the convolution :math:`b`, ``(K,)``; None means 0.
        stride: Stride of the convolution, an int or ``(height, width)``.
        padding: Zeros on each side of ``x``, an int or ``(height, width)``.
        dilation: Distance between the filter's taps, an int or ``(height, width)``.
        groups: Number of independent groups of channels.
        training: Normalise with the statistics of the batch and update the running ones.
        momentum: Weight of the batch in the running statistics.
        eps: Added to the variance.
        pool_kernel: Window of the max-pool, an int or ``(height, width)``.
        pool_stride: Stride of the max-pool, an int or ``(height, width)``.
        pool_padding: Padding of the max-pool with minus infinity on each side, an int or
            ``(height, width)``; at most half the window.
        activation: What is applied in front of the pool, ``"none"``, ``"relu"`` or
            ``"leaky_relu"`` (slope 0.01); None for ReLU.

    Returns:
        ``(N, K, PH, PW)``, dtype of ``x``.

    Raises:
        ValueError: No such activation.
    """
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
        activation=activation,
    )
    return F.max_pool2d(y, pool_kernel, pool_stride, pool_padding)


def conv_affine_add_relu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    *,
    relu: bool = True,
    activation: ActivationLike = None,
) -> Tensor:
    r"""Convolution with a folded batch norm, an optional residual and ReLU.

    .. math:: y = \max(0,\; \mathrm{scale} \cdot (w * x) + \mathrm{shift} + r)

    The formula of ``ops.conv_bn_add_relu_packed``, with the weight in PyTorch's layout. All of it
    is computed in the dtype of ``scale``, and the result is rounded to that of ``x``.

    Args:
        x: Input, ``(N, C, H, W)``, any floating-point dtype.
        weight: Filters :math:`w`, ``(K, C / groups, kh, kw)``, any floating-point dtype.
        scale: Scale of each output channel, ``(K,)``; its dtype is that of the arithmetic.
        shift: Shift of each output channel, ``(K,)``, dtype of ``scale``.
        residual: Map that is added, :math:`r`, shape and dtype of the result; None means 0.
        stride: Stride of the convolution, an int or ``(height, width)``.
        padding: Zeros on each side, an int or ``(height, width)``.
        dilation: Distance between the filter's taps, an int or ``(height, width)``.
        groups: Number of independent groups of channels.
        relu: Whether to apply ReLU to the sum.
        activation: What is applied to the sum, ``"none"``, ``"relu"`` or ``"leaky_relu"`` (slope
            0.01); None for what ``relu`` says.

    Returns:
        ``(N, K, OH, OW)``, dtype of ``x``.

    Raises:
        ValueError: No such activation, or ``relu=False`` beside one.
    """
    y = F.conv2d(x.to(scale.dtype), weight.to(scale.dtype), None, stride, padding, dilation, groups)
    y = y * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    if residual is not None:
        y = y + residual
    return activate(y, choose("conv_affine_add_relu", relu, activation)).to(x.dtype)
