"""Convolution, batch norm, residual and ReLU in one kernel; see :mod:`._conv_kernels` for it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch._prims_common import suggest_memory_format

from ._common import check_map
from ._conv_call import BATCH_NORM, FOLDED, Affine, ConvCall, Second, filters
from ._conv_plan import ConvConfig


def conv_bn_add_relu(
    x: Tensor,
    weight: Tensor,
    conv_bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    eps: float,
    activation: int,
    *,
    config: ConvConfig | None = None,
) -> Tensor:
    r""":math:`y = \max(0, \gamma (w * x + b - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta + r)`.

    Args:
        x: Input, ``(N, C, H, W)``; float32, float16 or bfloat16; channels_last is not copied.
        weight: Filters :math:`w`, ``(K, C / groups, kh, kw)``, dtype of ``x``.
        conv_bias: Bias :math:`b`, ``(K,)``, any float; None means 0.
        bn_weight: Scale :math:`\gamma`, ``(K,)``, any float; None means 1.
        bn_bias: Shift :math:`\beta`, ``(K,)``, any float; None means 0.
        mean: Running mean :math:`\mu`, ``(K,)``, any float.
        var: Running variance :math:`\sigma^2`, ``(K,)``, any float.
        residual: Map that is added, :math:`r`, shape of the result, dtype of ``x``; None means 0.
        stride: Stride of the convolution, ``(height, width)``.
        padding: Zeros on each side, ``(height, width)``.
        dilation: Distance between the filter's taps, ``(height, width)``.
        groups: Number of independent groups of channels.
        eps: Added to the variance.
        activation: Activation that is applied to the sum.
        config: Forces a configuration; None chooses one.

    Returns:
        ``(N, K, OH, OW)``, dtype and memory format of ``x``.

    Raises:
        ValueError: Wrong rank, shape or device, or a kernel larger than the padded map.
        TypeError: Wrong dtype.
    """
    op = "conv_bn_add_relu"
    check_map(op, "x", x)
    call = ConvCall(
        op,
        x,
        filters(op, weight, x),
        weight.shape,
        (stride, padding, dilation, groups),
        Affine(conv_bias, bn_weight, bn_bias, mean, var, eps),
        BATCH_NORM,
        residual,
        activation=activation,
    )
    return call.run(config).contiguous(memory_format=suggest_memory_format(x))


def conv_bn_add_relu_packed(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: int,
    winograd: bool = False,
    *,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    config: ConvConfig | None = None,
) -> Tensor:
    r""":math:`y = \max(0, \mathrm{scale} \cdot (w * x) + \mathrm{shift} + r)`, NHWC.

    Args:
        x: Input, ``(N, C, H, W)``; float32, float16 or bfloat16; channels_last is not copied.
        packed: The filters as a vector, [k][kh][kw][c / groups], dtype of ``x``.
        scale: Scale of each output channel, ``(K,)``, any float.
        shift: Shift of each output channel, ``(K,)``, any float.
        residual: Map that is added, :math:`r`, shape of the result, dtype of ``x``; None means 0.
        weight_shape: Shape of the weight that was packed, ``(K, C / groups, kh, kw)``.
        stride: Stride of the convolution, ``(height, width)``.
        padding: Zeros on each side, ``(height, width)``.
        dilation: Distance between the filter's taps, ``(height, width)``.
        groups: Number of independent groups of channels.
        activation: Activation that is applied to the sum.
        winograd: Has no effect; an option of the CPU's kernels.
        residual_scale: Scale of the residual, ``(K,)``, any float, where the residual is a map
            before its own batch norm; None means 1.
        residual_shift: Shift of the residual, ``(K,)``, any float; None without
            ``residual_scale``.
        config: Forces a configuration; None chooses one.

    Returns:
        ``(N, K, OH, OW)``, dtype of ``x``, channels_last.

    Raises:
        ValueError: Wrong rank, shape or device, or a kernel larger than the padded map.
        TypeError: Wrong dtype.
    """
    call = ConvCall(
        "conv_bn_add_relu_packed",
        x,
        packed,
        weight_shape,
        (stride, padding, dilation, groups),
        Affine(weight=scale, bias=shift),
        FOLDED,
        residual,
        residual_affine=(residual_scale, residual_shift),
        activation=activation,
    )
    return call.run(config)


def conv_conv_add_relu_packed(
    x: Tensor,
    x2: Tensor,
    packed: Tensor,
    shift: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    stride2: Sequence[int],
    activation: int,
    *,
    config: ConvConfig | None = None,
) -> Tensor:
    r""":math:`y = \max(0, w * x + w_2 * x_2 + \mathrm{shift})` as one sum, NHWC.

    Args:
        x: Input, ``(N, C, H, W)``; float32, float16 or bfloat16; channels_last is not copied.
        x2: Input of the 1x1 convolution :math:`w_2`, ``(N, C2, H2, W2)``, dtype of ``x``.
        packed: Filters as a vector: for each output channel the filter of :math:`w` as [kh][kw][c],
            followed by that of :math:`w_2`, both multiplied by their scales.
        shift: Shift of each output channel, ``(K,)``, any float.
        weight_shape: Shape of :math:`w`, ``(K, C, kh, kw)``.
        stride: Stride of :math:`w`, ``(height, width)``.
        padding: Zeros on each side of ``x``, ``(height, width)``.
        dilation: Distance between the taps of :math:`w`, ``(height, width)``.
        stride2: Stride of :math:`w_2`, ``(height, width)``.
        activation: Activation that is applied to the sum.
        config: Forces a configuration; None chooses one.

    Returns:
        ``(N, K, OH, OW)``, dtype of ``x``, channels_last.

    Raises:
        ValueError: Wrong rank, shape or device, or a kernel larger than the padded map.
        TypeError: Wrong dtype.
    """
    call = ConvCall(
        "conv_conv_add_relu_packed",
        x,
        packed,
        weight_shape,
        (stride, padding, dilation, 1),
        Affine(bias=shift),
        FOLDED,
        second=Second(x2, (stride2[0], stride2[1])),
        activation=activation,
    )
    return call.run(config)
