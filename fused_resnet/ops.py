"""The operations as functions: checks, the choice of a backend, and the call. Nothing else.

Arguments follow :func:`torch.nn.functional.batch_norm` and :func:`torch.nn.functional.conv2d`.
All are differentiable in every floating-point argument but the running statistics, work under
``torch.compile(fullgraph=True)``, ``torch.export`` and autocast, and keep the memory format they
are given (channels_last is the fast one). Arithmetic is at least float32 for float32, bfloat16 and
float16 tensors and float64 for float64; a result is rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, reference
from .backends import current_backend, select
from .checks import Pair
from .reference import IntOrPair

_compiled = torch.ops.fused_resnet


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

    if select(op, x) == "reference":
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
    y, mean, var = _compiled.bn_add_relu(
        x, bn_weight, bn_bias, running_mean, running_var, residual, training, eps, relu
    )
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
    the convolution is PyTorch's and what follows is :func:`bn_add_relu`. Where the ``cuda`` backend
    was asked for by name it is ours, and leaves the statistics as it goes.

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
        return _compiled.conv_bn_add_relu(
            x,
            conv_weight,
            conv_bias,
            bn_weight,
            bn_bias,
            running_mean,
            running_var,
            residual,
            stride,
            padding,
            dilation,
            groups,
            eps,
            relu,
        )
    if backend == "cuda" and current_backend() == "cuda":
        z, mean, var = _compiled.conv_statistics(
            x, conv_weight, conv_bias, stride, padding, dilation, groups
        )
        y = _compiled.bn_add_relu_given(z, bn_weight, bn_bias, mean, var, residual, eps, relu)
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

    one_pass = select(op, x) != "reference" and not training
    if one_pass and not _wants_grad(x, conv_weight, conv_bias, bn_weight, bn_bias):
        checks.statistics(op, running_mean, running_var, training, 0, shape)
        return _compiled.conv_bn_relu_maxpool(
            x,
            conv_weight,
            conv_bias,
            bn_weight,
            bn_bias,
            running_mean,
            running_var,
            stride,
            padding,
            dilation,
            groups,
            eps,
            *pool,
        )
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


def pack_conv_weight(weight: Tensor, groups: int = 1) -> Tensor:
    """Lay a convolution's weight out for this machine's kernels.

    Args:
        weight: ``(K, C / groups, kh, kw)`` on the CPU or on CUDA; float32, bfloat16, float16 or
            float64.
        groups: Number of independent groups of channels.

    Returns:
        A vector whose layout depends on the device and the instruction set in use: rebuild it, do
        not ship it. On the CPU bfloat16 and float16 are packed as float32; on CUDA as they are.

    Raises:
        ValueError: Wrong rank, or groups that do not divide K.
        TypeError: Wrong dtype.
    """
    return _compiled.pack_conv_weight(weight, groups)


def unpack_conv_weight(
    packed: Tensor, weight_shape: tuple[int, int, int, int], groups: int = 1
) -> Tensor:
    """The exact inverse of :func:`pack_conv_weight`.

    Args:
        packed: What :func:`pack_conv_weight` returned on this machine.
        weight_shape: ``(K, C / groups, kh, kw)``.
        groups: As it was packed.

    Returns:
        The weight, in the dtype that it was packed in.

    Raises:
        ValueError: ``packed`` does not belong to that shape.
    """
    return _compiled.unpack_conv_weight(packed, weight_shape, groups)


def transform_conv_weight(
    weight: Tensor, *, stride: IntOrPair = 1, dilation: IntOrPair = 1, groups: int = 1
) -> Tensor:
    r"""Transform a 3x3 weight for Winograd's algorithm :math:`F(4 \times 4, 3 \times 3)`.

    .. math:: U = G g G^T

    for each filter :math:`g`, computed in float64 and stored in float32: 36 numbers for its 9.

    Args:
        weight: ``(K, C, 3, 3)`` on the CPU, float32.
        stride: Of the convolution; the algorithm is for 1.
        dilation: Of the convolution; the algorithm is for 1.
        groups: Of the convolution; the algorithm is for 1.

    Returns:
        A vector in this machine's layout; an empty one where the algorithm does not apply: another
        dtype, kernel, stride, dilation or number of groups, or channels that do not fill vectors.

    Raises:
        ValueError: Wrong rank, or groups that do not divide K.

    Source:
        Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015.
    """
    op = "transform_conv_weight"
    return _compiled.transform_conv_weight(
        weight,
        checks.pair(op, "stride", stride, 1),
        checks.pair(op, "dilation", dilation, 1),
        groups,
    )


def conv_bn_add_relu_packed(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    *,
    transformed: Tensor | None = None,
    weight_shape: tuple[int, int, int, int],
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    relu: bool = True,
) -> Tensor:
    r"""Inference with a packed weight and a folded batch norm; no gradient.

    .. math:: y = \max(0,\; \mathrm{scale} \cdot (w * x) + \mathrm{shift} + r)

    Args:
        x: ``(N, C, H, W)``; float32, bfloat16, float16, and on the CPU float64.
        packed: From :func:`pack_conv_weight`.
        scale: ``(K,)``, float32 (float64 for float64 ``x``).
        shift: As ``scale``.
        residual: Shape and dtype of the result, or None.
        transformed: From :func:`transform_conv_weight`: Winograd's algorithm then runs where it is
            the faster way, with a relative error of about 1e-6. None or empty: the direct sum.
        weight_shape: ``(K, C / groups, kh, kw)`` of the weight that was packed.
        stride: Of the convolution, an int or ``(height, width)``.
        padding: Zeros on each side, an int or ``(height, width)``.
        dilation: Distance between taps, an int or ``(height, width)``.
        groups: Number of independent groups of channels.
        relu: False leaves the maximum out.

    Returns:
        ``(N, K, OH, OW)``, dtype of ``x``, channels_last.

    Raises:
        ValueError: Shapes that do not fit each other.
        TypeError: Wrong dtype.
    """
    op = "conv_bn_add_relu_packed"
    return _compiled.conv_bn_add_relu_packed(
        x,
        packed,
        scale,
        shift,
        residual,
        transformed,
        weight_shape,
        checks.pair(op, "stride", stride, 1),
        checks.pair(op, "padding", padding, 0),
        checks.pair(op, "dilation", dilation, 1),
        groups,
        relu,
    )


def conv_bn_relu_maxpool_packed(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    weight_shape: tuple[int, int, int, int],
    stride: IntOrPair = 2,
    padding: IntOrPair = 3,
    dilation: IntOrPair = 1,
    groups: int = 1,
    pool_kernel: IntOrPair = 3,
    pool_stride: IntOrPair = 2,
    pool_padding: IntOrPair = 1,
) -> Tensor:
    r"""The stem with a packed weight and a folded batch norm; no gradient.

    .. math:: y = \mathrm{maxpool}(\max(0,\; \mathrm{scale} \cdot (w * x) + \mathrm{shift}))

    Args:
        x: As in :func:`conv_bn_add_relu_packed`, and so all up to ``groups``.
        packed: See there.
        scale: See there.
        shift: See there.
        weight_shape: See there.
        stride: See there.
        padding: See there.
        dilation: See there.
        groups: See there.
        pool_kernel: Window of the max-pool, an int or ``(height, width)``.
        pool_stride: Its step.
        pool_padding: Its padding with minus infinity, at most half the window.

    Returns:
        ``(N, K, PH, PW)``, dtype of ``x``, channels_last.

    Raises:
        ValueError: Shapes that do not fit each other.
        TypeError: Wrong dtype.
    """
    op = "conv_bn_relu_maxpool_packed"
    return _compiled.conv_bn_relu_maxpool_packed(
        x,
        packed,
        scale,
        shift,
        weight_shape,
        checks.pair(op, "stride", stride, 1),
        checks.pair(op, "padding", padding, 0),
        checks.pair(op, "dilation", dilation, 1),
        groups,
        checks.pair(op, "pool_kernel", pool_kernel, 1),
        checks.pair(op, "pool_stride", pool_stride, 1),
        checks.pair(op, "pool_padding", pool_padding, 0),
    )


def residual_block(
    x: Tensor,
    packed: Sequence[Tensor],
    scale: Sequence[Tensor],
    shift: Sequence[Tensor],
    *,
    joined: Tensor | None = None,
    joined_shift: Tensor | None = None,
    bottleneck: bool,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    r"""A whole frozen residual block; no gradient.

    .. math:: y = \max(0,\; f_n(\max(0, f_{n-1}(\dots \max(0, f_1(x))))) + s(x))

    with :math:`f_i(h) = \mathrm{scale}_i (w_i * h) + \mathrm{shift}_i`. A basic block has two 3x3
    convolutions, the stride on the first; a bottleneck has 1x1, 3x3 and 1x1, the stride, dilation
    and groups on the 3x3. The shortcut :math:`s` is the identity, or a 1x1 convolution with the
    stride and its affine step.

    On CUDA a bottleneck of 64 or 128 middle channels, in float16 and bfloat16, runs its last two
    convolutions as one kernel that keeps what is between them on chip.

    Args:
        x: ``(N, C, H, W)`` on the CPU or on CUDA.
        packed: From :func:`pack_conv_weight`, for each convolution of the block in order, and then
            for the shortcut's if it has one.
        scale: ``(K,)`` of each; float32 (float64 for float64 ``x``).
        shift: As ``scale``.
        joined: On CUDA, the weights of the last convolution and of the shortcut, each times its
            scale, one filter of both after another: the two then run as one sum. None: two.
        joined_shift: The sum of their shifts.
        bottleneck: Which kind of block.
        stride: Of the block, in both directions.
        dilation: Of a bottleneck's 3x3.
        groups: Of a bottleneck's 3x3.

    Returns:
        ``(N, K, OH, OW)``, dtype of ``x``, channels_last.

    Raises:
        ValueError: A wrong number of tensors, or shapes that do not fit each other.
        TypeError: Wrong dtype.

    Source:
        He et al., 2015, figure 5; the position of the stride is torchvision's.
    """
    return _compiled.residual_block(
        x, packed, scale, shift, joined, joined_shift, bottleneck, stride, dilation, groups
    )


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
    running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
    running_var.mul_(1 - momentum).add_(var, alpha=momentum * count / (count - 1))
