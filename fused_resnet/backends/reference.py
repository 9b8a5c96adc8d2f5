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
    """``relu(batch_norm(x) [+ residual])``, with the arguments of ``ops``."""
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
    """``relu(batch_norm(conv2d(x, w)) [+ residual])``, with the arguments of ``ops``."""
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
    """``max_pool2d(relu(batch_norm(conv2d(x, w))))``, with the arguments of ``ops``."""
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
    """``relu(conv2d(x, w) * scale + shift + residual)``, computed in the dtype of ``scale``.

    The formula of ``ops.conv_bn_add_relu_packed``, with the weight in PyTorch's layout.
    """
    y = F.conv2d(x.to(scale.dtype), weight.to(scale.dtype), None, stride, padding, dilation, groups)
    y = y * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    if residual is not None:
        y = y + residual
    return activate(y, choose("conv_affine_add_relu", relu, activation)).to(x.dtype)
