"""A training unit as one node of autograd: forward and backward from the training primitives.

Inside a unit the normalised maps are never stored: each convolution applies the batch norm and the
ReLU before it while it reads. Kept for backward are the convolutions' results, the unit's input
and its result. Running statistics are updated in the forward, before anything is saved, so that
activation checkpointing repeats them as it repeats PyTorch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.autograd import forward_ad
from torch.library import Library

from ..backends.activation import activate, gradient
from ..backends.availability import is_exporting
from .training_layer import RunLayer, Saved, as_dtype, run_layer, update_running_of
from .training_reference import before_activation, pad_with_zeros, run_reference
from .training_saved import Kept, bias_of, keep, kept_by, weight_of
from .training_spec import LayerTensors, Unit, flatten, unflatten
from .training_sync import sum_over_processes
from .training_tuned import TUNED, unit_primitives

_CHANNELS_LAST = torch.channels_last


def training_unit(
    unit: Unit, x: Tensor, shortcut: Tensor | None, tensors: Sequence[LayerTensors]
) -> Tensor:
    """Compute a unit; its gradient is of the first order by the primitives, of any by PyTorch.

    Args:
        unit: The settings.
        x: Input of the unit, ``(N, C, H, W)``, in the dtype in which the convolutions run.
        shortcut: The map that is added where the unit's shortcut is ``"map"``, shape and dtype of
            the result; else None.
        tensors: One for each layer. Running statistics and counters are updated.

    Returns:
        ``(N, K, OH, OW)``, dtype of ``x``; channels_last where ``x`` or a weight is, as PyTorch's
        convolutions have it.

    Raises:
        ValueError: A single value per channel, where the statistics are the batch's.
    """
    if not torch.compiler.is_compiling():
        return _run(unit, x, shortcut, tensors)
    if is_exporting():
        return run_reference(unit, x, shortcut, tensors)
    integers, numbers = flatten(unit)
    flat = [t for layer in tensors for t in layer]
    return torch.ops.fused_resnet.training_unit(x, shortcut, flat, integers, numbers, unit.backend)


# Compilers see a unit as this operator and trace through it below: what they differentiate is the
# autograd function, and what they compile are the primitives. The buffers among the tensors are
# written to, which functionalisation finds in the trace.
_library = Library("fused_resnet", "FRAGMENT")
_library.define(
    "training_unit(Tensor x, Tensor? shortcut, Tensor?[] tensors, int[] integers, "
    "float[] numbers, str backend) -> Tensor"
)


def _operator(
    x: Tensor,
    shortcut: Tensor | None,
    tensors: Sequence[Any],
    integers: Sequence[int],
    numbers: Sequence[float],
    backend: str,
) -> Tensor:
    size = len(LayerTensors._fields)
    layers = [LayerTensors(*tensors[i : i + size]) for i in range(0, len(tensors), size)]
    return _run(unflatten(integers, numbers, backend), x, shortcut, layers)


_library.impl("training_unit", _operator, "CompositeImplicitAutograd")


def _run(unit: Unit, x: Tensor, shortcut: Tensor | None, tensors: Sequence[LayerTensors]) -> Tensor:
    if is_transformed() or torch.jit.is_tracing() or x.numel() == 0:
        return run_reference(unit, x, shortcut, tensors)
    parameters = [p for t in tensors for p in t[:3]]
    return _TrainingUnit.apply(unit, tensors, x, shortcut, *parameters)


def is_transformed() -> bool:
    """Whether a ``torch.func`` transform or forward-mode AD runs.

    They differentiate PyTorch's own operators, and nothing that hides them.
    """
    transforms = torch._C._functorch.peek_interpreter_stack() is not None
    return transforms or forward_ad._current_level >= 0


class _TrainingUnit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        unit: Unit,
        tensors: Sequence[LayerTensors],
        x: Tensor,
        shortcut: Tensor | None,
        *parameters: Tensor | None,
    ) -> Tensor:
        primitives = unit_primitives(unit.backend)
        map_ = x.contiguous(memory_format=_CHANNELS_LAST)
        layers = _chain(unit, primitives, map_, tensors)
        saved, counts = [run.saved for run in layers], [run.values for run in layers]
        last = saved[unit.length - 1]
        index = None
        if unit.pool is not None:
            y, index = primitives.stem_end(
                last.z, last.scale, last.shift, *unit.pool, unit.activation
            )
        else:
            side, side_scale, side_shift = _side(unit, map_, shortcut, saved)
            y = primitives.block_end(
                last.z, last.scale, last.shift, side, side_scale, side_shift, unit.activation
            )
        ctx.contiguous = suggest_memory_format(x) is not _CHANNELS_LAST
        ctx.contiguous = ctx.contiguous and not _any_channels_last(tensors)
        if ctx.contiguous:
            y = y.contiguous()
        _update_running(unit, tensors, layers)
        again = _computed_again(unit, tensors)
        for i in again:
            saved[i] = saved[i]._replace(z=None)
        ctx.unit, ctx.counts = unit, counts
        sign = y if unit.activation and unit.pool is None else None
        keep(ctx, unit, Kept(x, sign, index, [], saved), tensors, again)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        unit: Unit = ctx.unit
        kept, needed = kept_by(ctx, len(unit.layers)), ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # create_graph=True
            for i, saved in enumerate(kept.saved):
                weight, eps = kept.parameters[3 * i + 1], unit.layers[i].eps
                kept.parameters[3 * i + 1] = weight_of(ctx, i, saved, weight, eps)
                kept.parameters[3 * i + 2] = bias_of(ctx, i, saved)
            found = _differentiable(unit, needed, dy, kept)
        else:
            found = _Backward(unit, needed, kept, ctx.counts).run(dy, kept.y, kept.places)
            if ctx.contiguous:  # as PyTorch's convolutions give them
                found[:2] = [None if g is None else g.contiguous() for g in found[:2]]
        return (None, None, *found)


# Forward


def _chain(
    unit: Unit, primitives: Any, x: Tensor, tensors: Sequence[LayerTensors]
) -> list[RunLayer]:
    """The convolutions, each with its statistics and its batch norm's scale and shift."""
    layers: list[RunLayer] = []
    source: Any = x
    scale = shift = None
    for i, (layer, t) in enumerate(zip(unit.layers, tensors, strict=True)):
        if i == unit.length:  # the projection
            source, scale, shift = x, None, None
        run = run_layer(primitives, unit, layer, t, source, scale, shift)
        layers.append(run)
        source, scale, shift = run.saved.z, run.saved.scale, run.saved.shift
    return layers


def _side(
    unit: Unit, x: Tensor, shortcut: Tensor | None, saved: list[Saved]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The shortcut's map, and the scale and shift that are applied to it."""
    if unit.shortcut == "projection":
        return saved[-1].z, saved[-1].scale, saved[-1].shift
    if unit.shortcut == "identity":
        return x, None, None
    if unit.shortcut == "zeros":
        return pad_with_zeros(x, *unit.zeros), None, None
    return shortcut, None, None


def _update_running(
    unit: Unit, tensors: Sequence[LayerTensors], layers: Sequence[RunLayer]
) -> None:
    """Update them where the convolution's own kernel has not: after all that may fail."""
    for layer, t, run in zip(unit.layers, tensors, layers, strict=True):
        if layer.batch and not run.updated:
            update_running_of(unit.backend, layer, t, run)


def _computed_again(unit: Unit, tensors: Sequence[LayerTensors]) -> list[int]:
    """The layers whose results backward computes again.

    They are a bottleneck's last one, and its projection where that takes no more multiply-adds.
    """
    if not unit.recompute or unit.length != 3:
        return []
    depths = [t.weight[0].numel() for t in tensors]
    return [i for i in range(2, len(tensors)) if depths[i] <= depths[2]]


def _any_channels_last(tensors: Sequence[LayerTensors]) -> bool:
    return any(suggest_memory_format(t.weight) is _CHANNELS_LAST for t in tensors)


# Backward


class _Backward:
    """The gradients of a unit, from its end to its input, as far as any is wanted."""

    def __init__(
        self,
        unit: Unit,
        needed: Sequence[bool],
        kept: Kept,
        counts: Sequence[int],
    ) -> None:
        self.unit, self.counts = unit, counts
        self.saved, self.parameters, x = kept.saved, kept.parameters, kept.x
        self.primitives = unit_primitives(unit.backend)
        self.x = None if x is None else x.contiguous(memory_format=_CHANNELS_LAST)
        self.need_x, self.need_shortcut = needed[0], needed[1]
        self.needed = needed[2:]
        self.gradients: list[Tensor | None] = [None] * len(kept.parameters)
        for i, layer in enumerate(kept.saved):
            if layer.z is None:
                self._compute_again(i)

    def _compute_again(self, i: int) -> None:
        layer = self.unit.layers[i]
        z, _, _ = self.primitives.conv_forward(
            *self._source(i)[:3], self._weight(i), layer.stride, layer.padding, layer.dilation,
            layer.groups, False, self.unit.winograd, self.unit.activation,
        )  # fmt: skip
        self.saved[i] = self.saved[i]._replace(z=z)

    def run(self, dy: Tensor, y: Tensor | None, index: Tensor | None) -> list[Tensor | None]:
        unit, last = self.unit, self.unit.length - 1
        end = self.saved[last]
        projection = self.saved[-1] if unit.shortcut == "projection" else None
        sums = self._needs_sums(last) or (projection is not None and self._needs_sums(last + 1))
        if unit.pool is not None:
            g, sum_g, sum_g_xc = self.primitives.stem_end_backward(
                dy, index, end.z, end.scale, end.shift, end.mean, *unit.pool, sums, unit.activation
            )
            sum_g_side = None
        else:
            g, sum_g, sum_g_xc, sum_g_side = self._end(dy, y, end, projection, sums)
            if y is None:
                g = dy
        add = padded = None
        if projection is not None:
            add = self._layer(last + 1, g, sum_g, sum_g_side, None)[0]
        elif self.need_x and unit.shortcut == "identity":
            add = g
        elif self.need_x and unit.shortcut == "zeros":
            padded = g
        of_shortcut = g if self.need_shortcut else None
        for i in range(last, -1, -1):
            g, sum_g, sum_g_xc = self._layer(i, g, sum_g, sum_g_xc, None if i else add)
            if g is None:
                break
        if padded is not None:
            _add_without_zeros(g, padded, *unit.zeros)
        return [g if self.need_x else None, of_shortcut, *self.gradients]

    def _end(
        self, dy: Tensor, y: Tensor | None, end: Saved, projection: Saved | None, sums: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gradient before the last activation, and the sums of the batch norms before it."""
        recomputed = getattr(self.primitives, "block_end_backward_recomputed", None)
        alone = self.unit.shortcut in ("none", "projection")
        if recomputed and alone and sums and y is not None:
            # y's sign from what the sums read anyway.
            p = projection
            side = (None,) * 4 if p is None else (p.z, p.mean, p.scale, p.shift)
            return recomputed(
                dy, end.z, end.mean, end.scale, end.shift, *side, sums, self.unit.activation
            )
        last = (None, None) if projection is None else (projection.z, projection.mean)
        return self.primitives.block_end_backward(
            dy, y, end.z, end.mean, *last, sums, self.unit.activation
        )

    def _layer(
        self, i: int, g: Tensor, sum_g: Any, sum_g_xc: Any, add: Tensor | None
    ) -> tuple[Any, Any, Any]:
        """The gradient in front of a layer, with its sums; None where nothing there needs one."""
        layer, saved = self.unit.layers[i], self.saved[i]
        need_weight, need_input = self.needed[3 * i], self._reaches(i)
        z, a, b, c = saved.z, saved.scale, None, None
        if layer.batch and self._needs_sums(i):
            bn_weight = self.parameters[3 * i + 1]
            if self.unit.backend not in ("triton", TUNED):  # which read it as it is
                bn_weight = as_dtype(bn_weight, saved.mean.dtype)
            whole: tuple[Tensor, ...] = (sum_g, sum_g_xc)
            if layer.group:
                whole = sum_over_processes(layer.group, sum_g, sum_g_xc)
            a, b, c, of_weight, of_bias = self.primitives.bn_backward_coefficients(
                *whole, saved.mean, saved.var, bn_weight, layer.eps, self.counts[i]
            )
            if layer.group:  # the parameters' gradients are this process's, as PyTorch has them
                of_weight, of_bias = _of_parameters(saved, sum_g, sum_g_xc, layer.eps)
        else:
            z = None
            of_weight, of_bias = sum_g_xc, sum_g
            if self.needed[3 * i + 1]:
                of_weight, _ = _of_parameters(saved, sum_g, sum_g_xc, layer.eps)
        self._keep(3 * i + 1, of_weight)
        self._keep(3 * i + 2, of_bias)
        if not (need_weight or need_input):
            return None, None, None
        sums = not self._is_first(i) and self._needs_sums(i - 1)
        g, dw, sum_g, sum_g_xc = self.primitives.conv_backward(
            g, z, a, b, c, *self._source(i), self._weight(i), add, layer.stride, layer.padding,
            layer.dilation, layer.groups, need_input, need_weight, sums, self.unit.winograd,
            self.unit.activation,
        )  # fmt: skip
        self._keep(3 * i, dw)
        return g if need_input else None, sum_g, sum_g_xc

    def _is_first(self, i: int) -> bool:
        """Whether a layer reads the unit's input: the first one, and the projection."""
        return i in (0, self.unit.length)

    def _source(self, i: int) -> tuple[Tensor | None, ...]:
        """What a layer reads: a map, and the scale, the shift and the mean of its batch norm."""
        if self._is_first(i):
            return self.x, None, None, None
        before = self.saved[i - 1]
        return before.z, before.scale, before.shift, before.mean

    def _weight(self, i: int) -> Tensor:
        cast, weight = self.saved[i].weight, self.parameters[3 * i]
        assert weight is not None
        return weight if cast is None else cast

    def _keep(self, at: int, gradient: Tensor) -> None:
        if self.needed[at]:
            self.gradients[at] = as_dtype(gradient, self.parameters[at].dtype)  # type: ignore[union-attr]

    def _reaches(self, i: int) -> bool:
        """Whether anything in front of a layer's convolution needs a gradient."""
        return self.need_x or (i < self.unit.length and any(self.needed[: 3 * i]))

    def _needs_sums(self, i: int) -> bool:
        """Whether a layer's batch norm needs its sums."""
        weight, bn_weight, bn_bias = self.needed[3 * i : 3 * i + 3]
        behind = self.unit.layers[i].batch and (weight or self._reaches(i))
        return bn_weight or bn_bias or behind


def _of_parameters(
    saved: Saved, sum_g: Tensor, sum_g_xc: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The gradients of a batch norm's weight and bias, from the sums of this process."""
    return sum_g_xc * (saved.var.double() + eps).rsqrt().to(sum_g_xc.dtype), sum_g


def _add_without_zeros(g_x: Tensor, g: Tensor, channels: int, stride: int) -> None:
    """Add the gradient of :func:`pad_with_zeros`, in place: it has few of the map's pixels."""
    if channels:
        g = g[:, channels:-channels]
    g_x[:, :, ::stride, ::stride] += g


def _differentiable(
    unit: Unit,
    needed: Sequence[bool],
    dy: Tensor,
    kept: Kept,
) -> list[Tensor | None]:
    """The gradients as functions of ``dy``, ``x`` and the parameters, by PyTorch's operators.

    Second derivatives are rare, so the unit is computed again for them. The derivative of the last
    activation is locally constant; it is read off the result that the forward gave.
    """
    if any(layer.group for layer in unit.layers):
        raise RuntimeError(
            "residual_block: create_graph: batch norm over several processes is differentiable "
            "once, as PyTorch's SyncBatchNorm is"
        )
    with torch.enable_grad(), torch.autocast(dy.device.type, enabled=False):
        # Aliases: a parameter that the unit has twice gets a gradient for each.
        inputs = [None if t is None else t.view_as(t) for t in (kept.x, *kept.parameters)]
        tensors, results = [], []
        for i, layer in enumerate(kept.saved):
            weight, bn_weight, bn_bias = inputs[3 * i + 1 : 3 * i + 4]
            weight = as_dtype(weight, dy.dtype)
            tensors.append(LayerTensors(weight, bn_weight, bn_bias, layer.mean, layer.var, None))
            results.append(layer.z if weight is None else None)  # of no gradient: a constant
        end = before_activation(unit, inputs[0], None, tensors, update=False, results=results)
        if unit.pool is not None:
            end = torch.nn.functional.max_pool2d(activate(end, unit.activation), *unit.pool)
        g = dy if kept.y is None else gradient(dy, kept.y, unit.activation)
        wanted = [needed[0], *needed[2:]]
        chosen = [t for t, want in zip(inputs, wanted, strict=True) if want]
        found = iter(
            torch.autograd.grad(end, chosen, g, create_graph=True, allow_unused=True)  # type: ignore[arg-type]
            if chosen
            else ()
        )
    first, *rest = [next(found) if want else None for want in wanted]
    return [first, g if needed[1] else None, *rest]
