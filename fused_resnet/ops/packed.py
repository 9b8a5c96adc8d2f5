"""The operations that a frozen network is made of: weights packed, batch norms folded, no gradient.

They are part of :mod:`fused_resnet.ops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..backends import composed_block, reference
from ..backends.availability import resolve_backend
from ..backends.reference import IntOrPair
from . import checks
from .checks import Pair
from .dispatch import fastest_backend
from .registry import OPERATORS, packers


def pack_conv_weight(weight: Tensor, groups: int = 1) -> Tensor:
    """Lay a convolution's weight out for this machine's kernels.

    Args:
        weight: ``(K, C / groups, kh, kw)`` on the CPU or on CUDA; float32, bfloat16, float16 or
            float64.
        groups: Number of independent groups of channels.

    Returns:
        A vector whose layout depends on the device and the instruction set in use: rebuild it, do
        not ship it. On CUDA the dtype is kept, on the CPU too where the kernels multiply in it;
        else it is float32: for float16, and for bfloat16 without AMX and AVX512-BF16 (the
        instruction sets ``amx`` and ``avx512_bf16`` of :func:`fused_resnet.build_info`).

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
        packed: What :func:`pack_conv_weight` returned on this machine.
        weight_shape: ``(K, C / groups, kh, kw)``.
        groups: As it was packed.

    Returns:
        The weight, in the dtype that it was packed in.

    Raises:
        ValueError: ``packed`` does not belong to that shape.
    """
    return packers(packed.device).unpack_conv_weight(packed, weight_shape, groups)


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
) -> Tensor:
    r"""Inference with a packed weight and a folded batch norm; no gradient.

    .. math:: y = \max(0,\; \mathrm{scale} \cdot (w * x) + \mathrm{shift} + r)

    Args:
        x: ``(N, C, H, W)``; float32, bfloat16, float16, and on the CPU float64.
        packed: From :func:`pack_conv_weight`, of a weight in the dtype of ``x``.
        scale: ``(K,)``, float32 (float64 for float64 ``x``).
        shift: As ``scale``.
        residual: Shape and dtype of the result, or None.
        weight_shape: ``(K, C / groups, kh, kw)`` of the weight that was packed.
        stride: Of the convolution, an int or ``(height, width)``.
        padding: Zeros on each side, an int or ``(height, width)``.
        dilation: Distance between taps, an int or ``(height, width)``.
        groups: Number of independent groups of channels.
        relu: False leaves the maximum out.
        winograd: Whether a 3x3 convolution of stride 1 may run by Winograd's algorithm on the CPU
            where it is the faster way: in float32 arithmetic, with a relative error of about 1e-6
            before the result is rounded to its dtype; not in float64.

    Returns:
        ``(N, K, OH, OW)``, dtype of ``x``, channels_last.

    Raises:
        ValueError: Shapes that do not fit each other.
        TypeError: Wrong dtype.

    Source:
        Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015.
    """
    op = "conv_bn_add_relu_packed"
    geometry = (
        checks.pair(op, "stride", stride, 1),
        checks.pair(op, "padding", padding, 0),
        checks.pair(op, "dilation", dilation, 1),
        groups,
    )
    backend = resolve_backend(op, x)
    if backend == "reference":
        return _conv_reference(x, packed, scale, shift, residual, weight_shape, *geometry, relu)
    arguments = (
        x, packed, scale, shift, residual, weight_shape, *geometry, relu, winograd,
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
        y = _conv_reference(x, packed, scale, shift, None, weight_shape, *geometry, True)
        return F.max_pool2d(y, *pool)
    arguments = (x, packed, scale, shift, weight_shape, *geometry, *pool)
    backend = fastest_backend(op, backend, arguments)
    return OPERATORS[backend].conv_bn_relu_maxpool_packed(*arguments)


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
    winograd: bool = False,
) -> Tensor:
    r"""A whole frozen residual block; no gradient.

    .. math:: y = \max(0,\; f_n(\max(0, f_{n-1}(\dots \max(0, f_1(x))))) + s(x))

    with :math:`f_i(h) = \mathrm{scale}_i (w_i * h) + \mathrm{shift}_i`. A basic block has two 3x3
    convolutions, the stride on the first; a bottleneck has 1x1, 3x3 and 1x1, the stride, dilation
    and groups on the 3x3. The shortcut :math:`s` is the identity, or a 1x1 convolution with the
    stride and its affine step.

    On the CPU the batch goes through the block in parts that stay in the cache, and what is between
    the convolutions lies in memory that the next block uses again. On CUDA a bottleneck of 64 or
    128 middle channels, in float16 and bfloat16, runs its last two convolutions as one kernel that
    keeps what is between them on chip.

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
        winograd: On the CPU, whether a 3x3 of stride 1 may run by Winograd's algorithm: in float32
            arithmetic, with a relative error of about 1e-6 before rounding; not in float64.

    Returns:
        ``(N, K, OH, OW)``, dtype of ``x``, channels_last.

    Raises:
        ValueError: A wrong number of tensors, or shapes that do not fit each other.
        TypeError: Wrong dtype.

    Source:
        He et al., 2015, figure 5; the position of the stride is torchvision's.
    """
    backend = resolve_backend("residual_block", x)
    if backend == "reference":
        return composed_block.residual_block(
            _conv_reference, x, packed, scale, shift, bottleneck, stride, dilation, groups
        )
    operands = (
        list(packed), list(scale), list(shift), joined, joined_shift, bottleneck, stride, dilation,
        groups, winograd,
    )  # fmt: skip
    return run_residual_block(backend, x, operands)


def run_residual_block(backend: str, x: Tensor, operands: tuple[Any, ...]) -> Tensor:
    """:func:`residual_block` on a backend that has it as an operator.

    Args:
        backend: What :func:`resolve_backend` says, and not ``"reference"``.
        x: See there.
        operands: The operator's own arguments behind ``x``, in its order.
    """
    arguments = (x, *operands)
    backend = fastest_backend("residual_block", backend, arguments)
    return OPERATORS[backend].residual_block(*arguments)


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
    relu: bool,
) -> Tensor:
    """In PyTorch, arguments as those of the operator ``conv_bn_add_relu_packed``."""
    weight = unpack_conv_weight(packed, weight_shape, groups)
    geometry = (stride, padding, dilation, groups)
    return reference.conv_affine_add_relu(x, weight, scale, shift, residual, *geometry, relu=relu)
