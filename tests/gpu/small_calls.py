"""Small calls of every operator, for tools that slow a device down or replace it.

Each is a label, an operator's name, its arguments on the CPU, and whether float32 is tf32. Shapes
are the simulator's awkward ones: in them lie most edges of tiles, packs and pipelines.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from cases import FORMATS, Conv, batch_norm, conv_weight, normal
from precisions import PRECISIONS, Precision
from torch import Tensor

EPS = 1e-5
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALVES = PRECISIONS[:2]

CONVS = [
    Conv("packs", (1, 16, 6, 5), 24, args={"padding": 1}),
    Conv("no-packs", (1, 3, 6, 5), 5, args={"padding": 1}),
    Conv("packs-in-only", (1, 8, 4, 4), 7, (1, 1)),
    Conv("packs-out-only", (1, 5, 4, 4), 8, (1, 1)),
    Conv("groups-of-packs", (1, 32, 4, 5), 32, args={"padding": 1, "groups": 2}),
    Conv("groups-of-four", (1, 8, 4, 5), 8, args={"padding": 1, "groups": 2}),
    Conv("strided-dilated", (2, 8, 5, 5), 8, args={"padding": 2, "dilation": 2, "stride": 2}),
]
PLANNED = Conv("planned", (1, 72, 11, 13), 136, args={"padding": 1})
STEMS = [
    Conv("stem", (1, 3, 23, 21), 20, (7, 7), {"stride": 2, "padding": 3}),
    Conv("odd-places", (1, 3, 13, 15), 16, (3, 3), {"padding": 1}),
    Conv("two-blocks-of-channels", (1, 3, 21, 23), 72, (7, 7), {"stride": 2, "padding": 3}),
]
MAPS = {
    "one-channel": (3, 1, 5, 5),
    "prime-channels": (2, 37, 5, 3),
    "one-pixel": (5, 16, 1, 1),
    "packs-in-both-formats": (2, 24, 4, 4),
    "two-slabs": (2, 8, 40, 41),
}


class Call(NamedTuple):
    label: str
    operator: str
    arguments: tuple[Any, ...]
    tf32: bool = False


def calls() -> Iterator[Call]:
    """All of them, the same numbers every time."""
    torch.manual_seed(0)
    yield from _batch_norms()
    for precision in PRECISIONS:
        yield from _convolutions(precision)
        yield from _blocks(precision)
    for precision in HALVES:
        yield from _stems(precision)


def _batch_norms() -> Iterator[Call]:
    for dtype in DTYPES:
        for fmt, layout in FORMATS.items():
            for name, shape in MAPS.items():
                label = f"{name} {fmt} {dtype}"
                x, r, grad = (
                    t.contiguous(memory_format=layout)
                    for t in normal(3, *shape, dtype=dtype, shift=0.3)
                )
                bn = weight, _, mean, var = batch_norm(shape[1], dtype)
                yield Call(label, "bn_add_relu", (x, *bn, r, False, EPS, True))
                yield Call(f"training {label}", "bn_add_relu", (x, *bn, None, True, EPS, False))
                for training in (False, True):
                    flags = (training, EPS, True, True)
                    arguments = (grad, x, r, weight, mean, var, *flags)
                    yield Call(f"{training=} {label}", "bn_add_relu_backward", arguments)


def geometry(case: Conv) -> tuple[Any, ...]:
    """Stride, padding, dilation and groups as the operators take them."""
    pairs = [case.args.get(n, d) for n, d in (("stride", 1), ("padding", 0), ("dilation", 1))]
    return (*([v, v] if isinstance(v, int) else list(v) for v in pairs), case.args.get("groups", 1))


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _packed(weight: Tensor) -> Tensor:
    return weight.permute(0, 2, 3, 1).reshape(-1)


def _convolutions(precision: Precision) -> Iterator[Call]:
    dtype, tf32 = precision.dtype, precision.tf32
    for case in CONVS:
        label = f"{case} {precision}"
        x, w, bn = _operands(case, dtype)
        place = geometry(case)
        yield Call(label, "conv_bn_add_relu", (x, w, None, *bn, None, *place, EPS, True), tf32)
        yield Call(label, "conv_statistics", (x, w, None, *place), tf32)
    x, w, bn = _operands(PLANNED, dtype)
    residual = channels_last(normal(1, 136, 11, 13, dtype=dtype))
    fixed = (x, _packed(w), bn[0], bn[1], residual, None, None, list(w.shape))
    for tile in (0, 1, 2):
        for split_k in (1, 3):
            arguments = (*fixed, *geometry(PLANNED), True, tile, split_k)
            label = f"{tile=} {split_k=} {precision}"
            yield Call(label, "conv_bn_add_relu_planned", arguments, tf32)
    yield Call(
        str(precision),
        "conv_bn_add_relu_packed",
        (x, _packed(w), bn[0], bn[1], residual, list(w.shape), *geometry(PLANNED), True),
        tf32,
    )


def _operands(case: Conv, dtype: torch.dtype) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    x = channels_last(normal(*case.x, dtype=dtype))
    return x, channels_last(conv_weight(case, dtype)), batch_norm(case.k, dtype)


def _blocks(precision: Precision) -> Iterator[Call]:
    """With 64 and 128 middle channels, of which the last two convolutions are one kernel, and not.

    The last one has its shortcut joined to its last convolution.
    """
    for channels, widths, stride, joined in (
        (64, [64, 64, 256], 1, False),
        (72, [128, 128, 72], 2, False),
        (24, [16, 24, 40], 2, False),
        (24, [16, 40], 2, False),
        (24, [16, 24, 40], 2, True),
    ):
        sizes = [1, 3, 1] if len(widths) == 3 else [3, 3]
        ins, outs, kernels = [channels, *widths[:-1], channels], [*widths, widths[-1]], [*sizes, 1]
        weights = [
            normal(k, c, s, s, dtype=precision.dtype, scale=(c * s * s) ** -0.5)
            for k, c, s in zip(outs, ins, kernels, strict=True)
        ]
        scale = [torch.rand(k) + 0.5 for k in outs]
        shift = [torch.randn(k) * 0.1 for k in outs]
        both = (None, None)
        if joined:
            parts = [
                (w.double() * s.double().view(-1, 1, 1, 1)).permute(0, 2, 3, 1).flatten(1)
                for w, s in zip(weights[-2:], scale[-2:], strict=True)
            ]
            both = (torch.cat(parts, 1).to(precision.dtype).flatten(), shift[-2] + shift[-1])
        x = channels_last(normal(1, channels, 9, 7, dtype=precision.dtype))
        packed = [_packed(w) for w in weights]
        rest = (len(widths) == 3, stride, 1, 1, False)
        label = f"{channels} to {widths}{', joined' if joined else ''} {precision}"
        arguments = (x, packed, scale, shift, *both, *rest)
        yield Call(label, "residual_block", arguments, precision.tf32)


def _stems(precision: Precision) -> Iterator[Call]:
    for case in STEMS:
        x, w, bn = _operands(case, precision.dtype)
        arguments = (x, w, None, *bn, *geometry(case), EPS, [3, 3], [2, 2], [1, 1])
        yield Call(f"{case} {precision}", "conv_bn_relu_maxpool", arguments)
