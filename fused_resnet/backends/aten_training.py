"""The training primitives by PyTorch's own calls: the ``library`` backend.

Formulas and arguments are those of :mod:`.reference_training`. Maps keep their dtype and are
channels_last; arithmetic per element is that of the per-channel vectors, float32 or float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import _unsafe_preserve_version_counter

from . import reference_training as reference

#: The primitives that are here.
OPERATIONS = (
    "conv_forward",
    "conv_backward",
    "block_end",
    "block_end_backward",
    "bn_coefficients",
    "bn_update_running",
    "bn_backward_coefficients",
    "stem_end",
    "stem_end_backward",
)

bn_coefficients = reference.bn_coefficients
bn_backward_coefficients = reference.bn_backward_coefficients

_AXES = (0, 2, 3)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``x * scale + shift`` in the dtype of the vectors."""
    return torch.addcmul(shift.view(-1, 1, 1), x.to(scale.dtype), scale.view(-1, 1, 1))


def _centered_sum(g: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    return (g * (x - mean.view(-1, 1, 1))).sum(_AXES)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """The prologue as a map of its own, PyTorch's convolution, and one pass for the statistics."""
    x = _channels_last(x)
    if x_scale is not None and x_shift is not None:
        x = _affine(x, x_scale, x_shift).relu_().to(x.dtype)
    z = torch.ops.aten.convolution(
        x, weight, None, stride, padding, dilation, False, [0, 0], groups
    )
    z = _channels_last(z)
    vectors = torch.float64 if x.dtype is torch.float64 else torch.float32
    if not statistics:
        none = torch.empty(0, dtype=vectors, device=x.device)
        return z, none, none.clone()
    var, mean = torch.var_mean(z.to(vectors), _AXES, correction=0)
    return z, mean, var


def block_end(
    z: Tensor,
    scale: Tensor,
    shift: Tensor,
    shortcut: Tensor | None,
    shortcut_scale: Tensor | None,
    shortcut_shift: Tensor | None,
    relu: bool,
) -> Tensor:
    """One PyTorch call for each term, rounded to the dtype of the map at the end."""
    y = _affine(_channels_last(z), scale, shift)
    if shortcut is not None:
        if shortcut_scale is not None and shortcut_shift is not None:
            shortcut = _affine(shortcut, shortcut_scale, shortcut_shift)
        y += shortcut
    if relu:
        y.relu_()
    return y.to(z.dtype)


def block_end_backward(
    dy: Tensor,
    y: Tensor | None,
    z: Tensor,
    mean: Tensor,
    shortcut: Tensor | None,
    shortcut_mean: Tensor | None,
    sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mask, and each sum as a product and a reduction."""
    dy = _channels_last(dy)
    # Not torch.where with a comparison to zero: a NaN lets the gradient pass, as PyTorch's ReLU.
    g = dy if y is None else dy.masked_fill(y <= 0, 0)
    none = mean.new_empty(0)
    sum_g, sum_g_xc, sum_g_shortcut = none, none.clone(), none.clone()
    if sums:
        sum_g = g.sum(_AXES, dtype=mean.dtype)
        sum_g_xc = _centered_sum(g, z, mean)
        if shortcut is not None and shortcut_mean is not None:
            sum_g_shortcut = _centered_sum(g, shortcut, shortcut_mean)
    return (dy.new_empty(0) if y is None else g), sum_g, sum_g_xc, sum_g_shortcut


def conv_backward(
    g: Tensor,
    z: Tensor | None,
    a: Tensor,
    b: Tensor | None,
    c: Tensor | None,
    x: Tensor,
    x_scale: Tensor | None,
    x_shift: Tensor | None,
    x_mean: Tensor | None,
    weight: Tensor,
    add: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    need_input: bool,
    need_weight: bool,
    sums: bool,
    winograd: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``dz`` as a map of its own, PyTorch's convolution backward, then mask, sums or addition."""
    g, x = _channels_last(g), _channels_last(x)
    if z is not None and b is not None and c is not None:
        dz = _affine(_channels_last(z), b, c).addcmul_(g.to(a.dtype), a.view(-1, 1, 1)).to(g.dtype)
    else:
        dz = (g * a.view(-1, 1, 1)).to(g.dtype)
    v = p = None
    if x_scale is not None and x_shift is not None:
        v = _affine(x, x_scale, x_shift)
        p = F.relu(v).to(x.dtype)
    g_x, dw, _ = torch.ops.aten.convolution_backward(
        dz, x if p is None else p, weight, None, stride, padding, dilation, False, [0, 0], groups,
        [need_input, need_weight, False],
    )  # fmt: skip
    none = a.new_empty(0)
    sum_g, sum_g_xc = none, none.clone()
    if need_input:
        g_x = _channels_last(g_x)
        if v is not None:
            g_x = g_x.masked_fill(v <= 0, 0)
        if add is not None:
            g_x = g_x + add
        if sums and x_mean is not None:
            sum_g, sum_g_xc = g_x.sum(_AXES, dtype=a.dtype), _centered_sum(g_x, x, x_mean)
    else:
        g_x = x.new_empty(0)
    if need_weight and dw.stride() != (strided := torch.empty_like(weight)).stride():
        dw = strided.copy_(dw)
    return g_x, dw if need_weight else weight.new_empty(0), sum_g, sum_g_xc


def bn_update_running(
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    count: int,
) -> None:
    """In place, and unseen by the version counters.

    PyTorch's batch norm moves its running statistics like that: a call of the same batch norm that
    PyTorch itself ran before has saved them for its backward, which does not read them.
    """
    with _unsafe_preserve_version_counter((running_mean, running_var)):
        reference.bn_update_running(mean, var, running_mean, running_var, momentum, count)


def stem_end(
    z: Tensor,
    scale: Tensor,
    shift: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """PyTorch's max-pool, its flat indices turned into places in their windows."""
    v = _affine(_channels_last(z), scale, shift).relu_().to(z.dtype)
    y, flat = torch.ops.aten.max_pool2d_with_indices(v, kernel, stride, padding)
    top, left = _corners(y, stride, padding)
    width = z.shape[3]
    place = (flat // width - top) * kernel[1] + flat % width - left
    return _channels_last(y), _channels_last(place.to(torch.uint8))


def stem_end_backward(
    dy: Tensor,
    index: Tensor,
    z: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's max-pool backward, then the mask and the sums."""
    top, left = _corners(dy, stride, padding)
    place = index.long()
    flat = (place // kernel[1] + top) * z.shape[3] + place % kernel[1] + left
    z = _channels_last(z)
    g = torch.ops.aten.max_pool2d_with_indices_backward(
        _channels_last(dy), z, kernel, stride, padding, [1, 1], False, _channels_last(flat)
    )
    g = _channels_last(g).masked_fill(_affine(z, scale, shift) <= 0, 0)
    none = mean.new_empty(0)
    if not sums:
        return g, none, none.clone()
    return g, g.sum(_AXES, dtype=mean.dtype), _centered_sum(g, z, mean)


def _corners(y: Tensor, stride: Sequence[int], padding: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Row and column of each window's first place; negative in the border."""
    top = torch.arange(y.shape[2], device=y.device).view(-1, 1) * stride[0] - padding[0]
    left = torch.arange(y.shape[3], device=y.device) * stride[1] - padding[1]
    return top, left
