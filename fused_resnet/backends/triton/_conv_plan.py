"""Which tile a convolution uses: the table of all that may be chosen, and a model of their cost."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ._common import architecture, cdiv, multiprocessors
from ._conv_shape import ConvShape


class ConvConfig(NamedTuple):
    """A tile of pixels by filters by depth; the warps that share it and the stages of its pipeline.

    Attributes:
        since: The oldest architecture whose registers hold it.
        flat: Whether it may go over (ky, kx, c) as one axis, which takes more registers.
        split_k: Parts of the depth that are summed by programs of their own.
        descriptors: Whether tiles come by tensor descriptors (TMA) where they can.
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


#: By how products are made. A step is 128 bytes deep, which is what swizzled shared memory and one
#: wgmma of each warp group want; 64 bytes deep are the tiles for few channels. The large tiles do
#: 64 to 85 flops for each byte that they bring, so that tensor cores set their pace; those of 64
#: pixels fill a card on small maps, and those of 16 filters serve narrow groups. Strict float32
#: runs on the ordinary cores, whose operands pass through registers: 64 x 64 is what these hold.
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

#: Parts into which a sum may be cut, and the least steps that a part keeps: less than these would
#: be all pipeline filling.
SPLITS, LEAST_STEPS = (1, 2, 4, 8, 16), 4

#: Pixels by filters of the kernel that finishes a split, and its warps.
FINISH_TILE = (32, 64, 4)

#: Rows of tiles that run side by side, so that they share filters and pixels in the L2 cache.
GROUP_M = 8


def precision_of(x: Tensor) -> str:
    """A key of :data:`CONFIGS`."""
    if x.dtype is not torch.float32:
        return "half"
    return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"


def mode_of(s: ConvShape, config: ConvConfig) -> str:
    """How a kernel goes through the depth.

    ``"pointwise"``: pixels of the input are those of the result. ``"taps"``: tap by tap, and there
    by blocks of channels. ``"flat"``: over (ky, kx, c) as one axis, for channels that would fill
    but a part of a block.
    """
    if config.flat and s.group_c < config.block_k and s.depth > s.group_c:
        return "flat"
    return "pointwise" if s.pointwise else "taps"


def steps_of(s: ConvShape, config: ConvConfig) -> int:
    """Blocks in the depth."""
    if mode_of(s, config) == "flat":
        return cdiv(s.depth, config.block_k)
    return s.kh * s.kw * cdiv(s.group_c, config.block_k)


def parts_of(config: ConvConfig) -> int:
    """Parts in which a tile's epilogue is done: of 32 columns of 128 rows, or 64 of 64 rows."""
    return min(4, max(1, config.block_m * config.block_n // 4096))


def _shared_limit(x: Tensor) -> int:
    if not x.is_cuda:
        return 163 * 1024
    properties = triton.runtime.driver.active.utils.get_device_properties(x.device.index)
    return properties["max_shared_mem"]


def cost(s: ConvShape, config: ConvConfig, precision: str, processors: int, second: int) -> float:
    """Clock cycles until the last multiprocessor is done.

    The constants are round numbers for the cards since 2020, and only ratios matter: products a
    cycle; bytes a cycle and multiprocessor; cycles to fill a pipeline and to drain it through the
    epilogue; cycles of a second launch. A tile's share of the peak grows with the flops that it
    does for each byte, and falls where elements are gathered one by one.
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
    # Small tiles share a multiprocessor, which then has its pipeline full while one begins or ends.
    together = 2 if m * n <= 64 * 64 else 1
    block = m * n * k * steps / (products * share)
    cycles = cdiv(tiles, processors) * (block + fixed / together)
    if config.split_k > 1:
        cycles += launch + 8 * config.split_k * s.rows * s.k / (bytes_a_cycle * processors)
    return cycles


def candidates(s: ConvShape, x: Tensor, *, may_split: bool = True) -> list[ConvConfig]:
    """All configurations that may run a convolution of maps like ``x``."""
    precision, size, arch = precision_of(x), x.element_size(), architecture(x)

    def fits(config: ConvConfig) -> bool:
        # Large tiles have no registers to spare for channels that must be looked at one by one.
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
    """The cheapest of the candidates; ``second`` channels more are in the sum."""
    precision, processors = precision_of(x), multiprocessors(x)
    return min(
        candidates(s, x, may_split=may_split),
        key=lambda config: cost(s, config, precision, processors, second),
    )
