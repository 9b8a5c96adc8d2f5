"""Batch norm, the stem and frozen blocks by every configuration, against float64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backends import reference
from ...tuning.tf32 import tf32_set_to
from .cases import Case, Row, Target
from .check_conv import batch_of, compared, precisions
from .operands import DTYPES, EPS, ConvOperands, conv_operands, feature_map, vector
from .shapes import Layer, layers, stem

#: Channels and height of the maps of ResNet-50's batch norms.
MAPS = ((64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7),
        (2048, 7))  # fmt: skip
TINY_MAPS = ((16, 4),)

_AXES = (0, 2, 3)


def cases(target: Target, backend: str) -> list[Case]:
    """The cases of a backend.

    Args:
        target: Device and sizes to run on.
        backend: ``"cuda"`` or ``"triton"``.
    """
    found: list[Case] = []

    def add(operation: str, what: str, run: Callable[..., Iterator[Row]], *more: Any) -> None:
        about = {"operation": operation, "what": what, "backend": backend, "precision": precision}
        bound = functools.partial(run, target, backend, precision, about, *more)
        found.append(Case(f"{backend}: {operation}, {what}, {precision}", bound, about))

    for precision in precisions(target):
        if precision != "tf32":
            for c, size in TINY_MAPS if target.tiny else MAPS:
                add("bn_add_relu", f"{c}, {size}x{size}", _batch_norm, c, size)
        add("conv_bn_relu_maxpool", stem(target.tiny).conv, _stem)
        for block in _blocks(target.tiny):
            add("residual_block", f"bottleneck {block[0].conv}", _block, block)
    return found


def _batch_norm(
    target: Target, backend: str, precision: str, about: Row, c: int, size: int
) -> Iterator[Row]:
    g, dtype = target.generator(), DTYPES[precision]
    shape = (batch_of(target), c, size, size)
    with torch.no_grad(), target.operators(backend) as operators:
        for layout in (torch.channels_last, torch.contiguous_format):
            x, r, dy = (
                feature_map(shape, dtype, g).contiguous(memory_format=layout) for _ in range(3)
            )
            vectors = [vector(c, g, 0.2, 1.0), vector(c, g, 0.3), vector(c, g, 0.3)]
            vectors.append(vector(c, g, 0.2).abs() + 0.8)
            suffix = "" if layout is torch.channels_last else ", contiguous"
            for config in _bn_configs(backend):
                named = {} if config is None else {"config": config}
                plan = "the planner's choice" if config is None else f"{config.block_r}x{config[1]}"
                about["plan"] = plan + suffix
                for training in (False, True):
                    call = functools.partial(
                        _triton_or(operators, backend, "bn_add_relu", named),
                        x, *vectors, r, training, EPS, True, **named,
                    )  # fmt: skip
                    row = {**about, "operation": f"bn_add_relu{', training' * training}"}
                    own = _normalised(x, r, vectors, training)
                    exact = _normalised(
                        x.double(), r.double(), [v.double() for v in vectors], training
                    )
                    yield compared(target, call, own, exact, dtype, row)
                    if training and config is None:
                        apply = functools.partial(
                            operators.bn_add_relu_apply, x, *vectors[:2], *own[1:], r, EPS, True
                        )
                        row["operation"] = "bn_add_relu_apply"
                        yield compared(target, apply, own[:1], exact[:1], dtype, dict(row))
                    row["operation"] = f"bn_add_relu_backward{', training' * training}"
                    yield _backward(
                        target, operators, backend, named, (dy, x, r, vectors), training, row
                    )


def _bn_configs(backend: str) -> list[Any]:
    if backend != "triton":
        return [None]
    from ...backends.triton import _bn_map

    return [None, *_bn_map.CONFIGS]


def _triton_or(operators: Any, backend: str, name: str, named: dict[str, Any]) -> Any:
    """An operator, or Triton's host function where a configuration is forced."""
    if backend == "triton" and named:
        from ...backends import triton as kernels

        return getattr(kernels, name)
    return getattr(operators, name)


def _normalised(x: Tensor, r: Tensor, vectors: list[Tensor], training: bool) -> list[Tensor]:
    weight, bias, mean, var = vectors
    wide = x if x.dtype is torch.float64 else x.float()
    if training:
        var, mean = torch.var_mean(wide, _AXES, correction=0)
    y = F.batch_norm(wide, mean, var, weight, bias, False, 0.0, EPS).to(x.dtype) + r
    return [y.relu(), mean, var] if training else [y.relu()]


def _backward(
    target: Target,
    operators: Any,
    backend: str,
    named: dict[str, Any],
    operands: tuple[Tensor, Tensor, Tensor, list[Tensor]],
    training: bool,
    about: Row,
) -> Row:
    dy, x, r, vectors = operands
    weight, _, mean, var = vectors
    if training:
        var, mean = torch.var_mean(x.float(), _AXES, correction=0)
    y = _normalised(x, r, vectors, training)[0]
    call = functools.partial(
        _triton_or(operators, backend, "bn_add_relu_backward", named),
        dy, x, y, weight, mean, var, training, EPS, True, True, **named,
    )  # fmt: skip

    def gradients(wide: torch.dtype) -> list[Tensor]:
        # The mask is given: an element at the kink is no error.
        masked = dy.to(wide).masked_fill(y <= 0, 0)
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            masked, x.to(wide), weight.to(wide), mean.to(wide), var.to(wide), mean.to(wide),
            (var.to(wide) + EPS).rsqrt(), training, EPS, [True, True, True],
        )  # fmt: skip
        to = wide if wide is torch.float64 else x.dtype
        return [dx.to(to), dweight, dbias, masked.to(to)]

    return compared(
        target, call, gradients(torch.float32), gradients(torch.float64), x.dtype, about
    )


def _stem(target: Target, backend: str, precision: str, about: Row) -> Iterator[Row]:
    layer = stem(target.tiny)
    with torch.no_grad(), tf32_set_to(precision == "tf32"), target.operators(backend) as operators:
        o = conv_operands(layer, batch_of(target), DTYPES[precision], target.generator())
        own, exact = (
            [
                reference.conv_bn_relu_maxpool(
                    **operands.named(), stride=layer.stride, padding=layer.padding
                )
            ]
            for operands in (o, o.double())
        )
        pool = ([3, 3], [2, 2], [1, 1])
        for config in _stem_configs(backend, precision):
            named = {} if config is None else {"config": config}
            call = functools.partial(
                _triton_or(operators, backend, "conv_bn_relu_maxpool", named),
                o.x, o.weight, None, o.bn_weight, o.bn_bias, o.mean, o.var, *layer.geometry, EPS,
                *pool, **named,
            )  # fmt: skip
            plan = "the planner's choice" if config is None else f"{config[0]}x{config[1]}"
            yield compared(target, call, own, exact, o.x.dtype, {**about, "plan": plan})
        call = functools.partial(
            operators.conv_bn_relu_maxpool_packed, o.x, o.packed, *o.affine,
            list(layer.weight_shape), *layer.geometry, *pool,
        )  # fmt: skip
        yield compared(target, call, own, exact, o.x.dtype, {**about, "plan": "packed"})


def _stem_configs(backend: str, precision: str) -> list[Any]:
    if backend != "triton":
        return [None]
    from ...backends.triton.conv_bn_relu_maxpool import CONFIGS

    key = precision if precision == "tf32" else "ieee" if precision == "float32" else "half"
    return [None, *CONFIGS[key]]


BlockLayers = tuple[Layer, Layer, Layer, "Layer | None"]


def _blocks(tiny: bool) -> list[BlockLayers]:
    """Bottlenecks without and with a projection: of each stage, or one small one of each."""
    if tiny:
        first, middle = Layer(64, 16, 1, 1, 4, False, True), Layer(16, 16, 3, 1, 4, False, True)
        last = Layer(16, 64, 1, 1, 4, True, True)
        return [(first, middle, last, None)]
    found: list[BlockLayers] = []
    for layer in layers(False):
        if layer.kernel != 3:
            continue
        width, size, out = layer.filters, layer.size, layer.out
        last = Layer(width, 4 * width, 1, 1, out, True, True)
        entering = layer.stride == 2 or width == 64
        channels = 64 if width == 64 else 2 * width
        first = Layer(channels, width, 1, 1, size, False, True)
        if entering:
            shortcut = Layer(channels, 4 * width, 1, layer.stride, size, False, False)
            found.append((first, layer, last, shortcut))
        if layer.stride == 1:
            found.append((first._replace(channels=4 * width), layer, last, None))
    return found


def _block(
    target: Target, backend: str, precision: str, about: Row, block: BlockLayers
) -> Iterator[Row]:
    g, dtype = target.generator(), DTYPES[precision]
    members = [layer for layer in block if layer is not None]
    with torch.no_grad(), tf32_set_to(precision == "tf32"), target.operators(backend) as operators:
        convs = [conv_operands(layer._replace(add=False), 1, dtype, g) for layer in members]
        x = feature_map(block[0].input(batch_of(target)), dtype, g)
        packed, affine = [o.packed for o in convs], [o.affine for o in convs]
        own = _composed(x, members, convs)
        exact = _composed(x.double(), members, [o.double() for o in convs])
        scales, shifts = [a[0] for a in affine], [a[1] for a in affine]

        def call(concatenated: Tensor | None, shift: Tensor | None) -> Tensor:
            return operators.residual_block(
                x, packed, scales, shifts, concatenated, shift, True, block[1].stride, 1, 1, False
            )

        row = {**about, "plan": "the planner's choice"}
        yield compared(target, lambda: call(None, None), [own], [exact], dtype, row)
        if block[3] is not None:
            # Both weights times their scales in one sum, as a frozen network has them.
            parts = [
                (o.weight.float() * a[0].view(-1, 1, 1, 1)).flatten(1)
                for o, a in zip(convs[2:], affine[2:], strict=True)
            ]
            both, shift = torch.cat(parts, 1).to(dtype).reshape(-1), shifts[2] + shifts[3]
            row["plan"] = "concatenated"
            yield compared(target, lambda: call(both, shift), [own], [exact], dtype, row)


def _composed(x: Tensor, members: list[Layer], convs: list[ConvOperands]) -> Tensor:
    def run(i: int, x: Tensor, residual: Tensor | None) -> Tensor:
        named = {**convs[i].named(), "x": x, "residual": residual}
        layer = members[i]
        return reference.conv_bn_add_relu(
            **named, stride=layer.stride, padding=layer.padding, relu=layer.relu
        )

    shortcut = run(3, x, None) if len(members) > 3 else x
    return run(2, run(1, run(0, x, None), None), shortcut)
