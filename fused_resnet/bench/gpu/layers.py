"""ResNet-50's distinct layers at batch 256, inference: PyTorch, cuDNN, CUDA's tiles, Triton's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backends import reference
from ...roofline import card_of
from ...roofline.kernels import Kernel, kernels
from . import plans, timing
from .cases import Case, Row, Target, UnavailableError
from .operands import DTYPES, EPS, ConvOperands, conv_operands
from .providers import LIMITS, cell, error_against
from .shapes import Layer, layers, stem

#: Images of a layer, and those that are checked: float64 of all would take seconds.
BATCH, CHECKED = 256, 2

#: The largest of CUDA's splits that is timed at a large batch, where few parts can help.
TIMED_SPLIT = 2

_POOL = ([3, 3], [2, 2], [1, 1])

Call = Callable[[], Any]


def batch_of(target: Target) -> int:
    """Number of images.

    Args:
        target: Device and sizes to run on.
    """
    return 1 if target.tiny else BATCH


def cases(target: Target, precision: str = "bfloat16") -> list[Case]:
    """A case for each layer, those that take most of the network's time first.

    Args:
        target: Device and sizes to run on.
        precision: A key of :data:`.operands.DTYPES`.
    """
    found = []
    bounds = bounds_of(target, precision)
    shapes = [*layers(target.tiny), stem(target.tiny)]
    for layer in sorted(shapes, key=lambda layer: -work(layer)):
        about = _about(target, layer, layer.what, precision, bounds)
        run = functools.partial(_layer, target, layer, precision, about)
        found.append(Case(f"layer {layer.what}", run, about))
    layer = stem(target.tiny)
    about = _about(target, layer, f"{layer.what} + maxpool", precision, bounds)
    about["fusion"] = "block"
    run = functools.partial(_stem, target, layer, precision, about)
    found.insert(1, Case(f"layer {layer.what} + maxpool", run, about))
    return found


def work(layer: Layer) -> int:
    """Elements of the maps that a network's calls of a layer move, for one image.

    Args:
        layer: The convolution.
    """
    maps = layer.channels * layer.size**2 + (2 if layer.add else 1) * layer.filters * layer.out**2
    return layer.occurs * maps


def bounds_of(target: Target, precision: str) -> dict[str, float]:
    """The roofline's microseconds by kernel; empty on a card that it does not know.

    Args:
        target: Device and sizes to run on.
        precision: A key of :data:`.operands.DTYPES`.
    """
    card = card_of(torch.cuda.get_device_name(target.device)) if target.is_card else None
    if card is None:
        return {}
    found: dict[str, Kernel] = {}
    for fusion in ("block", "conv", "none"):
        for kernel in kernels("resnet50", BATCH, precision, fusion):
            found.setdefault(kernel.what, kernel)
    return {what: kernel.seconds(card, precision) * 1e6 for what, kernel in found.items()}


def _about(
    target: Target, layer: Layer, what: str, precision: str, bounds: dict[str, float]
) -> Row:
    row: Row = {"what": what, "model": "resnet50", "batch": batch_of(target), "fusion": "conv"}
    row |= {"precision": precision, "bound": bounds.get(what), "count": layer.occurs}
    return row


def operand_sets(
    target: Target, layer: Layer, precision: str, batch: int | None = None
) -> list[ConvOperands]:
    """Operands to rotate over.

    Args:
        target: Device and sizes to run on.
        layer: The convolution.
        precision: A key of :data:`.operands.DTYPES`.
        batch: Number of images; None for :data:`BATCH`.
    """
    dtype, generator = DTYPES[precision], target.generator()
    batch = batch or batch_of(target)
    maps = layer.channels * layer.size**2 + (2 if layer.add else 1) * layer.filters * layer.out**2
    number = timing.sets(target, batch * maps * dtype.itemsize)
    return [conv_operands(layer, batch, dtype, generator) for _ in range(number)]


def truth_of(layer: Layer, o: ConvOperands) -> Tensor:
    """The exact result of the first images.

    Args:
        layer: The convolution.
        o: Operands of the convolution.
    """
    named = o.double(CHECKED).named()
    return reference.conv_bn_add_relu(
        **named, stride=layer.stride, padding=layer.padding, relu=layer.relu
    )


def _layer(target: Target, layer: Layer, precision: str, about: Row) -> Iterator[Row]:
    with (
        torch.no_grad(),
        target.operators("cuda") as cuda,
        target.operators("triton") as triton,
    ):
        rotating = operand_sets(target, layer, precision)
        builds: dict[str, Callable[[], Sequence[Call]]] = {
            "eager": lambda: [functools.partial(_eager, layer, o) for o in rotating],
            "cudnn": lambda: [fused_cudnn(layer, o) for o in rotating],
            "cuda": lambda: [packed_call(cuda, layer, o) for o in rotating],
            "triton": lambda: [packed_call(triton, layer, o) for o in rotating],
            "live": lambda: [_live(cuda, layer, o) for o in rotating],
        }
        for tile, split in plans.cuda_plans(layer, DTYPES[precision]):
            if split <= TIMED_SPLIT:
                plan = f"tile {tile}, split {split}"
                builds[f"cuda, {plan}"] = functools.partial(_planned, layer, rotating, cuda, plan)
        for config in plans.triton_configs(layer, rotating[0].x):
            if config.split_k == 1:
                builds[f"triton, {plans.config_name(config)}"] = functools.partial(
                    _configured, layer, rotating, config
                )
        error = error_against(truth_of(layer, rotating[0]))
        yield from cell(target, builds, error, LIMITS[precision], about)
        # The convolution without what follows it.
        plain = {"what": layer.conv, "fusion": "none", "bound": None}
        exact = F.conv2d(
            rotating[0].x[:CHECKED].double(), rotating[0].weight.double(), None, layer.stride,
            layer.padding,
        )  # fmt: skip
        yield from cell(
            target,
            {"eager": lambda: [functools.partial(_plain, layer, o) for o in rotating]},
            error_against(exact),
            LIMITS[precision],
            {**about, **plain},
        )


def _planned(layer: Layer, rotating: list[ConvOperands], cuda: Any, plan: str) -> list[Call]:
    return [plans.cuda_calls(layer, o, cuda)[plan] for o in rotating]


def _configured(layer: Layer, rotating: list[ConvOperands], config: Any) -> list[Call]:
    return [plans.triton_call(layer, o, config) for o in rotating]


def packed_call(operators: Any, layer: Layer, o: ConvOperands) -> Call:
    """The operation of a frozen network, by the planner's choice.

    Args:
        operators: Operators of a backend.
        layer: The convolution.
        o: Operands of the convolution.
    """
    return functools.partial(
        operators.conv_bn_add_relu_packed, o.x, o.packed, *o.affine, o.residual,
        list(layer.weight_shape), *layer.geometry, layer.relu,
    )  # fmt: skip


def _live(operators: Any, layer: Layer, o: ConvOperands) -> Call:
    return functools.partial(
        operators.conv_bn_add_relu, o.x, o.weight, None, o.bn_weight, o.bn_bias, o.mean, o.var,
        o.residual, *layer.geometry, EPS, layer.relu,
    )  # fmt: skip


def _plain(layer: Layer, o: ConvOperands) -> Tensor:
    return F.conv2d(o.x, o.weight, None, layer.stride, layer.padding)


def _eager(layer: Layer, o: ConvOperands) -> Tensor:
    """PyTorch's operators one by one, as an unfused network calls them."""
    y = F.batch_norm(_plain(layer, o), o.mean, o.var, o.bn_weight, o.bn_bias, False, 0.0, EPS)
    if o.residual is not None:
        y = y + o.residual
    return y.relu_() if layer.relu else y


def fused_cudnn(layer: Layer, o: ConvOperands) -> Call:
    """cuDNN's fused convolution through PyTorch, the batch norm folded into weight and bias.

    Args:
        layer: The convolution.
        o: Operands of the convolution.
    """
    if o.x.device.type != "cuda":
        raise UnavailableError("cuDNN is for CUDA devices")
    scale, shift = o.affine
    folded = (o.weight.float() * scale.view(-1, 1, 1, 1)).to(o.weight.dtype)
    folded = folded.contiguous(memory_format=torch.channels_last)
    bias = shift.to(o.weight.dtype)
    pairs = [[layer.stride] * 2, [layer.padding] * 2, [1, 1]]
    aten = torch.ops.aten
    if not layer.relu:
        return functools.partial(F.conv2d, o.x, folded, bias, layer.stride, layer.padding)
    if o.residual is None:
        return functools.partial(aten.cudnn_convolution_relu, o.x, folded, bias, *pairs, 1)
    return functools.partial(
        aten.cudnn_convolution_add_relu, o.x, folded, o.residual, 1.0, bias, *pairs, 1
    )


def _stem(target: Target, layer: Layer, precision: str, about: Row) -> Iterator[Row]:
    with (
        torch.no_grad(),
        target.operators("cuda") as cuda,
        target.operators("triton") as triton,
    ):
        rotating = operand_sets(target, layer, precision)

        def pooled(call: Call) -> Call:
            return lambda: F.max_pool2d(call(), 3, 2, 1)

        def packed(operators: Any) -> list[Call]:
            return [
                functools.partial(
                    operators.conv_bn_relu_maxpool_packed, o.x, o.packed, *o.affine,
                    list(layer.weight_shape), *layer.geometry, *_POOL,
                )
                for o in rotating
            ]  # fmt: skip

        builds: dict[str, Callable[[], Sequence[Call]]] = {
            "eager": lambda: [pooled(functools.partial(_eager, layer, o)) for o in rotating],
            "cudnn": lambda: [pooled(fused_cudnn(layer, o)) for o in rotating],
            "cuda": lambda: packed(cuda),
            "triton": lambda: packed(triton),
        }
        exact = F.max_pool2d(truth_of(layer, rotating[0]), 3, 2, 1)
        yield from cell(target, builds, error_against(exact), LIMITS[precision], about)
