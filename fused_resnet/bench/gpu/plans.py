"""The plans of a convolution that planners may choose: CUDA's tiles and splits, Triton's tiles.

Needs no built extension for Triton's plans, so that they can be compiled while it is being built.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .operands import ConvOperands
from .shapes import Layer

Call = Callable[[], Tensor]

#: The table of csrc/cuda/conv_tiles.cuh, and the limits of its planner: bytes of a step, the fewest
#: steps of a part, and the most parts.
CUDA_TILES, STAGE_ROW_BYTES, LEAST_STEPS, MOST_SPLITS = 3, 64, 8, 16


def cuda_plans(layer: Layer, dtype: torch.dtype) -> list[tuple[int, int]]:
    """Tile and split of every plan that CUDA's planner may choose.

    Args:
        layer: The convolution.
        dtype: Storage type.
    """
    pack = 16 // dtype.itemsize
    first = 0 if layer.channels % pack == 0 else CUDA_TILES - 1
    steps = -(-layer.depth * dtype.itemsize // STAGE_ROW_BYTES)
    most = min(MOST_SPLITS, steps // LEAST_STEPS)
    splits = [1, *(2**i for i in range(1, 5) if 2**i <= most)]
    return [(tile, split) for tile in range(first, CUDA_TILES) for split in splits]


def cuda_calls(layer: Layer, o: ConvOperands, operators: Any) -> dict[str, Call]:
    """A call for each plan of CUDA's kernels, by the plan's name.

    Args:
        layer: The convolution.
        o: Operands of the convolution.
        operators: Operators of the backend ``cuda``.
    """
    packed, (scale, shift) = o.packed, o.affine
    return {
        f"tile {tile}, split {split}": functools.partial(
            operators.conv_bn_add_relu_planned, o.x, packed, scale, shift, o.residual, None, None,
            list(layer.weight_shape), *layer.geometry, layer.relu, tile, split,
        )
        for tile, split in cuda_plans(layer, o.x.dtype)
    }  # fmt: skip


def triton_configs(layer: Layer, x: Tensor) -> list[Any]:
    """Every configuration that Triton's planner may choose, and the persistent ones.

    Args:
        layer: The convolution.
        x: Input of the convolution.
    """
    from ...backends.triton import _conv_plan
    from ...backends.triton._conv_shape import conv_shape

    s = conv_shape("conv_bn_add_relu", x, layer.weight_shape, *layer.geometry)
    return list(_conv_plan.candidates(s, x))


def config_name(config: Any) -> str:
    """A configuration as a person would say it.

    Args:
        config: A named tuple of a Triton kernel's tile.
    """
    fields = config._asdict()
    sizes = "x".join(str(fields[key]) for key in ("block_m", "block_n", "block_k"))
    name = f"{sizes}, {fields['warps']} warps, {fields['stages']} stages"
    name += f", split {fields['split_k']}" if fields.get("split_k", 1) > 1 else ""
    return name + (", persistent" if fields.get("persistent") else "")


def triton_call(layer: Layer, o: ConvOperands, config: Any) -> Call:
    """A call of Triton's convolution.

    Args:
        layer: The convolution.
        o: Operands of the convolution.
        config: The configuration; None leaves the choice to the planner.
    """
    from ...backends import triton as kernels

    convolution: Any = kernels.conv_bn_add_relu_packed
    return functools.partial(
        convolution, o.x, o.packed, *o.affine, o.residual, layer.weight_shape,
        *layer.geometry, layer.relu, config=config,
    )  # fmt: skip


def triton_calls(layer: Layer, o: ConvOperands) -> dict[str, Call]:
    """A call for each configuration of Triton's kernel, by its name.

    Args:
        layer: The convolution.
        o: Operands of the convolution.
    """
    return {config_name(c): triton_call(layer, o, c) for c in triton_configs(layer, o.x)}
