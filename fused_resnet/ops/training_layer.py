"""A layer of a training unit in the forward: a convolution and what its batch norm needs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import no_negative_eps, positive_eps
from .fakes import accumulator, conv_shape
from .training_reference import count_batch
from .training_spec import Layer, LayerTensors, Unit
from .training_sync import merge_statistics
from .training_tuned import unit_primitives


class Saved(NamedTuple):
    """What the forward keeps of a layer.

    Attributes:
        z: Result of the convolution; None where it is computed again.
        mean: Mean of the batch or running mean, ``(K,)``.
        var: Variance of the batch or running variance, ``(K,)``.
        scale: Scale of the batch norm, ``(K,)``.
        shift: Shift of the batch norm, ``(K,)``.
        weight: The weight, only where it was cast.
    """

    z: Tensor | None
    mean: Tensor
    var: Tensor
    scale: Tensor
    shift: Tensor
    weight: Tensor | None


class RunLayer(NamedTuple):
    """A layer that has run.

    Attributes:
        saved: What the backward pass keeps of the layer.
        values: Number of values per channel that the statistics are of.
        updated: Whether the running statistics are updated already.
    """

    saved: Saved
    values: int
    updated: bool


def run_layer(
    primitives: Any,
    unit: Unit,
    layer: Layer,
    t: LayerTensors,
    source: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
) -> RunLayer:
    """A convolution, its statistics, and its batch norm's scale and shift.

    Args:
        primitives: Primitives of a backend.
        unit: Unit that the layer belongs to.
        layer: The settings.
        t: The tensors.
        source: The layer's input, or the result of the convolution before.
        scale: Scale of the batch norm before; None where ``source`` is the input.
        shift: Shift of the batch norm before; None where ``source`` is the input.

    Raises:
        ValueError: A single value per channel, where the statistics are the batch's.
    """
    weight, geometry = filters_of(unit.backend, t.weight, source.dtype), layer[:4]
    cast = None if weight is t.weight else weight
    n, k, height, width = conv_shape(source, t.weight.shape, *map(list, layer[:3]))
    count, single = n * height * width, n * height * width == 1
    in_one = getattr(primitives, "conv_bn_forward", None)
    if in_one and layer.batch and not (layer.group or single or _counter_is_traced(layer, t)):
        positive_eps("residual_block", layer.eps)
        momentum, batches = layer.momentum, t.batches
        if momentum is None:  # the average: its weight is a number on the host, as PyTorch's
            momentum, batches = count_batch(None, t.batches), None
        running = (t.running_mean, t.running_var) if t.running_var is not None else (None, None)
        z, mean, var, scale, shift = in_one(
            source, scale, shift, weight, t.bn_weight, t.bn_bias, *running, batches, *geometry,
            momentum, layer.eps, unit.winograd, unit.activation,
        )  # fmt: skip
        return RunLayer(Saved(z, mean, var, scale, shift, cast), count, True)
    z, mean, var = primitives.conv_forward(
        source, scale, shift, weight, *geometry, layer.batch, unit.winograd, unit.activation
    )
    vectors = accumulator(source)
    if layer.batch:
        if layer.group:
            mean, var, count = merge_statistics(layer.group, mean, var, count)
        if count == 1:
            raise ValueError(
                "residual_block: x: expected more than 1 value per channel when training, got "
                f"{(n, k, height, width)}"
            )
        positive_eps("residual_block", layer.eps)
    else:
        no_negative_eps("residual_block", layer.eps)
        mean, var = as_dtype(t.running_mean, vectors), as_dtype(t.running_var, vectors)
    scale, shift = primitives.bn_coefficients(
        mean, var, as_dtype(t.bn_weight, vectors), as_dtype(t.bn_bias, vectors), layer.eps
    )
    return RunLayer(Saved(z, mean, var, scale, shift, cast), count, False)


def filters_of(backend: str, weight: Tensor, maps: torch.dtype) -> Tensor:
    """A weight as the convolutions of a backend take it; under autocast its dtype is another.

    Args:
        backend: The unit's. The CPU's kernels round a float32 weight where they lay it out, and
            their gradient of it is float32.
        weight: The parameter.
        maps: The dtype of the feature maps.
    """
    if backend == "cpu" and weight.dtype is torch.float32 and maps is not torch.float64:
        return weight
    return as_dtype(weight, maps)


def _counter_is_traced(layer: Layer, t: LayerTensors) -> bool:
    """Whether the average of all batches is wanted, by a counter that has no number yet."""
    return layer.momentum is None and t.batches is not None and type(t.batches) is not Tensor


def update_running_of(backend: str, layer: Layer, t: LayerTensors, run: RunLayer) -> None:
    """Count the batch and update the running statistics of a layer.

    Args:
        backend: Backend whose primitive does it.
        layer: The settings.
        t: The tensors, written to.
        run: The layer in the forward.
    """
    if _counter_is_traced(layer, t):
        _average(t, run)
        return
    momentum = count_batch(layer.momentum, t.batches)
    if t.running_mean is None or t.running_var is None:
        return
    mean, var = run.saved.mean, run.saved.var
    update_running(backend, mean, var, t.running_mean, t.running_var, momentum, run.values)


def _average(t: LayerTensors, run: RunLayer) -> None:
    """Count a batch, and update the averages by a counter whose number is not known yet."""
    assert t.batches is not None
    t.batches.add_(1)
    mean, var = run.saved.mean, run.saved.var
    share = t.batches.to(mean.dtype).reciprocal()
    unbiased = var * (run.values / (run.values - 1))
    for running, batch in ((t.running_mean, mean), (t.running_var, unbiased)):
        if running is not None:
            running.add_(((batch - running) * share).to(running.dtype))


def update_running(
    backend: str,
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    count: int,
) -> None:
    """Update running statistics of any floating-point dtype; see ``bn_update_running``.

    Args:
        backend: Backend whose primitive does it.
        mean: Mean of the batch, ``(K,)``.
        var: Biased variance of the batch, ``(K,)``.
        running_mean: Running mean, ``(K,)``, written to.
        running_var: Running variance, ``(K,)``, written to.
        momentum: Weight of the batch.
        count: Values per channel.
    """
    if running_mean.dtype is not mean.dtype or running_var.dtype is not mean.dtype:
        backend = "library"  # which converts
    unit_primitives(backend).bn_update_running(
        mean, var, running_mean, running_var, momentum, count
    )


def as_dtype(t: Any, dtype: torch.dtype) -> Any:
    """A tensor in another dtype; itself where it has that, and None for None.

    Args:
        t: The tensor, or None.
        dtype: Dtype of the result.
    """
    return t if t is None or t.dtype is dtype else t.to(dtype)
