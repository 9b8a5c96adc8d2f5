"""The training primitives by PyTorch's own calls: the ``library`` backend.

Formulas and arguments are those of :mod:`.reference_training`. Maps keep their dtype and are
channels_last; arithmetic per element is that of the per-channel vectors, float32 or float64.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import _unsafe_preserve_version_counter

from . import reference_training as reference
from .activation import activate, activate_, gradient

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


def _primitive(compute: Callable[[Any], Any]) -> Callable[..., Any]:
    """A primitive that has its arguments by name, in the order that its reference gives them."""
    parameters = inspect.signature(getattr(reference, compute.__name__)).parameters
    # The dispatcher leaves out a last argument that has its default.
    defaults = {p.name: p.default for p in parameters.values() if p.default is not p.empty}
    names = tuple(parameters)

    def call(*arguments: Any) -> Any:
        return compute(SimpleNamespace(**defaults | dict(zip(names, arguments, strict=False))))

    return call


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``x * scale + shift`` in the dtype of the vectors."""
    return torch.addcmul(shift.view(-1, 1, 1), x.to(scale.dtype), scale.view(-1, 1, 1))


def _centered_sum(g: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    return (g * (x - mean.view(-1, 1, 1))).sum(_AXES)


@_primitive
def conv_forward(o: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The prologue as a map of its own, PyTorch's convolution, and one pass for the statistics.

    Args:
        o: Operands and settings as attributes: ``x``, ``x_scale`` and ``x_shift`` of the batch norm
            before or None, ``weight``, ``stride``, ``padding``, ``dilation``, ``groups``,
            ``activation``, and ``statistics``, whether mean and variance are wanted.

    Returns:
        The convolution's result, its mean and its biased variance; the last two are empty when they
        are not wanted.
    """
    x = _channels_last(o.x)
    if o.x_scale is not None and o.x_shift is not None:
        x = activate_(_affine(x, o.x_scale, o.x_shift), o.activation).to(x.dtype)
    z = torch.ops.aten.convolution(
        x, o.weight, None, o.stride, o.padding, o.dilation, False, [0, 0], o.groups
    )
    z = _channels_last(z)
    vectors = torch.float64 if x.dtype is torch.float64 else torch.float32
    if not o.statistics:
        none = torch.empty(0, dtype=vectors, device=x.device)
        return z, none, none.clone()
    var, mean = torch.var_mean(z.to(vectors), _AXES, correction=0)
    return z, mean, var


@_primitive
def block_end(o: Any) -> Tensor:
    """One PyTorch call for each term, rounded to the dtype of the map at the end.

    Args:
        o: Operands and settings as attributes: ``z``, the last convolution's result, with ``scale``
            and ``shift``; ``shortcut``, a map or None, with ``shortcut_scale`` and
            ``shortcut_shift`` or None; and ``activation``.

    Returns:
        The block's result, shape and dtype of ``z``.
    """
    y = _affine(_channels_last(o.z), o.scale, o.shift)
    if o.shortcut is not None and o.shortcut_scale is not None and o.shortcut_shift is not None:
        y += _affine(o.shortcut, o.shortcut_scale, o.shortcut_shift)
    elif o.shortcut is not None:
        y += o.shortcut
    return activate_(y, o.activation).to(o.z.dtype)


@_primitive
def block_end_backward(o: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mask, and each sum as a product and a reduction.

    Args:
        o: Operands and settings as attributes: ``dy``, the gradient of the result ``y``; ``y``, or
            None without an activation; ``z``, the last convolution's result, and its ``mean``;
            ``shortcut`` and ``shortcut_mean``, or None; ``activation``; and ``sums``, whether the
            sums are wanted.

    Returns:
        The gradient in front of the activation, empty where that is ``dy``; and its sum, its sum
        times the centred ``z``, and its sum times the centred shortcut, each empty when it is not
        wanted.
    """
    dy, mean = _channels_last(o.dy), o.mean
    g = dy if o.y is None else gradient(dy, o.y, o.activation)
    none = mean.new_empty(0)
    sum_g, sum_g_xc, sum_g_shortcut = none, none.clone(), none.clone()
    if o.sums:
        sum_g = g.sum(_AXES, dtype=mean.dtype)
        sum_g_xc = _centered_sum(g, o.z, mean)
        if o.shortcut is not None and o.shortcut_mean is not None:
            sum_g_shortcut = _centered_sum(g, o.shortcut, o.shortcut_mean)
    return (dy.new_empty(0) if o.y is None else g), sum_g, sum_g_xc, sum_g_shortcut


@_primitive
def conv_backward(o: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``dz`` as a map of its own, PyTorch's convolution backward, then mask, sums or addition.

    Args:
        o: Operands and settings as attributes: ``g``, the gradient after the batch norm; ``z``,
            ``a``, ``b`` and ``c`` of ``dz = a g + b z + c``; the input ``x`` with ``x_scale``,
            ``x_shift`` and ``x_mean`` or None; ``weight``; ``add``, a gradient that is added to
            that of ``x``, or None; the geometry; ``activation``; and ``need_input``,
            ``need_weight`` and ``sums``, whether each result is wanted.

    Returns:
        The gradients of the input and of the weight, the sum of the former, and its sum times the
        centred ``x``; each is empty when it is not wanted.
    """
    g, x, a = _channels_last(o.g), _channels_last(o.x), o.a
    if o.z is not None and o.b is not None and o.c is not None:
        dz = _affine(_channels_last(o.z), o.b, o.c)
        dz = dz.addcmul_(g.to(a.dtype), a.view(-1, 1, 1)).to(g.dtype)
    else:
        dz = (g * a.view(-1, 1, 1)).to(g.dtype)
    v = p = None
    if o.x_scale is not None and o.x_shift is not None:
        v = _affine(x, o.x_scale, o.x_shift)
        p = activate(v, o.activation).to(x.dtype)
    g_x, dw, _ = torch.ops.aten.convolution_backward(
        dz, x if p is None else p, o.weight, None, o.stride, o.padding, o.dilation, False, [0, 0],
        o.groups, [o.need_input, o.need_weight, False],
    )  # fmt: skip
    none = a.new_empty(0)
    sum_g, sum_g_xc = none, none.clone()
    if o.need_input:
        g_x = _channels_last(g_x)
        if v is not None:
            g_x = gradient(g_x, v, o.activation)
        if o.add is not None:
            g_x = g_x + o.add
        if o.sums and o.x_mean is not None:
            sum_g, sum_g_xc = g_x.sum(_AXES, dtype=a.dtype), _centered_sum(g_x, x, o.x_mean)
    else:
        g_x = x.new_empty(0)
    if o.need_weight and dw.stride() != (strided := torch.empty_like(o.weight)).stride():
        dw = strided.copy_(dw)
    return g_x, dw if o.need_weight else o.weight.new_empty(0), sum_g, sum_g_xc


@_primitive
def bn_update_running(o: Any) -> None:
    """In place, and unseen by the version counters.

    PyTorch's batch norm updates its running statistics like that: a call of the same batch norm
    that PyTorch itself ran before has saved them for its backward, which does not read them.

    Args:
        o: Operands and settings as attributes: ``mean`` and ``var`` of the batch, ``running_mean``
            and ``running_var``, which are written to, ``momentum``, and ``count``, the values per
            channel.
    """
    with _unsafe_preserve_version_counter((o.running_mean, o.running_var)):
        reference.bn_update_running(**vars(o))


@_primitive
def stem_end(o: Any) -> tuple[Tensor, Tensor]:
    """PyTorch's max-pool, its flat indices turned into places in their windows.

    Args:
        o: Operands and settings as attributes: ``z``, the convolution's result, with ``scale`` and
            ``shift`` of its batch norm; ``kernel``, ``stride`` and ``padding`` of the pool,
            ``(height, width)`` each; and ``activation``.

    Returns:
        The pooled map, and as ``uint8`` the place of each maximum in its window.
    """
    v = activate_(_affine(_channels_last(o.z), o.scale, o.shift), o.activation).to(o.z.dtype)
    y, flat = torch.ops.aten.max_pool2d_with_indices(v, o.kernel, o.stride, o.padding)
    top, left = reference.window_corners(y, o.stride, o.padding)
    width = o.z.shape[3]
    place = (flat // width - top) * o.kernel[1] + flat % width - left
    return _channels_last(y), _channels_last(place.to(torch.uint8))


@_primitive
def stem_end_backward(o: Any) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's max-pool backward, then the mask and the sums.

    Args:
        o: Operands and settings as attributes: ``dy``, the gradient of the pooled map; ``index``,
            the places that :func:`stem_end` returned; ``z`` with ``scale``, ``shift`` and ``mean``;
            ``kernel``, ``stride`` and ``padding`` of the pool, ``(height, width)`` each;
            ``activation``; and ``sums``, whether the sums are wanted.

    Returns:
        The gradient after the batch norm, its sum, and its sum times the centred ``z``; the last
        two are empty when they are not wanted.
    """
    top, left = reference.window_corners(o.dy, o.stride, o.padding)
    z, place = _channels_last(o.z), o.index.long()
    flat = (place // o.kernel[1] + top) * z.shape[3] + place % o.kernel[1] + left
    g = torch.ops.aten.max_pool2d_with_indices_backward(
        _channels_last(o.dy), z, o.kernel, o.stride, o.padding, [1, 1], False, _channels_last(flat)
    )
    g = gradient(_channels_last(g), _affine(z, o.scale, o.shift), o.activation)
    none = o.mean.new_empty(0)
    if not o.sums:
        return g, none, none.clone()
    return g, g.sum(_AXES, dtype=o.mean.dtype), _centered_sum(g, z, o.mean)
