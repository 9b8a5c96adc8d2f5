"""What a training unit computes: its settings and its tensors, and both as a flat list.

A *training unit* is the piece of a network that is one node for autograd: a residual block, the
stem with its pool, or a convolution with its batch norm. It is described by a :class:`Unit`, which
has no tensors, and a :class:`LayerTensors` for each convolution. ``torch.compile`` calls units
through an operator, whose arguments are lists of numbers and of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..backends.activation import Activation
from .checks import Pair


class Layer(NamedTuple):
    """The settings of a convolution without a bias and of the batch norm that follows it.

    Attributes:
        stride: Step of the convolution, ``(height, width)``.
        padding: Zeros on each side, ``(height, width)``.
        dilation: Distance between taps, ``(height, width)``.
        groups: Number of independent groups of channels.
        eps: Added to the variance.
        momentum: Weight of the batch in the running statistics; None averages all batches.
        batch: Whether the statistics are those of the batch; else they are the running ones.
        group: Name of the process group over whose batches the statistics are taken; empty for this
            process's batch alone.
    """

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    eps: float
    momentum: float | None
    batch: bool
    group: str = ""


class LayerTensors(NamedTuple):
    """The tensors of a convolution and its batch norm.

    Attributes:
        weight: Filters of the convolution, ``(K, C / groups, kh, kw)``.
        bn_weight: Weight of the batch norm, ``(K,)``; None means 1.
        bn_bias: Bias of the batch norm, ``(K,)``; None means 0.
        running_mean: Running mean, ``(K,)``, updated where the statistics are the batch's; None for
            none.
        running_var: Running variance, ``(K,)``, there when ``running_mean`` is.
        batches: The number of batches that the running statistics have seen, counted up with them;
            None for no such counter.
    """

    weight: Tensor
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    batches: Tensor | None


#: Of a shortcut: there is none; the input; the input with a stride and with channels of zeros on
#: both sides; the input through a convolution and a batch norm; a map that the caller passes.
SHORTCUTS = ("none", "identity", "zeros", "projection", "map")


class Unit(NamedTuple):
    """A chain of convolutions, a shortcut that is added at its end, and an activation.

    Attributes:
        layers: The chain, with the activation between two layers; after it the projection's layer,
            if the shortcut is one.
        shortcut: One of :data:`SHORTCUTS`.
        zeros: Channels of zeros on each side, and the stride, of the shortcut ``"zeros"``.
        activation: Activation after each layer of the chain; the last one's is after the
            addition.
        pool: Kernel, stride and padding of the max-pool at the end; None for none. Only without a
            shortcut and with an activation.
        recompute: Whether a bottleneck's last convolution is computed again in backward, so that
            its result need not be kept; the projection too, where it is as cheap.
        winograd: Whether Winograd's algorithm may run.
        backend: Backend whose primitives compute it, ``"cpu"``, ``"library"`` or ``"triton"``; or
            ``"tuned"``, for the fastest of each layer.
    """

    layers: tuple[Layer, ...]
    shortcut: str = "none"
    zeros: Pair = (0, 1)
    activation: Activation = Activation.RELU
    pool: tuple[Pair, Pair, Pair] | None = None
    recompute: bool = False
    winograd: bool = True
    backend: str = "cpu"

    @property
    def length(self) -> int:
        """Number of layers in the chain."""
        return len(self.layers) - (self.shortcut == "projection")


#: Integers of a layer in the flat list, after the unit's own.
_OF_LAYER = 8
_OF_UNIT = 5
#: The momentum None, the average of all batches, among the numbers.
_AVERAGE = -math.inf


def flatten(unit: Unit) -> tuple[list[int], list[float]]:
    """The integers and the numbers of a unit, its backend and process groups excepted.

    Args:
        unit: The unit.

    Returns:
        The integers, the unit's own before those of each layer, and ``eps`` and momentum of each
        layer.
    """
    integers = [SHORTCUTS.index(unit.shortcut), *unit.zeros, int(unit.activation)]
    integers.append(int(unit.recompute) + 2 * int(unit.winograd) + 4 * (unit.pool is not None))
    for kernel, stride, padding in [] if unit.pool is None else [unit.pool]:
        integers += [*kernel, *stride, *padding]
    numbers: list[float] = []
    for layer in unit.layers:
        integers += [*layer.stride, *layer.padding, *layer.dilation, layer.groups, int(layer.batch)]
        numbers += [layer.eps, _AVERAGE if layer.momentum is None else layer.momentum]
    return integers, numbers


def unflatten(integers: Sequence[int], numbers: Sequence[float], backend: str) -> Unit:
    """The unit of a flat list.

    Args:
        integers: Integers that encode the unit, the first result of :func:`flatten`.
        numbers: Floating-point settings of the layers, the second result of :func:`flatten`.
        backend: The unit's backend.
    """
    shortcut, channels, step, activation, flags = integers[:_OF_UNIT]
    rest = list(integers[_OF_UNIT:])
    pool = None
    if flags & 4:
        pool = ((rest[0], rest[1]), (rest[2], rest[3]), (rest[4], rest[5]))
        rest = rest[6:]
    layers = []
    for i in range(len(numbers) // 2):
        s0, s1, p0, p1, d0, d1, groups, batch = rest[_OF_LAYER * i : _OF_LAYER * (i + 1)]
        eps, momentum = numbers[2 * i : 2 * i + 2]
        average = None if momentum == _AVERAGE else momentum
        layers.append(Layer((s0, s1), (p0, p1), (d0, d1), groups, eps, average, bool(batch)))
    return Unit(
        tuple(layers),
        SHORTCUTS[shortcut],
        (channels, step),
        Activation(activation),
        pool,
        bool(flags & 1),
        bool(flags & 2),
        backend,
    )
