"""The operations of frozen networks: packed weights, folded batch norms, no gradient.

They are part of :mod:`fused_resnet.ops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C
from ..backends import composed_block, reference
from ..backends.activation import Activation, ActivationLike, choose
from ..backends.availability import resolve_backend
from ..backends.reference import IntOrPair
from . import checks
from .checks import Pair
from .dispatch import fastest_backend
from .program_steps import Step, encode
from .registry import OPERATORS, packers


def pack_conv_weight(weight: Tensor, groups: int = 1) -> Tensor:
    """Pack a convolution's weight into the layout of this machine's kernels.

    Args:
        weight: Filters of the convolution, ``(K, C / groups, kh, kw)`` on the CPU or on CUDA;
            float32, bfloat16, float16 or float64.
        groups: Number of independent groups of channels.

    Returns:
        A vector whose layout depends on the device and the instruction set in use, so it must not
        be stored. Its dtype is that of ``weight`` on CUDA, and on the CPU if the kernels multiply
        in that dtype; else it is float32: for float16, and for bfloat16 without AMX and AVX512-BF16
        (the instruction sets ``amx`` and ``avx512_bf16`` of :func:`fused_resnet.build_info`).

    Raises:
        ValueError: Wrong rank, or groups that do not divide K.
        TypeError: Wrong dtype.
    """
    return packers(weight.device).pack_conv_weight(weight, groups)


def unpack_conv_weight(
    packed: Tensor, weight_shape: tuple[int, int, int, int], groups: int = 1
) -> Tensor:
    """The exact inverse of :func:`pack_conv_weight`.

    Args:
        packed: The result of :func:`pack_conv_weight` on this machine.
        weight_shape: Shape of the weight that was packed, ``(K, C / groups, kh, kw)``.
        groups: Number of groups that the weight was packed for.

    Returns:
        The weight, ``weight_shape``, in the dtype of ``packed``.

    Raises:
        ValueError: ``packed`` does not belong to that shape.
    """
    return packers(packed.device).unpack_conv_weight(packed, weight_shape, groups)


def packed_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of a packed weight: that of the maps on CUDA, on the CPU as its instructions allow.

    Args:
        dtype: The dtype of the feature maps.
        device: The device of the weight.
    """
    return dtype if device.type == "cuda" else _C.packed_conv_weight_dtype(dtype)


def conv_bn_add_relu_packed(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    *,
    weight_shape: tuple[int, int, int, int],
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    relu: bool = True,
    winograd: bool = False,
    activation: ActivationLike = None,
) -> Tensor:
    r"""Inference with a packed weight and a folded batch norm; no gradient.

    .. math:: y = \max(0,\; \mathrm{scale} \cdot (w * x) + \mathrm{shift} + r)

    Args:
        x: Input, ``(N, C, H, W)``; float32, bfloat16, float16, and on the CPU float64.
        packed: Filters :math:`w` in the dtype of ``x``, from :func:`pack_conv_weight`.
        scale: Scale of each output channel, ``(K,)``, float32 (float64 for float64 ``x``).
        shift: Shift of each output channel, ``(K,)``, float32 (float64 for float64 ``x``).
        residual: Map that is added, :math:`r`, shape and dtype of the result; None means 0.
        weight_shape: Shape of the weight that was packed, ``(K, C / groups, kh, kw)``.
        stride: Stride of the convolution, an int or ``(height, width)``.
        padding: Zeros on each side, an int or ``(height, width)``.
        dilation: Distance between the filter's taps, an int or ``(height, width)``.
        groups: Number of independent groups of channels.
        relu: Whether to apply ReLU to the sum.
        winograd: Whether a 3x3 convolution of stride 1 may use Winograd's algorithm on the CPU
            where that is faster: in float32 arithmetic, with a relative error of about 1e-6 before
            the result is rounded to its dtype; never for float64.
        activation: What is applied to the sum, ``"none"``, ``"relu"`` or ``"leaky_relu"`` (slope
            0.01); None for what ``relu`` says.

    Returns:
        ``(N, K, OH, OW)``, dtype of ``x``, channels_last.

    Raises:
        ValueError: Shapes that do not fit each other; no such activation, or ``relu=False`` beside
            one.
        TypeError: Wrong dtype.

    Source:
        Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015.
    """
    op = "conv_bn_add_relu_packed"
    act = choose(op, relu, activation)
    geometry = (
        checks.pair(op, "stride", stride, 1),
        checks.pair(op, "padding", padding, 0),
        checks.pair(op, "dilation", dilation, 1),
        groups,
    )
    backend = resolve_backend(op, x)
    if backend == "reference":
        return _conv_reference(x, packed, scale, shift, residual, weight_shape, *geometry, act)
    arguments = (
        x, packed, scale, shift, residual, weight_shape, *geometry, act, winograd,
    )  # fmt: skip
    backend = fastest_backend(op, backend, arguments)
    return OPERATORS[backend].conv_bn_add_relu_packed(*arguments)


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
    activation: ActivationLike = None,
) -> Tensor:
    r"""The stem with a packed weight and a folded batch norm; no gradient.

    .. math:: y = \mathrm{maxpool}(\max(0,\; \mathrm{scale} \cdot (w * x) + \mathrm{shift}))

    Args:
        x: Image, ``(N, C, H, W)``; float32, bfloat16, float16, and on the CPU float64.
        packed: Filters :math:`w` in the dtype of ``x``, from :func:`pack_conv_weight`.
        scale: Scale of each output channel, ``(K,)``, float32 (float64 for float64 ``x``).
        shift: Shift of each output channel, ``(K,)``, float32 (float64 for float64 ``x``).
        weight_shape: Shape of the weight that was packed, ``(K, C / groups, kh, kw)``.
        stride: Stride of the convolution, an int or ``(height, width)``.
        padding: Zeros on each side of ``x``, an int or ``(height, width)``.
        dilation: Distance between the filter's taps, an int or ``(height, width)``.
        groups: Number of independent groups of channels.
        pool_kernel: Window of the max-pool, an int or ``(height, width)``.
        pool_stride: Stride of the max-pool, an int or ``(height, width)``.
        pool_padding: Padding of the max-pool with minus infinity on each side, an int or
            ``(height, width)``; at most half the window.
        activation: What is applied in front of the pool, ``"none"``, ``"relu"`` or
            ``"leaky_relu"`` (slope 0.01); None for ReLU.

    Returns:
        ``(N, K, PH, PW)``, dtype of ``x``, channels_last.

    Raises:
        ValueError: Shapes that do not fit each other; no such activation.
        TypeError: Wrong dtype.
    """
    op = "conv_bn_relu_maxpool_packed"
    act = choose(op, True, activation)
    geometry = (
        checks.pair(op, "stride", stride, 1),
        checks.pair(op, "padding", padding, 0),
        checks.pair(op, "dilation", dilation, 1),
        groups,
    )
    pool = (
        checks.pair(op, "pool_kernel", pool_kernel, 1),
        checks.pair(op, "pool_stride", pool_stride, 1),
        checks.pair(op, "pool_padding", pool_padding, 0),
    )
    backend = resolve_backend(op, x)
    if backend == "reference":
        y = _conv_reference(x, packed, scale, shift, None, weight_shape, *geometry, act)
        return F.max_pool2d(y, *pool)
    arguments = (x, packed, scale, shift, weight_shape, *geometry, *pool, act)
    backend = fastest_backend(op, backend, arguments)
    return OPERATORS[backend].conv_bn_relu_maxpool_packed(*arguments)


def residual_block(
    x: Tensor,
    packed: Sequence[Tensor],
    scale: Sequence[Tensor],
    shift: Sequence[Tensor],
    *,
    concatenated: Tensor | None = None,
    concatenated_shift: Tensor | None = None,
    bottleneck: bool,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    winograd: bool = False,
    activation: ActivationLike = None,
) -> Tensor:
    r"""A whole frozen residual block; no gradient.

    .. math:: y = \max(0,\; f_n(\max(0, f_{n-1}(\dots \max(0, f_1(x))))) + s(x))

    with :math:`f_i(h) = \mathrm{scale}_i (w_i * h) + \mathrm{shift}_i`. A basic block has two 3x3
    convolutions, the stride on the first; a bottleneck has 1x1, 3x3 and 1x1, the stride, dilation
    and groups on the 3x3. The shortcut :math:`s` is the identity, or a 1x1 convolution with the
    stride and its affine step.

    On the CPU the batch goes through the block in micro-batches that stay in the cache, and the
    maps between the convolutions are in scratch memory that the next block reuses. On CUDA a
    bottleneck of 64 or 128 middle channels, in float16 and bfloat16, runs its last two convolutions
    as one kernel, with the map between them in shared memory.

    Args:
        x: Input, ``(N, C, H, W)``, on the CPU or on CUDA.
        packed: Filters of each convolution from :func:`pack_conv_weight`: the main branch's in
            order, followed by the shortcut's if it has one.
        scale: Scale of each convolution's output channels, ``(K,)``, in the order of ``packed``;
            float32 (float64 for float64 ``x``).
        shift: Shift of each convolution's output channels, ``(K,)``, in the order of ``packed``;
            float32 (float64 for float64 ``x``).
        concatenated: On CUDA, the filters of the last convolution and of the shortcut, multiplied
            by their scales and concatenated along the input channels, so that both run as one
            GEMM; None runs two convolutions.
        concatenated_shift: The sum of the shifts of these two, ``(K,)``; None without
            ``concatenated``.
        bottleneck: Whether the block is a bottleneck rather than a basic block.
        stride: Stride of the block in both directions.
        dilation: Distance between the taps of a bottleneck's 3x3 filters.
        groups: Number of independent groups of channels of a bottleneck's 3x3 convolution.
        winograd: Whether a 3x3 convolution of stride 1 may use Winograd's algorithm on the CPU: in
            float32 arithmetic, with a relative error of about 1e-6 before the result is rounded to
            its dtype; never for float64.
        activation: Activation after each convolution of the block but the shortcut's, ``"none"``,
            ``"relu"`` or ``"leaky_relu"`` (slope 0.01); None for ReLU.

    Returns:
        ``(N, K, OH, OW)``, dtype of ``x``, channels_last.

    Raises:
        ValueError: A wrong number of tensors, or shapes that do not fit each other; no such
            activation.
        TypeError: Wrong dtype.

    Source:
        He et al., "Deep Residual Learning for Image Recognition", 2015, figure 5; the stride is
        where torchvision has it.
    """
    act = choose("residual_block", True, activation)
    backend = resolve_backend("residual_block", x)
    if backend == "reference":
        return composed_block.residual_block(
            _conv_reference, x, packed, scale, shift, bottleneck, stride, dilation, groups,
            act,
        )  # fmt: skip
    operands = (
        list(packed), list(scale), list(shift), concatenated, concatenated_shift,
        bottleneck, stride, dilation, groups, winograd, act,
    )  # fmt: skip
    return run_residual_block(backend, x, operands)


def run_residual_block(backend: str, x: Tensor, operands: tuple[Any, ...]) -> Tensor:
    """Call the operator ``residual_block`` of a backend, or of the fastest one under ``auto``.

    Args:
        backend: The result of :func:`.resolve_backend`, which must not be ``"reference"``.
        x: Input, ``(N, C, H, W)``.
        operands: The operator's arguments after ``x``, in the order of its schema.
    """
    arguments = (x, *operands)
    backend = fastest_backend("residual_block", backend, arguments)
    return OPERATORS[backend].residual_block(*arguments)


def global_avg_pool(x: Tensor) -> Tensor:
    """The average of each channel, with the bits that a program's step has on the CPU.

    Args:
        x: Map to average, ``(N, C, H, W)``.

    Returns:
        ``(N, C, 1, 1)``.
    """
    if x.device.type != "cpu":
        return F.adaptive_avg_pool2d(x, 1)
    return _run_step(x, Step("global_avg_pool", 0), [])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A fully connected layer, with the bits that a program's step has on the CPU.

    Args:
        x: Input, ``(N, C, 1, 1)`` or ``(N, C)``.
        weight: Weight of the layer, ``(K, C)``.
        bias: Bias of the layer, ``(K,)``; None for zeros.

    Returns:
        ``(N, K)``.
    """
    if x.device.type != "cpu":
        return F.linear(x.flatten(1), weight, bias)
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    step = Step("linear", 0, tensor=0, out_channels=weight.shape[0])
    return _run_step(x if x.dim() == 4 else x[:, :, None, None], step, [weight, bias])


def _run_step(x: Tensor, step: Step, tensors: list[Tensor]) -> Tensor:
    outputs: list[Tensor] = OPERATORS["cpu"].run_program(x, tensors, encode([step]), [1])
    return outputs[0]


def _conv_reference(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    weight_shape: tuple[int, int, int, int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    activation: Activation,
) -> Tensor:
    """The operator ``conv_bn_add_relu_packed`` in plain PyTorch, with the same arguments."""
    weight = unpack_conv_weight(packed, weight_shape, groups)
    geometry = (stride, padding, dilation, groups)
    return reference.conv_affine_add_relu(
        x, weight, scale, shift, residual, *geometry, activation=activation
    )
