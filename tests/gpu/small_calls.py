"""Small calls of every operator, for tools that slow a device down or replace it.

Each is a label, an operator's name, its arguments on the CPU, and whether float32 is tf32. Shapes
are the simulator's awkward ones: in them lie most edges of tiles, packs and pipelines.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from cases import FORMATS, Conv, batch_norm, conv_weight, normal
from precisions import PRECISIONS, TF32, Precision
from shapes import AWKWARD, AWKWARD_MAPS, PLANNED, STEMS, channels_last, geometry
from shapes import packed as _packed
from torch import Tensor

EPS = 1e-5
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALVES = PRECISIONS[:2]

#: The two ways of the stem's pixels, more channels than a block has, and rows that come by chunks.
SMALL_STEMS = [STEMS[2], STEMS[4], STEMS[3], STEMS[12]]


class Call(NamedTuple):
    label: str
    operator: str
    arguments: tuple[Any, ...]
    tf32: bool = False


def calls() -> Iterator[Call]:
    """All of them, the same numbers every time."""
    torch.manual_seed(0)
    yield from _batch_norms()
    yield from _ends_of_blocks()
    for precision in PRECISIONS:
        yield from _convolutions(precision)
        yield from _training_convolutions(precision)
        yield from _blocks(precision)
    for precision in (*HALVES, TF32):
        yield from _stems(precision)


def _batch_norms() -> Iterator[Call]:
    for dtype in DTYPES:
        for fmt, layout in FORMATS.items():
            for name, shape in AWKWARD_MAPS.items():
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


def _ends_of_blocks() -> Iterator[Call]:
    """In training, by packs and by elements; and the numbers of batch norms."""
    for dtype in DTYPES:
        for name, shape in AWKWARD_MAPS.items():
            label = f"{name} {dtype}"
            z, s, dy = (channels_last(t) for t in normal(3, *shape, dtype=dtype, shift=0.3))
            scale, shift, mean, other = (torch.randn(shape[1]) for _ in range(4))
            yield Call(label, "block_end", (z, scale, shift, s, other, mean, 1))
            yield Call(label, "block_end_backward", (dy, s, z, mean, s, other, True, 1))
    mean, var, weight, bias = batch_norm(300, torch.float32)
    yield Call("300", "bn_coefficients", (mean, var, weight, bias, EPS))
    running = (mean.clone(), var.clone())
    yield Call("300", "bn_update_running", (weight, bias.abs(), *running, 0.1, 20))
    yield Call("300", "bn_backward_coefficients", (bias, mean, mean, var, weight, EPS, 20))


def _training_convolutions(precision: Precision) -> Iterator[Call]:
    """With a prologue, and a data gradient, whose windows go backwards from outside of the map."""
    for case in (
        Conv("3x3", (1, 16, 7, 6), 24, args={"padding": 1}),
        Conv("no packs, dilated", (2, 5, 8, 7), 7, args={"padding": 2, "dilation": 2}),
    ):
        x, w, _ = _operands(case, precision.dtype)
        place, label = geometry(case), f"{case} {precision}"
        scale, shift, mean = (torch.randn(case.x[1]) for _ in range(3))
        a, b, c = (torch.randn(case.k) for _ in range(3))
        g, z = (
            channels_last(t)
            for t in normal(2, case.x[0], case.k, *case.x[2:], dtype=precision.dtype)
        )
        arguments = (x, scale, shift, w, *place, True, False)
        yield Call(label, "conv_forward", arguments, precision.tf32)
        arguments = (g, z, a, b, c, x, scale, shift, mean, w, None, *place)
        flags = (True, False, True, False)  # PyTorch's weight gradient is not asked for
        yield Call(label, "conv_backward", (*arguments, *flags), precision.tf32)


def _convolutions(precision: Precision) -> Iterator[Call]:
    dtype, tf32 = precision.dtype, precision.tf32
    for case in AWKWARD:
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
    for tile in (0, 1, 2):
        alone = (*fixed[:4], None, *fixed[5:], *geometry(PLANNED), True, tile, 1)
        label = f"{tile=} without a residual {precision}"
        yield Call(label, "conv_bn_add_relu_planned", alone, tf32)
    yield from _large_statistics(precision)
    yield from _sums_of_two(precision)
    yield Call(
        str(precision),
        "conv_bn_add_relu_packed",
        (x, _packed(w), bn[0], bn[1], residual, list(w.shape), *geometry(PLANNED), True),
        tf32,
    )


def _large_statistics(precision: Precision) -> Iterator[Call]:
    """By tiles that are large, for the simulator's eight multiprocessors."""
    for k in (64, 128):
        case = Conv(f"{k} filters", (1, 16, 64, 64), k, (1, 1))
        x, w, _ = _operands(case, precision.dtype)
        arguments = (x, w, None, *geometry(case))
        yield Call(f"{case} {precision}", "conv_statistics", arguments, precision.tf32)


def _sums_of_two(precision: Precision) -> Iterator[Call]:
    """A sum that is split, and filters that fill no pack."""
    for case in (
        Conv("deep", (1, 128, 3, 3), 24, args={"padding": 1}),
        Conv("no packs out", (1, 16, 5, 5), 10, args={"padding": 1}),
    ):
        x, w, _ = _operands(case, precision.dtype)
        second = channels_last(normal(1, 16, *case.x[2:], dtype=precision.dtype))
        both = normal(w.numel() + case.k * 16, dtype=precision.dtype, scale=0.05)
        arguments = (x, second, both, torch.randn(case.k), list(w.shape), *geometry(case)[:3])
        label = f"{case} {precision}"
        yield Call(label, "conv_conv_add_relu_packed", (*arguments, [1, 1], 1), precision.tf32)


def _operands(case: Conv, dtype: torch.dtype) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    x = channels_last(normal(*case.x, dtype=dtype))
    return x, channels_last(conv_weight(case, dtype)), batch_norm(case.k, dtype)


def _blocks(precision: Precision) -> Iterator[Call]:
    """With 64 and 128 middle channels, of which the last two convolutions are one kernel, and not.

    The last ones have their shortcuts concatenated to their last convolutions, whose tiles are
    large where maps are, for the simulator's eight multiprocessors.
    """
    small, large = (9, 7), (64, 64)
    for channels, widths, stride, concatenated, size in (
        (64, [64, 64, 256], 1, False, small),
        (72, [128, 128, 72], 2, False, small),
        (24, [16, 24, 40], 2, False, small),
        (24, [16, 40], 2, False, small),
        (24, [16, 24, 40], 2, True, small),
        (16, [16, 16, 64], 1, True, large),
        (16, [16, 16, 128], 1, True, large),
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
        if concatenated:
            parts = [
                (w.double() * s.double().view(-1, 1, 1, 1)).permute(0, 2, 3, 1).flatten(1)
                for w, s in zip(weights[-2:], scale[-2:], strict=True)
            ]
            both = (torch.cat(parts, 1).to(precision.dtype).flatten(), shift[-2] + shift[-1])
        x = channels_last(normal(1, channels, *size, dtype=precision.dtype))
        packed = [_packed(w) for w in weights]
        rest = (len(widths) == 3, stride, 1, 1, False)
        label = f"{channels} to {widths}{', concatenated' if concatenated else ''} {precision}"
        arguments = (x, packed, scale, shift, *both, *rest)
        yield Call(label, "residual_block", arguments, precision.tf32)


def _stems(precision: Precision) -> Iterator[Call]:
    for case in SMALL_STEMS:
        x, w, bn = _operands(case, precision.dtype)
        arguments = (x, w, None, *bn, *geometry(case), EPS, [3, 3], [2, 2], [1, 1])
        label = f"{case} {precision}"
        yield Call(label, "conv_bn_relu_maxpool", arguments, precision.tf32)
