"""Every plan of the convolution with its batch norm, addition and ReLU, against float64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...backends import reference
from ...tuning.tf32 import tf32_set_to
from . import plans
from .accuracy import check
from .cases import Case, Row, Target, UnavailableError, line
from .operands import DTYPES, ConvOperands, conv_operands
from .shapes import Layer, layers, stem

#: Images of a check: as a multiple of 16 pixels it has the kernels of larger batches.
BATCH = 16

#: The precisions in order of importance.
PRECISIONS = ("bfloat16", "float16", "tf32", "float32")


def batch_of(target: Target) -> int:
    """Number of images.

    Args:
        target: Device and sizes to run on.
    """
    return 1 if target.tiny else BATCH


def precisions(target: Target) -> tuple[str, ...]:
    """The precisions of the checks.

    Args:
        target: Device and sizes to run on; PyTorch has no tf32 on a CPU to compare with.
    """
    return ("bfloat16",) if target.tiny else PRECISIONS


def cases(target: Target, backend: str, shard: int = 0, shards: int = 1) -> list[Case]:
    """The cases of a backend: each convolution of ResNet-50 in each precision.

    Args:
        target: Device and sizes to run on.
        backend: ``"cuda"`` or ``"triton"``.
        shard: Index of the part of the cases to return, from 0.
        shards: Number of parts, each for a process of its own.
    """
    found = []
    shapes = [*layers(target.tiny), stem(target.tiny)]
    for precision in precisions(target):
        # A float32 convolution on the ordinary cores takes long: one of each kind is enough.
        for layer in shapes if precision != "float32" else shapes[:3]:
            about = {"operation": "conv_bn_add_relu", "what": layer.what}
            about |= {"backend": backend, "precision": precision}
            run = functools.partial(_run, target, layer, backend, precision, about)
            found.append(Case(f"{backend}: {layer.what}, {precision}", run, about))
    return found[shard::shards]


def _run(target: Target, layer: Layer, backend: str, precision: str, about: Row) -> Iterator[Row]:
    with torch.no_grad(), tf32_set_to(precision == "tf32"), target.operators(backend) as operators:
        o = conv_operands(layer, batch_of(target), DTYPES[precision], target.generator())
        eager, truth = _eager(layer, o), _eager(layer, o.double())
        # The stem's input has no whole packs: of CUDA's tiles the last one takes it.
        calls = (
            plans.cuda_calls(layer, o, operators)
            if backend == "cuda"
            else plans.triton_calls(layer, o)
        )
        calls["the planner's choice"] = functools.partial(
            operators.conv_bn_add_relu_packed, o.x, o.packed, *o.affine, o.residual,
            list(layer.weight_shape), *layer.geometry, layer.relu,
        )  # fmt: skip
        calls["live"] = functools.partial(
            operators.conv_bn_add_relu, o.x, o.weight, None, o.bn_weight, o.bn_bias, o.mean, o.var,
            o.residual, *layer.geometry, 1e-5, layer.relu,
        )  # fmt: skip
        for plan, call in calls.items():
            yield compared(target, call, [eager], [truth], o.x.dtype, {**about, "plan": plan})
        about = {**about, "operation": "conv_statistics", "plan": "the planner's choice"}
        own, exact = _statistics(layer, o), _statistics(layer, o.double())
        statistics = functools.partial(
            operators.conv_statistics, o.x, o.weight, None, *layer.geometry
        )
        yield compared(target, statistics, own, exact, o.x.dtype, about)


def _eager(layer: Layer, o: ConvOperands) -> Tensor:
    return reference.conv_bn_add_relu(
        **o.named(), stride=layer.stride, padding=layer.padding, relu=layer.relu
    )


def _statistics(layer: Layer, o: ConvOperands) -> list[Tensor]:
    z = torch.nn.functional.conv2d(o.x, o.weight, None, layer.stride, layer.padding)
    wide = z if z.dtype is torch.float64 else z.float()
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    return [z, mean, var]


def compared(
    target: Target,
    call: Callable[[], Any],
    eager: list[Tensor],
    truth: list[Tensor],
    dtype: torch.dtype,
    about: Row,
) -> Row:
    """A row for one call; a failure of the call is a row too, unless the device is lost.

    Args:
        target: Device and sizes to run on.
        call: Returns a tensor or several.
        eager: PyTorch's own results in the same dtype.
        truth: Results in float64.
        dtype: Storage type of the maps.
        about: Keys of the row.
    """
    try:
        result = call()
        results = [result] if isinstance(result, Tensor) else list(result)
        target.synchronize()
        return check(results[: len(truth)], eager, truth, dtype, about)
    except UnavailableError as error:
        return {"kind": "check", **about, "status": "unavailable", "reason": str(error)}
    except Exception as error:
        if target.lost():
            raise
        return {"kind": "check", **about, "status": "failed", "reason": line(error)}
