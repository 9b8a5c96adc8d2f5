"""The public operations: argument checks, the choice of a backend, and the call.

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

from ..backends import reference
from ..backends.activation import ActivationLike, choose
from ..backends.availability import current_backend, is_exporting, resolve_backend
from ..backends.reference import IntOrPair
from . import checks
from .checks import Pair
from .dispatch import (
    CheckedCall,
    call_key,
    call_operator,
    checked_call,
    fastest_backend,
    overload_of,
    remember_call,
)
from .memory_format import with_plain_strides
from .packed import (
    conv_bn_add_relu_packed,
    conv_bn_relu_maxpool_packed,
    pack_conv_weight,
    residual_block,
    unpack_conv_weight,
)
from .registry import OPERATORS
from .training_bn import training_bn_add_relu
from .training_layer import update_running
from .training_spec import Layer, LayerTensors, Unit
from .training_tuned import unit_backend
from .training_unit import is_transformed, training_unit

#: A max-pool's window in a unit: the place of its largest value is kept in a byte.
_MOST_PLACES = 255

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
    activation: ActivationLike = None,
) -> Tensor:
    r"""Batch norm, an optional residual and ReLU in one pass over memory.

    .. math:: y = \max(0,\; \gamma (x - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta + r)

    In inference :math:`\mu` and :math:`\sigma^2` are the running statistics. In training they are
    the mean and the biased variance of the batch, and the running statistics are updated:
    ``running = (1 - momentum) * running + momentum * batch``, with the unbiased variance.

    Args:
        x: Input, ``(N, C, H, W)``; float32, float64, bfloat16 or float16.
        bn_weight: Scale :math:`\gamma`, ``(C,)``, dtype of ``x`` or float32; None means 1.
        bn_bias: Shift :math:`\beta`, ``(C,)``, dtype of ``x`` or float32; None means 0.
        running_mean: Running mean, ``(C,)``, updated in place when training; None when no running
            statistics are kept.
        running_var: Running (unbiased) variance, ``(C,)``, updated in place when training; None
            when no running statistics are kept.
        residual: Map that is added, :math:`r`, shape and dtype of ``x``; None means 0.
        training: Normalise with the statistics of the batch and update the running ones.
        momentum: Weight of the batch in the running statistics.
        eps: Added to the variance; positive when training.
        relu: Whether to apply ReLU to the sum.
        activation: What is applied to the sum, ``"none"``, ``"relu"`` or ``"leaky_relu"`` (slope
            0.01); None for what ``relu`` says.

    Returns:
        ``(N, C, H, W)``, dtype and memory format of ``x``.

    Raises:
        ValueError: Wrong rank, shape or device; no running statistics when not training; a single
            value per channel or an ``eps`` that is not positive when training; no such activation,
            or ``relu=False`` beside one.
        TypeError: Wrong dtype.

    Source:
        Ioffe and Szegedy, "Batch Normalization", 2015; He et al., "Deep Residual Learning for Image
        Recognition", 2015. Semantics are those of ``torch.nn.functional.batch_norm``.
    """
    op = "bn_add_relu"
    tensors = (x, bn_weight, bn_bias, running_mean, running_var, residual)
    key = None if training else call_key(op, tensors, (eps, relu, activation))
    known = checked_call(key)
    if known is not None:
        return call_operator(known.operator, (*tensors, *known.settings))[0]
    act = choose(op, relu, activation)
    checks.feature_map(op, "x", x)
    _check_bn(op, x, x.shape[1], bn_weight, bn_bias, running_mean, running_var)
    count = x.shape[0] * x.shape[2] * x.shape[3]
    checks.statistics(op, running_mean, running_var, training, count, tuple(x.shape), eps)
    checks.residual(op, residual, tuple(x.shape), x)

    backend = _resolve(op, x, training)
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
            activation=act,
        )
    x = with_plain_strides(x)
    settings = (training, eps, act)
    arguments = (x, *tensors[1:], *settings)
    backend = fastest_backend(op, backend, arguments)
    if training:
        y = training_bn_add_relu(
            x, bn_weight, bn_bias, running_mean, running_var, residual, momentum, eps, act, backend
        )
    else:
        operator = OPERATORS[backend].bn_add_relu
        y = call_operator(operator, arguments)[0]
        remember_call(key, x.shape, x, CheckedCall(overload_of(operator), settings))
    return with_plain_strides(y)


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
    r"""Convolution, batch norm, an optional residual and ReLU.

    .. math:: y = \max(0,\; \gamma (w * x + b - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta + r)

    In inference one kernel computes all of it: batch norm, residual and ReLU are applied while the
    convolution's result is still in registers. That result is never stored, and the backward pass
    does not need it (:mod:`fused_resnet.ops.autograd`). In training on the CPU, the convolution of
    a channels-last map is a direct sum that computes the batch's statistics in the same pass, and
    its backward applies batch norm's gradient while it reads. Contiguous maps, and CUDA's, take
    PyTorch's convolution in training, followed by :func:`bn_add_relu`; with the backends ``cuda``
    and ``triton``, when forced by name, their own convolution, which computes the statistics in its
    epilogue.

    Args:
        x: Input, ``(N, C, H, W)``; float32, float64, bfloat16 or float16.
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
        eps: Added to the variance; positive when training.
        relu: Whether to apply ReLU to the sum.
        activation: What is applied to the sum, ``"none"``, ``"relu"`` or ``"leaky_relu"`` (slope
            0.01); None for what ``relu`` says.

    Returns:
        ``(N, K, OH, OW)``, dtype and memory format of ``x``.

    Raises:
        ValueError: Wrong rank, shape, channel count or device; a kernel larger than the padded map;
            no running statistics when not training; a single value per channel when training; no
            such activation, or ``relu=False`` beside one.
        TypeError: Wrong dtype.

    Source:
        Ioffe and Szegedy, "Batch Normalization", 2015; He et al., "Deep Residual Learning for Image
        Recognition", 2015. Under autocast ``x`` and ``conv_weight`` are cast as
        ``torch.nn.functional.conv2d`` casts them.
    """
    op = "conv_bn_add_relu"
    tensors = (
        x, conv_weight, conv_bias, bn_weight, bn_bias, running_mean, running_var, residual,
    )  # fmt: skip
    given = (stride, padding, dilation, groups, eps, relu, activation)
    key = None if training else call_key(op, tensors, given)
    known = checked_call(key)
    if known is not None:
        return call_operator(known.operator, (*tensors, *known.settings))
    act = choose(op, relu, activation)
    checks.feature_map(op, "x", x)
    x, conv_weight, conv_bias = _autocast(x, conv_weight, conv_bias)
    shape, stride, padding, dilation = _check_conv(
        op, x, conv_weight, conv_bias, stride, padding, dilation, groups
    )
    _check_bn(op, x, shape[1], bn_weight, bn_bias, running_mean, running_var)
    count = shape[0] * shape[2] * shape[3]
    checks.statistics(op, running_mean, running_var, training, count, shape, eps)
    checks.residual(op, residual, shape, x)

    backend = _resolve(op, x, training)
    if backend != "reference" and not training:
        settings = (stride, padding, dilation, groups, eps, act)
        arguments = (x, conv_weight, conv_bias, *tensors[3:], *settings)
        backend = fastest_backend(op, backend, arguments)
        operator = OPERATORS[backend].conv_bn_add_relu
        y = call_operator(operator, arguments)
        remember_call(key, shape, x, CheckedCall(overload_of(operator), settings))
        return with_plain_strides(y)
    # A contiguous map would be converted twice, to and from channels_last. The backend comes first:
    # under vmap, where it is the reference, no tensor tells its memory format.
    owner = unit_backend(x) if training and backend != "reference" and conv_bias is None else ""
    if owner and x.is_contiguous(memory_format=torch.channels_last):
        layer = Layer(stride, padding, dilation, groups, eps, momentum, True)
        shortcut = "none" if residual is None else "map"
        # Direct sums: the bound of a single operation is 1.5 times PyTorch's error.
        unit = Unit((layer,), shortcut, activation=act, winograd=False, backend=owner)
        of_layer = LayerTensors(conv_weight, bn_weight, bn_bias, running_mean, running_var, None)
        return with_plain_strides(training_unit(unit, x, residual, [of_layer]))
    if current_backend() in ("cuda", "triton") and backend != "reference":
        operators = OPERATORS[backend]
        z, mean, var = operators.conv_statistics(
            x, conv_weight, conv_bias, stride, padding, dilation, groups
        )
        # Before the next operator saves its tensors: checkpointing recomputes no further than that.
        if running_mean is not None and running_var is not None:
            update_running("library", mean, var, running_mean, running_var, momentum, count)
        y = operators.bn_add_relu_apply(z, bn_weight, bn_bias, mean, var, residual, eps, act)
        return with_plain_strides(y)
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
        activation=act,
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
    r"""The stem of a ResNet: convolution, batch norm, ReLU and max-pool.

    .. math:: y = \mathrm{maxpool}(\max(0,\;
        \gamma (w * x + b - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta))

    In inference one kernel keeps only the rows of the convolution's map that a pooled row needs,
    in the cache, and never writes the whole map. In training on the CPU, the normalised map is not
    written either, and the positions of the maxima are saved in a byte each. Otherwise, when a
    gradient is required, :func:`conv_bn_add_relu` runs, followed by PyTorch's max-pool.

    Args:
        x: Input, ``(N, C, H, W)``; float32, float64, bfloat16 or float16.
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
        eps: Added to the variance; positive when training.
        pool_kernel: Window of the max-pool, an int or ``(height, width)``.
        pool_stride: Stride of the max-pool, an int or ``(height, width)``.
        pool_padding: Padding of the max-pool with minus infinity on each side, an int or
            ``(height, width)``; at most half the window.
        activation: What is applied in front of the pool, ``"none"``, ``"relu"`` or
            ``"leaky_relu"`` (slope 0.01); None for ReLU.

    Returns:
        ``(N, K, PH, PW)``, dtype and memory format of ``x``.

    Raises:
        ValueError: Wrong rank, shape, channel count or device; a kernel larger than the padded map;
            no running statistics when not training; a single value per channel when training; a
            pool window larger than the padded map, or padding of more than half the window.
        TypeError: Wrong dtype.

    Source:
        He et al., "Deep Residual Learning for Image Recognition", 2015, table 1.
    """
    op = "conv_bn_relu_maxpool"
    act = choose(op, True, activation)
    checks.feature_map(op, "x", x)
    x, conv_weight, conv_bias = _autocast(x, conv_weight, conv_bias)
    shape, stride, padding, dilation = _check_conv(
        op, x, conv_weight, conv_bias, stride, padding, dilation, groups
    )
    _check_bn(op, x, shape[1], bn_weight, bn_bias, running_mean, running_var)
    pool = checks.pool(op, shape, pool_kernel, pool_stride, pool_padding)

    backend = _resolve(op, x, training)
    one_pass = backend != "reference" and not training
    if one_pass and not _wants_grad(x, conv_weight, conv_bias, bn_weight, bn_bias):
        checks.statistics(op, running_mean, running_var, training, 0, shape, eps)
        arguments = (
            x, conv_weight, conv_bias, bn_weight, bn_bias, running_mean, running_var, stride,
            padding, dilation, groups, eps, *pool, act,
        )  # fmt: skip
        backend = fastest_backend(op, backend, arguments)
        return with_plain_strides(OPERATORS[backend].conv_bn_relu_maxpool(*arguments))
    fits_a_byte = pool[0][0] * pool[0][1] <= _MOST_PLACES
    owner = unit_backend(x) if training and backend != "reference" and conv_bias is None else ""
    if owner and fits_a_byte:
        count = shape[0] * shape[2] * shape[3]
        checks.statistics(op, running_mean, running_var, training, count, shape, eps)
        layer = Layer(stride, padding, dilation, groups, eps, momentum, True)
        unit = Unit((layer,), activation=act, pool=pool, winograd=False, backend=owner)
        tensors = LayerTensors(conv_weight, bn_weight, bn_bias, running_mean, running_var, None)
        return with_plain_strides(training_unit(unit, x, None, [tensors]))
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
        activation=act,
    )
    return F.max_pool2d(y, *pool)


def _autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as ``conv2d`` does under autocast; batch norm's parameters are not cast."""
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


def _resolve(op: str, x: Tensor, training: bool) -> str:
    """The backend of a call; the reference where only PyTorch's own operators can answer it."""
    if torch.compiler.is_compiling():
        # An exported training step is made of PyTorch's operators: it needs no autograd function.
        exported = training and is_exporting()
        return "reference" if exported else resolve_backend(op, x)
    empty = training and x.numel() == 0
    return "reference" if empty or is_transformed() else resolve_backend(op, x)


def _wants_grad(*tensors: Tensor | None) -> bool:
    # torch.jit.trace checks what it recorded by a second trace, and that one without gradients.
    enabled = torch.is_grad_enabled() or torch.jit.is_tracing()
    return enabled and any(t is not None and t.requires_grad for t in tensors)
