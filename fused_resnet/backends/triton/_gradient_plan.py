"""The tiles of the gradients' kernels, and which of them a convolution gets."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ._common import cdiv, multiprocessors
from ._conv_plan import precision_of
from ._conv_shape import ConvShape


class DataConfig(NamedTuple):
    """A tile of the data gradient.

    Attributes:
        block_m: Pixels of the input.
        block_n: Channels of the input.
        block_k: Filters of a step.
        warps: Warps of the program.
        stages: Stages of its pipeline.
        parts: Column blocks of its epilogue.
        sixteens: Whether it takes multiples of 16 channels alone: with others ptxas spills.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    parts: int = 1
    sixteens: bool = False


class WeightConfig(NamedTuple):
    """A tile of the weight gradient.

    Attributes:
        block_k: Filters.
        block_c: Channels.
        block_r: Pixels of a step.
        warps: Warps of the program.
        stages: Stages of its pipeline.
        splits: Parts of the pixels.
        sixteens: Whether it takes multiples of 16 channels and filters alone: with others ptxas
            spills.
    """

    block_k: int
    block_c: int
    block_r: int
    warps: int
    stages: int
    splits: int = 1
    sixteens: bool = False


#: By the precision of products, from the largest. A step of the data gradient loads two maps for
#: one operand, g and z, and computes it: tiles are smaller than the forward's, for its registers.
DATA_CONFIGS: dict[str, list[DataConfig]] = {
    "half": [
        DataConfig(128, 128, 64, 8, 2, 4, sixteens=True),
        DataConfig(128, 64, 64, 8, 2, 2, sixteens=True),
        DataConfig(64, 64, 32, 4, 3),
    ],
    "tf32": [
        DataConfig(128, 64, 32, 8, 2, 2, sixteens=True),
        DataConfig(64, 64, 32, 4, 2, sixteens=True),
        DataConfig(64, 64, 32, 8, 2),
    ],
    "ieee": [DataConfig(64, 32, 16, 4, 2, sixteens=True), DataConfig(64, 16, 16, 4, 2)],
}
WEIGHT_CONFIGS: dict[str, list[WeightConfig]] = {
    "half": [
        WeightConfig(128, 128, 32, 8, 2, sixteens=True),
        WeightConfig(64, 64, 64, 4, 2, sixteens=True),
        WeightConfig(64, 64, 32, 4, 2),
    ],
    "tf32": [WeightConfig(64, 64, 32, 4, 2)],
    "ieee": [WeightConfig(32, 32, 16, 4, 2)],
}

#: Programs for each multiprocessor at which a larger tile is preferred, and which splits make.
WAVES = 2

#: Steps of a part of the pixels at least: fewer would mostly fill the pipeline.
LEAST_STEPS = 8


def fitting_data(s: ConvShape, precision: str) -> list[DataConfig]:
    """The tiles of the data gradient that the input's channels fill, from the largest.

    Args:
        s: Sizes of the convolution.
        precision: A key of :data:`DATA_CONFIGS`.
    """
    *larger, smallest = DATA_CONFIGS[precision]
    rough = s.c % 16 != 0
    full = [c for c in larger if 2 * s.c > c.block_n and not (rough and c.sixteens)]
    return [*full, smallest]


def fitting_weight(s: ConvShape, precision: str) -> list[WeightConfig]:
    """The tiles of the weight gradient that filters and channels fill, from the largest.

    Args:
        s: Sizes of the convolution.
        precision: A key of :data:`WEIGHT_CONFIGS`.
    """
    rough = s.c % 16 != 0 or s.k % 16 != 0
    full = [c for c in WEIGHT_CONFIGS[precision] if not (rough and c.sixteens)]
    # Of the smallest tiles a part may be empty.
    least = min(c.block_k for c in full)
    return [c for c in full if c.block_k == least or (s.k >= c.block_k and s.c >= c.block_c)]


def plan_data(s: ConvShape, x: Tensor) -> DataConfig:
    """The largest tile that no axis leaves half empty and that gives every multiprocessor work.

    Args:
        s: Sizes of the convolution.
        x: Input of the convolution.
    """
    *larger, smallest = fitting_data(s, precision_of(x))
    for config in larger:
        tiles = cdiv(s.n * s.h * s.w, config.block_m) * cdiv(s.c, config.block_n)
        if tiles >= multiprocessors(x):
            return config
    return smallest


def plan_weight(s: ConvShape, x: Tensor) -> WeightConfig:
    """The tile, and as many parts of the pixels as give every multiprocessor work.

    Args:
        s: Sizes of the convolution.
        x: Input of the convolution.
    """
    config = fitting_weight(s, precision_of(x))[0]
    tiles = cdiv(s.k, config.block_k) * cdiv(s.c, config.block_c) * s.kh * s.kw
    wanted = cdiv(WAVES * multiprocessors(x), tiles)
    most = max(1, cdiv(s.rows, config.block_r) // LEAST_STEPS)
    return config._replace(splits=min(wanted, most))
