"""A training unit by the operators that an unfused model calls.

It is the truth for the units' tests, and what runs where a unit of its own formulas cannot: under
``torch.func`` transforms, forward-mode AD, ``torch.export`` and ``torch.jit.trace``, for an empty
batch, and for second derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ..backends.activation import activate
from .training_spec import Layer, LayerTensors, Unit


def run_reference(
    unit: Unit, x: Tensor, shortcut: Tensor | None, tensors: Sequence[LayerTensors]
) -> Tensor:
    """A unit's result; counters and running statistics are updated.

    Args:
        unit: The settings.
        x: Input of the unit, ``(N, C, H, W)``.
        shortcut: The map that is added where the unit's shortcut is ``"map"``; else None.
        tensors: One for each layer.
    """
    y = before_activation(unit, x, shortcut, tensors, update=True)
    y = activate(y, unit.activation)
    return y if unit.pool is None else F.max_pool2d(y, *unit.pool)


def before_activation(
    unit: Unit,
    x: Tensor | None,
    shortcut: Tensor | None,
    tensors: Sequence[LayerTensors],
    *,
    update: bool,
    results: Sequence[Tensor | None] = (),
) -> Tensor:
    """A unit up to its last activation, which is not applied.

    Args:
        unit: The settings.
        x: Input of the unit, ``(N, C, H, W)``; None, where no convolution reads it, adds nothing.
        shortcut: The map that is added where the unit's shortcut is ``"map"``; None adds nothing.
        tensors: One for each layer.
        update: Whether counters and running statistics are updated.
        results: For each layer the convolution's result where it is known, or None; empty for none.
    """
    known = [*results] or [None] * len(tensors)
    y = x
    for i in range(unit.length):
        source = activate(y, unit.activation) if i and y is not None else y
        y = _layer(unit.layers[i], source, tensors[i], update, known[i])
    assert y is not None
    if unit.shortcut == "identity":
        shortcut = x
    elif unit.shortcut == "zeros" and x is not None:
        shortcut = pad_with_zeros(x, *unit.zeros)
    elif unit.shortcut == "projection":
        shortcut = _layer(unit.layers[-1], x, tensors[-1], update, known[-1])
    return y if shortcut is None else y + shortcut


def pad_with_zeros(x: Tensor, channels: int, stride: int) -> Tensor:
    """Every ``stride``-th pixel, with channels of zeros on both sides: CIFAR's option A.

    Args:
        x: The map, ``(N, C, H, W)``.
        channels: Number of channels of zeros on each side.
        stride: Step in both directions.
    """
    return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, channels, channels))


def _layer(
    layer: Layer, x: Tensor | None, t: LayerTensors, update: bool, z: Tensor | None
) -> Tensor:
    if z is None:
        assert x is not None
        z = F.conv2d(x, t.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    mean, var, momentum = t.running_mean, t.running_var, 0.0
    if layer.batch:
        if not update:
            mean = var = None
        else:
            momentum = count_batch(layer.momentum, t.batches)
    return F.batch_norm(z, mean, var, t.bn_weight, t.bn_bias, layer.batch, momentum, layer.eps)


def count_batch(momentum: float | None, batches: Tensor | None) -> float:
    """Count a batch, and return its weight in the running statistics.

    Args:
        momentum: The weight; None averages all batches.
        batches: The counter, written to; None for none.

    Returns:
        The weight; 0 where there is neither a momentum nor a counter.
    """
    if batches is not None:
        batches.add_(1)
        if momentum is None:
            return 1.0 / float(batches)
    return momentum or 0.0
