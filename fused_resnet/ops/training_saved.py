"""What a training unit keeps for backward, and whose change in place is an error.

Both follow PyTorch's operators. A convolution whose input or weight needs a gradient saves the two,
and a batch norm with a gradient in front of it or of its own saves its weight and its running
statistics, which nobody may change before backward. A batch norm does not save its bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .training_layer import Saved
from .training_spec import LayerTensors, Unit


class Kept(NamedTuple):
    """What backward has.

    Attributes:
        x: Input of the unit; None where no convolution of a gradient reads it.
        y: Result of the unit; None where the gradient does not depend on it.
        places: Places of the maxima of the pool at the end; None without one.
        parameters: Weight of the convolution, weight and bias of the batch norm, for each layer;
            None for a weight that no gradient depends on. A bias may have changed: see
            :func:`bias_of`.
        saved: The layers' own.
    """

    x: Tensor | None
    y: Tensor | None
    places: Tensor | None
    parameters: list[Tensor | None]
    saved: list[Saved]


def keep(
    ctx: Any,
    unit: Unit,
    kept: Kept,
    tensors: Sequence[LayerTensors],
    again: Sequence[int],
) -> None:
    """Keep for backward what it needs, in the forward, after the statistics are updated.

    Args:
        ctx: Context of the autograd function, whose first inputs are the settings and the layers'
            tensors, then ``x``, the shortcut and the parameters.
        unit: The settings.
        kept: All that there is.
        tensors: The layers' tensors.
        again: The layers whose convolution backward computes again.
    """
    needed = ctx.needs_input_grad[2:]
    x = kept.x
    weights: list[Tensor | None] = [t.weight for t in tensors]
    scales = [t.bn_weight for t in tensors]
    norms = [True] * len(tensors)
    if not needed[0]:  # some of the layers may have no gradient
        convolutions = [_has_gradient(unit, needed, i) for i in range(len(tensors))]
        read = [has or i in again for i, has in enumerate(convolutions)]
        norms = [has or any(needed[2 + 3 * i : 5 + 3 * i]) for i, has in enumerate(convolutions)]
        x = x if read[0] or any(read[unit.length :]) else None
        weights = [w if want else None for w, want in zip(weights, read, strict=True)]
        scales = [s if want else None for s, want in zip(scales, norms, strict=True)]
    watched: list[Tensor | None] = []
    if not torch.compiler.is_compiling():  # compiled code does not look for changes
        for layer, t, want in zip(unit.layers, tensors, norms, strict=True):
            # PyTorch's SyncBatchNorm does not save them.
            watched += [t.running_mean, t.running_var] if want and not layer.group else []
    ctx.dropped = [s is not t.bn_weight for s, t in zip(scales, tensors, strict=True)]
    ctx.biases = [t.bn_bias for t in tensors]
    ctx.versions = [None if t is None else t._version for t in ctx.biases]
    of_layers = [t for layer in kept.saved for t in layer]
    ctx.save_for_backward(x, kept.y, kept.places, *weights, *scales, *of_layers, *watched)


def _has_gradient(unit: Unit, needed: Sequence[bool], i: int) -> bool:
    """Whether a layer's convolution has a gradient to pass on or of its own.

    Args:
        unit: The settings.
        needed: Of ``x``, the shortcut and the parameters, whether each needs a gradient.
        i: Index of the layer.
    """
    in_front = i < unit.length and any(needed[2 : 2 + 3 * i])
    return needed[0] or needed[2 + 3 * i] or in_front


def kept_by(ctx: Any, layers: int) -> Kept:
    """What :func:`keep` has kept.

    Args:
        ctx: Context of the autograd function.
        layers: Number of layers.

    Raises:
        RuntimeError: One of the tensors was changed in place.
    """
    x, y, places, *rest = ctx.saved_tensors
    weights, scales, flat = rest[:layers], rest[layers : 2 * layers], rest[2 * layers :]
    size = len(Saved._fields)
    saved = [Saved(*flat[i : i + size]) for i in range(0, size * layers, size)]
    triples = zip(weights, scales, ctx.biases, strict=True)
    return Kept(x, y, places, [t for triple in triples for t in triple], saved)


def weight_of(ctx: Any, i: int, layer: Saved, kept: Tensor | None, eps: float) -> Tensor | None:
    """The weight of a layer's batch norm as it was in the forward, for second derivatives.

    Args:
        ctx: Context of the autograd function.
        i: Index of the layer.
        layer: What is kept of the layer.
        kept: The weight where it was kept.
        eps: The batch norm's.
    """
    return layer.scale * (layer.var + eps).sqrt() if ctx.dropped[i] else kept


def bias_of(ctx: Any, i: int, layer: Saved) -> Tensor | None:
    """The bias of a layer's batch norm as it was in the forward, for second derivatives.

    Args:
        ctx: Context of the autograd function.
        i: Index of the layer.
        layer: What is kept of the layer.

    Raises:
        RuntimeError: The bias was computed and then changed in place: its own gradient may be
            another since.
    """
    bias = ctx.biases[i]
    if bias is None or bias._version == ctx.versions[i]:
        return bias
    if not bias.is_leaf:
        raise RuntimeError(
            "residual_block: create_graph: the bias of a batch norm, which is no leaf, has been "
            "modified by an inplace operation"
        )
    return _AsItWas.apply(bias, (layer.shift + layer.mean * layer.scale).to(bias.dtype))


class _AsItWas(torch.autograd.Function):
    """An earlier value of a tensor; the gradient is the tensor's."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None
