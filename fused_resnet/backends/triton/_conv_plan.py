"""The tile of a convolution: the table of configurations, and a model of their cost."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...tuning.tf32 import conv_allows_tf32
from ._common import architecture, cdiv, multiprocessors
from ._conv_shape import ConvShape


class ConvConfig(NamedTuple):
    """A tile of the implicit GEMM.

    Attributes:
        block_m: Pixels.
        block_n: Filters.
        block_k: Depth of a step.
        warps: Warps of the program.
        stages: Stages of its pipeline.
        since: The oldest architecture with enough registers for it.
        flat: Whether it may traverse (ky, kx, c) as one axis, which takes more registers.
        split_k: Number of programs among which the depth is split.
        descriptors: Whether tiles are loaded by tensor descriptors (TMA) where possible.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    since: int = 80
    flat: bool = False
    split_k: int = 1
    descriptors: bool = False


#: By the precision of products. A step is 128 bytes deep, as swizzled shared memory and one wgmma
#: of each warp group need; the tiles for few channels are 64 bytes deep. The large tiles do 64 to
#: 85 flops per byte loaded, so they are bound by the tensor cores; those of 64 pixels give enough
#: programs on small maps, and those of 16 filters are for narrow groups. Strict float32 runs on the
#: CUDA cores, whose operands are in registers: they have room for 64 x 64.
CONFIGS: dict[str, list[ConvConfig]] = {
    "half": [
        ConvConfig(128, 256, 64, 8, 3, since=90),
        ConvConfig(128, 128, 64, 8, 3),
        ConvConfig(128, 64, 64, 4, 4),
        ConvConfig(64, 128, 64, 4, 4),
        ConvConfig(64, 64, 64, 4, 4),
        ConvConfig(128, 64, 32, 8, 4, flat=True),
        ConvConfig(64, 64, 32, 4, 4, flat=True),
        ConvConfig(128, 16, 32, 8, 4, flat=True),
    ],
    "tf32": [
        ConvConfig(128, 128, 32, 8, 3),
        ConvConfig(128, 64, 32, 8, 3, flat=True),
        ConvConfig(64, 64, 32, 4, 4, flat=True),
        ConvConfig(128, 16, 32, 8, 3, flat=True),
    ],
    "ieee": [
        ConvConfig(64, 64, 16, 8, 3),
        ConvConfig(64, 32, 16, 4, 3, flat=True),
        ConvConfig(64, 16, 16, 4, 3, flat=True),
    ],
}

#: Values of split_k, and the minimum number of steps of each split: fewer would mostly fill the
#: pipeline.
SPLITS, LEAST_STEPS = (1, 2, 4, 8, 16), 4

#: Pixels, filters and warps of the kernel that adds the splits.
FINISH_TILE = (32, 64, 4)

#: Rows of tiles that run concurrently, so that they share filters and pixels in the L2 cache.
GROUP_M = 8


def precision_of(x: Tensor) -> str:
    """The precision of products for a map: a key of :data:`CONFIGS`."""
    if x.dtype is not torch.float32:
        return "half"
    return "tf32" if conv_allows_tf32() else "ieee"


def mode_of(s: ConvShape, config: ConvConfig) -> str:
    """How a kernel traverses the depth.

    ``"pointwise"``: pixels of the input are those of the result. ``"taps"``: tap by tap, in blocks
    of channels. ``"flat"``: over (ky, kx, c) as one axis, where the channels would fill only a part
    of a block.
    """
    if config.flat and s.group_c < config.block_k and s.depth > s.group_c:
        return "flat"
    return "pointwise" if s.pointwise else "taps"


def steps_of(s: ConvShape, config: ConvConfig) -> int:
    """Number of blocks in the depth."""
    if mode_of(s, config) == "flat":
        return cdiv(s.depth, config.block_k)
    return s.kh * s.kw * cdiv(s.group_c, config.block_k)


def tap_channels(s: ConvShape) -> int:
    """The channels of a tap as a constant of the kernel, which divides by them; 0 for a single tap.

    Each value compiles a kernel, so those who never divide, 1x1 convolutions, share one. Kernels
    of 3x3 have as many as a network has widths: four in a ResNet.
    """
    return s.group_c if s.kh * s.kw > 1 else 0


def parts_of(config: ConvConfig) -> int:
    """Column blocks of a tile's epilogue: of 32 columns for 128 rows, or of 64 for 64 rows."""
    return min(4, max(1, config.block_m * config.block_n // 4096))


def _shared_limit(x: Tensor) -> int:
    if not x.is_cuda:
        return 163 * 1024
    properties = triton.runtime.driver.active.utils.get_device_properties(x.device.index)
    return properties["max_shared_mem"]


def cost(s: ConvShape, config: ConvConfig, precision: str, processors: int, second: int) -> float:
    """Estimated clock cycles until the last multiprocessor is done.

    The constants are round numbers for GPUs since 2020, of which only the ratios matter: products
    per cycle; bytes per cycle and multiprocessor; cycles to fill a pipeline and to drain it through
    the epilogue; cycles of a second launch. A tile's share of the peak grows with its flops per
    byte, and is lower where elements are gathered one by one.

    Args:
        s: Sizes of the convolution.
        config: The tile.
        precision: Of the products, a key of :data:`CONFIGS`.
        processors: Number of multiprocessors.
        second: Input channels of a 1x1 convolution that is added; 0 for none.
    """
    products = {"half": 1024, "tf32": 512, "ieee": 128}[precision]
    bytes_a_cycle, fixed, launch = 10, 2000, 3000
    m, n, k = config[:3]
    intensity = m * n / (m + n)
    share = (
        intensity
        / (intensity + 16)
        * (1.0 if k * (4 if precision != "half" else 2) >= 128 else 0.9)
    )
    if mode_of(s, config) == "flat" and s.group_c % 8:
        share /= 2
    steps = cdiv(steps_of(s, config) + cdiv(second, k), config.split_k)
    tiles = cdiv(s.rows, m) * cdiv(s.group_k, n) * s.groups * config.split_k
    # Two small tiles share a multiprocessor: one computes while the other starts or ends.
    together = 2 if m * n <= 64 * 64 else 1
    block = m * n * k * steps / (products * share)
    cycles = cdiv(tiles, processors) * (block + fixed / together)
    if config.split_k > 1:
        cycles += launch + 8 * config.split_k * s.rows * s.k / (bytes_a_cycle * processors)
    return cycles


def candidates(s: ConvShape, x: Tensor, *, may_split: bool = True) -> list[ConvConfig]:
    """All configurations that can run a convolution of maps like ``x``."""
    precision, size, arch = precision_of(x), x.element_size(), architecture(x)

    def fits(config: ConvConfig) -> bool:
        # Large tiles have no registers left to mask single channels.
        whole = s.group_c % 8 == 0 and s.group_k % 8 == 0 and s.group_c >= config.block_k
        stage = (config.block_m + config.block_n) * config.block_k * size
        return (
            arch >= config.since
            and (whole or config.flat)
            and config.stages * stage <= _shared_limit(x)
        )

    return [
        config._replace(split_k=split, descriptors=arch >= 90)
        for config in CONFIGS[precision]
        if fits(config)
        for split in SPLITS
        if split == 1 or (may_split and steps_of(s, config) >= split * LEAST_STEPS)
    ]


def plan(s: ConvShape, x: Tensor, *, second: int = 0, may_split: bool = True) -> ConvConfig:
    """The candidate with the least estimated cost.

    Args:
        s: Sizes of the convolution.
        x: Its input.
        second: Input channels of a 1x1 convolution that is added; 0 for none.
        may_split: Whether split-K is allowed.
    """
    precision, processors = precision_of(x), multiprocessors(x)
    return min(
        candidates(s, x, may_split=may_split),
        key=lambda config: cost(s, config, precision, processors, second),
    )
