"""The shapes of the conformance suite beside those of tests/cases.py, and operands' layouts.

Without the package under test: the small calls are made in processes that do not import it.
"""

from __future__ import annotations

import torch
from cases import MAPS, Conv
from torch import Tensor

#: Small, and each for a reason: what every build and schedule of the simulator runs.
AWKWARD_MAPS = {
    "one-channel": (3, 1, 5, 5),
    "prime-channels": (2, 37, 5, 3),
    "one-pixel": (5, 16, 1, 1),
    "packs-in-both-formats": (2, 24, 4, 4),
    "two-slabs": (2, 8, 40, 41),
}
#: The other shapes: sizes of a network, and what takes several blocks or chunks.
LARGER_MAPS = {name: shape for name, shape in MAPS.items() if name not in AWKWARD_MAPS}

#: Small, and each for a reason: what every build and schedule of the simulator runs.
AWKWARD = [
    Conv("packs", (1, 16, 6, 5), 24, args={"padding": 1}),
    Conv("no-packs", (1, 3, 6, 5), 5, args={"padding": 1}),
    Conv("packs-in-only", (1, 8, 4, 4), 7, (1, 1)),
    Conv("packs-out-only", (1, 5, 4, 4), 8, (1, 1)),
    Conv("groups-of-packs", (1, 32, 4, 5), 32, args={"padding": 1, "groups": 2}),
    Conv("groups-of-four", (1, 8, 4, 5), 8, args={"padding": 1, "groups": 2}),
    Conv("taps-in-one-step", (2, 8, 5, 5), 8, args={"padding": 2, "dilation": 2, "stride": 2}),
]
#: Several tiles of every size in each direction, the last ones not full.
PLANNED = Conv("planned", (1, 72, 11, 13), 136, args={"padding": 1})

RESNET = {"stride": 2, "padding": 3}

#: Pixels at even places and at odd ones take different ways through CUDA's kernel, and so do rows
#: of whole chunks of 16 bytes, other even rows, and odd ones. A block takes several tiles in turn.
STEMS = [
    Conv("resnet", (1, 3, 64, 64), 64, (7, 7), RESNET),
    Conv("odd", (2, 3, 45, 37), 64, (7, 7), RESNET),
    Conv("few-channels-out", (1, 3, 23, 21), 20, (7, 7), RESNET),
    Conv("two-blocks-of-channels", (1, 3, 21, 23), 72, (7, 7), RESNET),
    Conv("odd-places", (1, 3, 13, 15), 16, (3, 3), {"padding": 1}),
    Conv("odd-places-dilated", (1, 3, 17, 15), 16, (3, 3), {"padding": 2, "dilation": 2}),
    Conv(
        "even-places-dilated", (1, 4, 17, 15), 16, (3, 3), {"padding": (1, 3), "dilation": (1, 3)}
    ),
    Conv("deep-stem", (1, 32, 14, 14), 33, (3, 3), {"padding": 1}),
    Conv("one-channel", (2, 1, 12, 12), 8, (5, 5), {"stride": 2, "padding": 2}),
    Conv("oblong", (1, 3, 11, 26), 24, (3, 5), {"stride": (1, 3), "padding": (0, 2)}),
    Conv("one-pixel", (3, 3, 1, 1), 16, (7, 7), RESNET),
    Conv("1x1", (1, 8, 9, 7), 16, (1, 1)),
    Conv("even-rows-of-no-chunks", (1, 3, 19, 22), 16, (7, 7), RESNET),
    Conv("tiles-in-turn", (50, 3, 8, 8), 8, (3, 3), {"stride": 2, "padding": 1}),
]
#: Windows that overlap, that leave gaps, oblong ones, and a single pixel.
POOLS = [
    {"pool_kernel": 2, "pool_stride": 2, "pool_padding": 0},
    {"pool_kernel": (3, 2), "pool_stride": (1, 2), "pool_padding": (1, 0)},
    {"pool_kernel": 2, "pool_stride": 3, "pool_padding": 1},
    {"pool_kernel": 1, "pool_stride": 1, "pool_padding": 0},
    {"pool_kernel": (4, 7), "pool_stride": (3, 1), "pool_padding": (2, 3)},
]
#: What no kernel takes in one piece, by the arguments of :func:`check`.
TWO_STEPS = {
    "groups": (Conv("groups", (1, 4, 9, 9), 8, (3, 3), {"groups": 2}), {}),
    "large-window": (
        Conv("large-window", (1, 3, 20, 20), 8, (3, 3)),
        {"pool_kernel": 17, "pool_stride": 1},
    ),
}


def pair(v: int | tuple[int, int]) -> list[int]:
    return list(v) if isinstance(v, tuple) else [v, v]


def geometry(case: Conv) -> tuple:
    """Stride, padding, dilation and groups as the operators take them."""
    args = case.args
    pairs = [args.get("stride", 1), args.get("padding", 0), args.get("dilation", 1)]
    return *map(pair, pairs), args.get("groups", 1)


def window(pool: dict) -> list:
    names, default = ("pool_kernel", "pool_stride", "pool_padding"), (3, 2, 1)
    return [pair(pool.get(n, d)) for n, d in zip(names, default, strict=True)]


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def packed(weight: Tensor) -> Tensor:
    """[k][kh][kw][c] as a GPU's kernels read it, said without the code under test."""
    return weight.permute(0, 2, 3, 1).reshape(-1)
