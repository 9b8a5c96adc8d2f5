"""Operators of exported frozen models: they take weights in PyTorch's layout.

A packed weight belongs to one instruction set, and an exported program may run on other machines.
So ``torch.export`` of a frozen model records these operators in place of those of
:mod:`fused_resnet.ops.packed`: under the same names, with the plain weight, which the program
stores as a constant. Where the program runs, the weight is packed at its first call and cached for
the weight's lifetime. The operators are ``torch.ops.fused_resnet_export``, which exist once the
package is imported.
"""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import Library, register_fake
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from .. import _C, ops
from ..backends import reference
from ..backends.availability import resolve_backend
from ..ops import packed as packed_ops
from ..ops.fakes import FAKES

if TYPE_CHECKING:
    from .frozen_conv import FrozenConv

_GEOMETRY = "int[2] stride, int[2] padding, int[2] dilation, int groups"
_library = Library("fused_resnet_export", "DEF")
_library.define(
    "conv_bn_add_relu(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, "
    f"{_GEOMETRY}, bool relu, bool winograd) -> Tensor"
)
_library.define(
    "conv_bn_relu_maxpool(Tensor x, Tensor weight, Tensor scale, Tensor shift, "
    f"{_GEOMETRY}, int[2] pool_kernel, int[2] pool_stride, int[2] pool_padding) -> Tensor"
)
_library.define(
    "residual_block(Tensor x, Tensor[] weight, Tensor[] scale, Tensor[] shift, "
    "bool bottleneck, int stride, int dilation, int groups, bool winograd) -> Tensor"
)
_library.define("global_avg_pool(Tensor x) -> Tensor")
_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


# Functions that a frozen model calls during an export


def is_exporting() -> bool:
    """Whether a program is being exported.

    In torch 2.11 ``torch.compiler.is_exporting()`` is true in every trace of the compiler.
    """
    return torch.compiler._is_exporting_flag


def conv_bn_add_relu_packed(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    *,
    weight_shape: tuple[int, ...],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    relu: bool,
    winograd: bool,
) -> Tensor:
    """:func:`fused_resnet.ops.conv_bn_add_relu_packed` of a weight that is not packed."""
    geometry = (stride, padding, dilation, groups)
    if resolve_backend("conv_bn_add_relu_packed", x) == "reference":
        return reference.conv_affine_add_relu(
            x, weight, scale, shift, residual, *geometry, relu=relu
        )
    return torch.ops.fused_resnet_export.conv_bn_add_relu(
        x, weight, scale, shift, residual, *geometry, relu, winograd
    )


def conv_bn_relu_maxpool_packed(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    weight_shape: tuple[int, ...],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    pool_kernel: Any,
    pool_stride: Any,
    pool_padding: Any,
) -> Tensor:
    """:func:`fused_resnet.ops.conv_bn_relu_maxpool_packed` of a weight that is not packed."""
    geometry = (stride, padding, dilation, groups)
    pool = (pool_kernel, pool_stride, pool_padding)
    if resolve_backend("conv_bn_relu_maxpool_packed", x) == "reference":
        y = reference.conv_affine_add_relu(x, weight, scale, shift, None, *geometry)
        return F.max_pool2d(y, *pool)
    return torch.ops.fused_resnet_export.conv_bn_relu_maxpool(
        x, weight, scale, shift, *geometry, *((v, v) if isinstance(v, int) else v for v in pool)
    )


def run_residual_block(backend: str, x: Tensor, operands: tuple[Any, ...]) -> Tensor:
    """:func:`fused_resnet.packed_ops.run_residual_block` of weights that are not packed."""
    weight, scale, shift, _, _, *settings = operands  # a trace concatenates no weights
    return torch.ops.fused_resnet_export.residual_block(x, weight, scale, shift, *settings)


def global_avg_pool(x: Tensor) -> Tensor:
    """:func:`fused_resnet.ops.packed.global_avg_pool`."""
    return torch.ops.fused_resnet_export.global_avg_pool(x)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`fused_resnet.ops.packed.linear`."""
    return torch.ops.fused_resnet_export.linear(x, weight, bias)


#: The plain weight of a packed one, while a trace or a program refers to it: a module that is
#: called twice becomes one constant.
_PLAIN: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def plain_weight(conv: FrozenConv) -> Tensor:
    """The weight in PyTorch's layout, for a program to store: a real tensor also in a trace.

    Args:
        conv: The frozen convolution.
    """
    cached = _PLAIN.get(conv.packed)
    plain: Tensor | None = cached() if cached is not None else None
    if plain is None:
        with _disable_current_modes():
            plain = conv.weight
        _PLAIN[conv.packed] = weakref.ref(plain)
    return plain


# The operators


def _conv_bn_add_relu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    relu: bool,
    winograd: bool,
) -> Tensor:
    return ops.conv_bn_add_relu_packed(
        x,
        packed(weight, x.dtype, groups),
        scale,
        shift,
        residual,
        weight_shape=tuple(weight.shape),  # type: ignore[arg-type]
        stride=tuple(stride),  # type: ignore[arg-type]
        padding=tuple(padding),  # type: ignore[arg-type]
        dilation=tuple(dilation),  # type: ignore[arg-type]
        groups=groups,
        relu=relu,
        winograd=winograd,
    )


def _conv_bn_relu_maxpool(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    pool_kernel: list[int],
    pool_stride: list[int],
    pool_padding: list[int],
) -> Tensor:
    return ops.conv_bn_relu_maxpool_packed(
        x,
        packed(weight, x.dtype, groups),
        scale,
        shift,
        weight_shape=tuple(weight.shape),  # type: ignore[arg-type]
        stride=tuple(stride),  # type: ignore[arg-type]
        padding=tuple(padding),  # type: ignore[arg-type]
        dilation=tuple(dilation),  # type: ignore[arg-type]
        groups=groups,
        pool_kernel=tuple(pool_kernel),  # type: ignore[arg-type]
        pool_stride=tuple(pool_stride),  # type: ignore[arg-type]
        pool_padding=tuple(pool_padding),  # type: ignore[arg-type]
    )


def _residual_block(
    x: Tensor,
    weight: list[Tensor],
    scale: list[Tensor],
    shift: list[Tensor],
    bottleneck: bool,
    stride: int,
    dilation: int,
    groups: int,
    winograd: bool,
) -> Tensor:
    middle = 1 if bottleneck else 0  # the convolution that has the groups
    return ops.residual_block(
        x,
        [packed(w, x.dtype, groups if i == middle else 1) for i, w in enumerate(weight)],
        scale,
        shift,
        bottleneck=bottleneck,
        stride=stride,
        dilation=dilation,
        groups=groups,
        winograd=winograd,
    )


for _name, _kernel in (
    ("conv_bn_add_relu", _conv_bn_add_relu),
    ("conv_bn_relu_maxpool", _conv_bn_relu_maxpool),
    ("residual_block", _residual_block),
    ("global_avg_pool", packed_ops.global_avg_pool),
    ("linear", packed_ops.linear),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")


@register_fake("fused_resnet_export::conv_bn_add_relu")
def _(x, weight, scale, shift, residual, stride, padding, dilation, groups, relu, winograd):  # type: ignore[no-untyped-def]
    return FAKES["conv_bn_add_relu_packed"](
        x, None, scale, shift, residual, weight.shape, stride, padding, dilation, groups, relu
    )


@register_fake("fused_resnet_export::conv_bn_relu_maxpool")
def _(x, weight, scale, shift, *geometry_and_pool):  # type: ignore[no-untyped-def]
    return FAKES["conv_bn_relu_maxpool_packed"](
        x, None, scale, shift, weight.shape, *geometry_and_pool
    )


@register_fake("fused_resnet_export::residual_block")
def _(x, weight, scale, shift, bottleneck, stride, dilation, groups, winograd):  # type: ignore[no-untyped-def]
    return FAKES["residual_block"](
        x, None, scale, shift, None, None, bottleneck, stride, dilation, groups, winograd
    )


@register_fake("fused_resnet_export::global_avg_pool")
def _(x):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:2], 1, 1))


@register_fake("fused_resnet_export::linear")
def _(x, weight, bias):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], weight.shape[0]))


# Packed weights

#: By plain weight: (version at packing, dtype, groups) and the packed weight.
_PACKED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_warned = False


def packed(weight: Tensor, dtype: torch.dtype, groups: int) -> Tensor:
    """The weight in the layout of this process's kernels, cached until the weight changes.

    Args:
        weight: ``(K, C / groups, kh, kw)``, float32, float64, bfloat16 or float16. One that was
            created under ``torch.inference_mode`` has no version counter, and is packed at every
            call, with one warning.
        dtype: The dtype of the feature maps.
        groups: Number of independent groups of channels.
    """
    if weight.is_inference():
        _warn_about_inference_mode()
        return _pack(weight, dtype, groups)
    state = (weight._version, dtype, groups)
    cached = _PACKED.get(weight)
    if cached is None or cached[0] != state:
        cached = (state, _pack(weight, dtype, groups))
        _PACKED[weight] = cached
    return cached[1]


def packed_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of a packed weight: that of the maps on CUDA, on the CPU as its instructions allow.

    Args:
        dtype: The dtype of the feature maps.
        device: The device of the weight.
    """
    return dtype if device.type == "cuda" else _C.packed_conv_weight_dtype(dtype)


def _pack(weight: Tensor, dtype: torch.dtype, groups: int) -> Tensor:
    return ops.pack_conv_weight(weight.to(packed_dtype(dtype, weight.device)), groups)


def _warn_about_inference_mode() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            "fused_resnet: an exported model was loaded under torch.inference_mode, so its weights "
            "are packed at every call; load it outside, and call it under inference_mode",
            stacklevel=3,
        )
