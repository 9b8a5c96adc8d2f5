"""Many configurations of Triton's convolution, and all of CUDA's plans, for a few layers.

For a second window, which knows from the first where the kernels are furthest from what they could
be. Processes that only compile may run at the same time; one then times.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from . import plans
from .cases import Case, Row, Target, line, note
from .layers import bounds_of, fused_cudnn, operand_sets, packed_call, truth_of
from .operands import DTYPES
from .providers import LIMITS, cell, error_against
from .shapes import Layer, layers

#: Tiles, depths of a step, warps and stages that are tried.
BLOCKS, DEPTHS, WARPS, STAGES = (64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4, 5)

#: Elements of a tile of which each thread holds a part in registers: at most 128 of a warp's lane.
MOST_OF_A_THREAD = 128

#: Configurations that are timed together.
CHUNK = 12

Call = Callable[[], Any]


def cases(
    target: Target,
    whats: Sequence[str],
    precision: str = "bfloat16",
    compile_only: bool = False,
    shard: int = 0,
    shards: int = 1,
) -> list[Case]:
    """Cases of the named layers.

    Args:
        target: Device and sizes to run on.
        whats: Layers by their names in the roofline.
        precision: A key of :data:`.operands.DTYPES`.
        compile_only: Whether to compile, and to time nothing.
        shard: Index of the part of the cases to return, from 0.
        shards: Number of parts, each for a process of its own.
    """
    bounds = bounds_of(target, precision)
    found = []
    for layer in [layer for layer in layers(target.tiny) if layer.what in whats]:
        about: Row = {"what": layer.what, "precision": precision, "fusion": "sweep"}
        about |= {"batch": 1 if target.tiny else 256, "bound": bounds.get(layer.what)}
        number = -(-len(configs(target, layer, precision)) // CHUNK)
        for chunk in range(number):
            run = functools.partial(_run, target, layer, precision, chunk, compile_only, about)
            found.append(Case(f"sweep {layer.what}, {chunk + 1} of {number}", run, about))
    return found[shard::shards]


def configs(target: Target, layer: Layer, precision: str) -> list[Any]:
    """The configurations of a layer that fit, and that its planner does not know.

    Args:
        target: Device and sizes to run on.
        layer: The convolution.
        precision: A key of :data:`.operands.DTYPES`.
    """
    from ...backends.triton import _conv_plan

    key = precision if precision == "tf32" else "half"
    known = {config[:5] for config in _conv_plan.CONFIGS[key]}
    shared = 48 * 1024
    if target.is_card:
        properties = torch.cuda.get_device_properties(target.device)
        shared = getattr(properties, "shared_memory_per_block_optin", 163 * 1024)
    size = DTYPES[precision].itemsize
    flat = layer.channels < min(DEPTHS)
    found = []
    for m, n, k, warps, stages in itertools.product(BLOCKS, BLOCKS, DEPTHS, WARPS, STAGES):
        fits = stages * (m + n) * k * size <= shared and m * n <= 32 * warps * MOST_OF_A_THREAD
        useful = n <= max(64, layer.filters) and k <= max(32, layer.channels)
        if fits and useful and (m, n, k, warps, stages) not in known:
            descriptors = target.is_card and torch.cuda.get_device_capability(target.device) >= (9,)
            config = _conv_plan.ConvConfig(m, n, k, warps, stages, flat=flat)
            found.append(config._replace(descriptors=descriptors))
    return found[:2] if target.tiny else found


def _run(
    target: Target,
    layer: Layer,
    precision: str,
    chunk: int,
    compile_only: bool,
    about: Row,
) -> Iterator[Row]:
    chosen = configs(target, layer, precision)[chunk * CHUNK : (chunk + 1) * CHUNK]
    with torch.no_grad(), target.operators("triton") as triton, target.operators("cuda") as cuda:
        if compile_only:
            yield from _compile(target, layer, precision, chosen)
            return
        rotating = operand_sets(target, layer, precision)
        builds: dict[str, Callable[[], Sequence[Call]]] = {
            # In each chunk, to compare with under the same clock.
            "cudnn": lambda: [fused_cudnn(layer, o) for o in rotating],
            "triton": lambda: [packed_call(triton, layer, o) for o in rotating],
        }
        if chunk == 0:
            for plan in plans.cuda_calls(layer, rotating[0], cuda):
                builds[f"cuda, {plan}"] = functools.partial(_planned, layer, rotating, cuda, plan)
        for config in chosen:
            builds[f"triton, {plans.config_name(config)}"] = functools.partial(
                _configured, layer, rotating, config
            )
        error = error_against(truth_of(layer, rotating[0]))
        yield from cell(target, builds, error, LIMITS[precision], about)


def _planned(layer: Layer, rotating: Any, cuda: Any, plan: str) -> list[Call]:
    return [plans.cuda_calls(layer, o, cuda)[plan] for o in rotating]


def _configured(layer: Layer, rotating: Any, config: Any) -> list[Call]:
    return [plans.triton_call(layer, o, config) for o in rotating]


def _compile(target: Target, layer: Layer, precision: str, chosen: Sequence[Any]) -> Iterator[Row]:
    (o, *_) = operand_sets(target, layer, precision, 1 if target.tiny else 16)
    failures = []
    for config in chosen:
        try:
            plans.triton_call(layer, o, config)()
            target.synchronize()
        except Exception as error:
            if target.lost():
                raise
            failures.append(f"{plans.config_name(config)}: {line(error)}")
    # A configuration that a compiler rejects is a result, not a failure of the sweep.
    yield note(f"{len(chosen) - len(failures)} of {len(chosen)} compile", log=failures)
