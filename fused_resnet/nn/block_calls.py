"""Running a residual block in training: forward and backward of the block in one node.

Which blocks can is decided in :mod:`.groups` by the modules; here by the tensors of a call. As in
:mod:`.group_calls` the live modules are read at every call and nothing is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.availability import is_exporting
from ..ops.checks import DTYPES
from ..ops.program_shapes import windows
from ..ops.training_spec import Layer, LayerTensors, Unit
from ..ops.training_tuned import unit_backend
from ..ops.training_unit import is_transformed, training_unit
from .groups import decide_residual_block
from .module_kinds import (
    PackedConv,
    eps_of,
    is_observed,
    padding_of,
    running_statistics,
    tensor_of,
    uses_batch_statistics,
)
from .no_grad_block import run_no_grad_block
from .sync_batch_norm import group_of

#: Tensors whose class changes nothing.
_PLAIN = (Tensor, nn.Parameter)


def run_residual_block(
    owner: nn.Module,
    x: Tensor,
    convs: Sequence[Any],
    norms: Sequence[Any],
    acts: Sequence[nn.Module | None],
    others: Sequence[nn.Module] = (),
    shortcut: str = "identity",
    zeros: tuple[int, int] = (0, 1),
) -> Tensor | None:
    """A block's result, if the block runs as one training unit.

    Args:
        owner: The block; has the settings of :func:`fused_resnet.fuse`.
        x: Input of the block.
        convs: The block's own convolutions in order, and then the shortcut's, if that is a
            projection.
        norms: The normalisation after each convolution.
        acts: The activation after each of its own convolutions; None where it is inside the
            normalisation.
        others: Further modules that the block calls.
        shortcut: One of :data:`fused_resnet.ops.training_spec.SHORTCUTS`; a block with one
            convolution more than activations has a projection whatever is said here.
        zeros: Channels of zeros on each side, and the stride, of the shortcut ``"zeros"``.

    Returns:
        None in inference, and where the block's groups must run one by one.
    """
    if is_observed(x) or not isinstance(x, Tensor):
        return None
    if any(isinstance(conv, PackedConv) for conv in convs):
        return None
    learns = any(map(uses_batch_statistics, norms))
    learns = learns or (_wants_grad(x, convs, norms) and not torch.jit.is_tracing())
    if not (learns or (owner.training and not _is_recorded())):
        return None
    decision = decide_residual_block(convs, norms, acts, others)
    if not decision.operation:
        return None
    if len(convs) > len(acts):
        shortcut = "projection"
    backend = _backend(x)
    if not backend:
        return None
    layers = [_layer(conv, norm) for conv, norm in zip(convs, norms, strict=True)]
    tensors = [_tensors(conv, norm) for conv, norm in zip(convs, norms, strict=True)]
    if any(layer.group for layer in layers) and not _may_exchange(x):
        return None
    if not _fits(x, layers, tensors, len(acts), shortcut, zeros):
        return None
    winograd = getattr(owner, "fused_resnet_winograd", True)
    if not learns:
        if backend != "cpu" or shortcut not in ("identity", "projection"):
            return None
        return run_no_grad_block(x, layers, tensors, len(acts), decision.activation, winograd)
    unit = Unit(
        tuple(layers),
        shortcut,
        zeros,
        decision.activation,
        recompute=getattr(owner, "fused_resnet_recompute", False),
        winograd=winograd,
        backend=backend,
    )
    return training_unit(unit, x, None, tensors)


def training_format(x: Tensor) -> Tensor:
    """The input of a network in channels_last, the memory format of its training units.

    A unit keeps the format that it is given: a network of them that is given another would convert
    between every two.

    Args:
        x: Input of the network, ``(N, C, H, W)``.

    Returns:
        ``x`` itself where it is channels_last already, or no unit runs.
    """
    if not isinstance(x, Tensor) or is_observed(x) or x.dim() != 4 or x.dtype not in DTYPES:
        return x
    # torch.jit.trace compares its graph with one that it makes without gradients.
    if not torch.is_grad_enabled() or torch.jit.is_tracing() or not _backend(x):
        return x
    return x.contiguous(memory_format=torch.channels_last)


def _is_recorded() -> bool:
    """Whether the calls are written down for another machine, whose kernels pack differently."""
    return torch.jit.is_tracing() or is_exporting()


def _wants_grad(x: Tensor, convs: Sequence[Any], norms: Sequence[Any]) -> bool:
    if not torch.is_grad_enabled():
        return False
    if x.requires_grad or any(tensor_of(conv, "weight").requires_grad for conv in convs):
        return True
    affine = (tensor_of(norm, name) for norm in norms for name in ("weight", "bias"))
    return any(p is not None and p.requires_grad for p in affine)


def _backend(x: Tensor) -> str:
    """The backend of a unit; empty where the block's groups run one by one."""
    if not torch.compiler.is_compiling() and is_transformed():
        return ""
    return unit_backend(x)


def _may_exchange(x: Tensor) -> bool:
    """Whether a call's unit may exchange statistics with other processes by itself.

    Where it is traced, or the batch is empty, PyTorch's own modules do.
    """
    return x.numel() > 0 and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def _fits(
    x: Tensor,
    layers: Sequence[Layer],
    tensors: Sequence[LayerTensors],
    length: int,
    shortcut: str,
    zeros: tuple[int, int],
) -> bool:
    """Whether the tensors of a call are what a unit takes: it neither casts nor broadcasts.

    Where they are not, PyTorch's operators cast, broadcast or say what is wrong.
    """
    dtype, device = x.dtype, x.device
    if x.dim() != 4 or dtype not in DTYPES or type(x) not in _PLAIN:
        return False
    cast = device.type != "meta" and torch.is_autocast_enabled(device.type)
    cast = cast and dtype is not torch.float64
    if cast and dtype is not torch.get_autocast_dtype(device.type):
        return False
    of_vectors = (dtype, torch.float64 if dtype is torch.float64 else torch.float32)
    for t in tensors:
        weight = t.weight
        if weight.device != device or type(weight) not in _PLAIN:
            return False
        if weight.dtype is not dtype and (not cast or weight.dtype is torch.float64):
            return False
        for vector in t[1:5]:
            if vector is not None and vector.dtype not in of_vectors:
                return False
    size = _size_after(layers[:length], tensors, x)
    if shortcut == "projection":
        side = _size_after(layers[length:], tensors[length:], x)
    elif shortcut == "zeros":
        pixels = windows(x.shape, (1, 1), (zeros[1], zeros[1]), (0, 0))
        side = [x.shape[1] + 2 * zeros[0], *pixels]
    else:
        side = list(x.shape[1:])
    return size is not None and (shortcut == "none" or size == side)


def _size_after(
    layers: Sequence[Layer], tensors: Sequence[LayerTensors], x: Tensor
) -> list[int] | None:
    """``[K, H, W]`` after a chain of convolutions; None where one does not take its input."""
    shape = list(x.shape)
    for layer, t in zip(layers, tensors, strict=False):
        if t.weight.shape[1] * layer.groups != shape[1]:
            return None
        pixels = windows(shape, t.weight.shape[2:], *layer[:3])
        if min(pixels) < 1:
            return None
        shape = [shape[0], t.weight.shape[0], *pixels]
    return shape[1:]


def _layer(conv: Any, norm: Any) -> Layer:
    padding = padding_of(conv)
    assert padding is not None
    batch = uses_batch_statistics(norm)
    momentum = norm.momentum if batch else None
    return Layer(
        conv.stride, padding, conv.dilation, conv.groups, eps_of(norm), momentum, batch,
        group_of(norm),
    )  # fmt: skip


def _tensors(conv: Any, norm: Any) -> LayerTensors:
    return LayerTensors(
        tensor_of(conv, "weight"),
        tensor_of(norm, "weight"),
        tensor_of(norm, "bias"),
        *running_statistics(norm),
    )
