"""The tile of a convolution: the table of configurations, and a model of their cost."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ...tuning.tf32 import conv_allows_tf32
from ._common import REGISTERS, cdiv
from ._conv_shape import ConvShape
from ._device import Device, device_of


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
        sixteens: Whether it takes multiples of 16 filters alone: with others ptxas spills.
        second_spills: Architectures where ptxas spills with a second convolution.
        split_k: Number of programs among which the depth is split.
        descriptors: Whether tiles are loaded by tensor descriptors (TMA) where possible.
        registers: The most registers of a thread, by which programs share a multiprocessor.
        more_registers: The most registers of a thread where operands pass through registers: to
            mma.sync, to be rounded, or for a prologue.
        persistent: Whether each program computes one tile after another, where :func:`programs_of`
            says so.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    since: int = 80
    flat: bool = False
    sixteens: bool = False
    second_spills: tuple[int, ...] = ()
    split_k: int = 1
    descriptors: bool = False
    registers: int = REGISTERS
    more_registers: int = REGISTERS
    persistent: bool = False


#: By the precision of products. A step is 128 bytes deep, as swizzled shared memory and one wgmma
#: of each warp group need; the tiles for few channels are 64 bytes deep. The large tiles do 64 to
#: 85 flops per byte loaded, so they are bound by the tensor cores; those of 64 pixels give enough
#: programs on small maps, and those of 16 filters are for narrow groups. Where memory is the bound,
#: a second program on the multiprocessor loads while the first computes or stores: limits on the
#: registers make room for it, and a tile of three stages for a third. Strict float32 runs on the
#: CUDA cores, whose operands are in registers: they have room for 64 x 64.
CONFIGS: dict[str, list[ConvConfig]] = {
    "half": [
        ConvConfig(128, 256, 64, 8, 3, since=90),
        ConvConfig(128, 128, 64, 8, 3, registers=128),
        ConvConfig(128, 64, 64, 4, 4, second_spills=(120,)),
        ConvConfig(128, 64, 64, 4, 3, second_spills=(120,), registers=168),
        ConvConfig(64, 128, 64, 4, 4),
        ConvConfig(64, 64, 64, 4, 4),
        ConvConfig(128, 64, 32, 8, 4, flat=True, sixteens=True, registers=128, more_registers=128),
        ConvConfig(64, 64, 32, 4, 4, flat=True),
        ConvConfig(128, 16, 32, 8, 4, flat=True),
    ],
    "tf32": [
        ConvConfig(128, 128, 32, 8, 3),
        ConvConfig(128, 64, 32, 8, 3, flat=True, sixteens=True),
        ConvConfig(64, 64, 32, 4, 4, flat=True),
        ConvConfig(128, 16, 32, 8, 3, flat=True),
    ],
    "ieee": [
        ConvConfig(64, 64, 16, 8, 3, sixteens=True, more_registers=128),
        ConvConfig(64, 32, 16, 4, 3, flat=True),
        ConvConfig(64, 16, 16, 4, 3, flat=True),
    ],
}

#: Tiles that may be computed by persistent programs, in a form of their own: those that layers of
#: 1x1 mostly have, with all registers, since a tile's addresses are made while the one before it is
#: in registers.
PERSISTENT: dict[str, list[ConvConfig]] = {
    "half": [
        ConvConfig(128, 256, 64, 8, 3, since=90, persistent=True),
        ConvConfig(128, 128, 64, 8, 3, persistent=True),
        ConvConfig(128, 64, 64, 4, 4, persistent=True),
    ],
    "tf32": [ConvConfig(128, 128, 32, 8, 3, persistent=True)],
    "ieee": [],
}

#: Values of split_k, and the minimum number of steps of each split: fewer would mostly fill the
#: pipeline.
SPLITS, LEAST_STEPS = (1, 2, 4, 8, 16), 4

#: Pixels, filters and warps of the kernel that adds the splits.
FINISH_TILE = (32, 64, 4)

#: Bytes of an element by the precision of products.
SIZES = {"half": 2, "tf32": 4, "ieee": 4}

#: Estimated bytes that a multiprocessor loads in a clock cycle from the L2 cache for its tensor
#: cores, or from shared memory for its CUDA cores: the same from sm_80 to sm_120.
LOADED = {"half": 128, "tf32": 128, "ieee": 32}

#: Estimated clock cycles to fill a program's pipeline and to drain it through the epilogue, and of
#: a second launch: round numbers, of which the order of magnitude matters.
FIXED, LAUNCH = 2000, 3000

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


def by_registers(device: Device, precision: str, prologue: bool) -> bool:
    """Whether operands pass through registers: to mma.sync, to be rounded, or for a prologue."""
    return not device.from_shared or precision != "half" or prologue


def registers_of(config: ConvConfig, device: Device, precision: str, prologue: bool) -> int:
    """The most registers of a thread.

    Args:
        config: The tile.
        device: The GPU.
        precision: Precision of the products, a key of :data:`CONFIGS`.
        prologue: Whether a batch norm is applied to the input.
    """
    through = by_registers(device, precision, prologue)
    return config.more_registers if through else config.registers


def resident(config: ConvConfig, device: Device, precision: str, prologue: bool = False) -> int:
    """Number of programs of a tile that a multiprocessor holds at a time, at least.

    Args:
        config: The tile.
        device: The GPU.
        precision: Precision of the products, a key of :data:`CONFIGS`.
        prologue: Whether a batch norm is applied to the input.
    """
    stage = (config.block_m + config.block_n) * config.block_k * SIZES[precision]
    # A stage of mma.sync's is in registers. What passes through them is stored once more: for wgmma
    # and tcgen05 both operands, for mma.sync the pixels behind a prologue. The scale and shift of a
    # prologue are loaded with the stages.
    buffers = config.stages - 1
    if device.from_shared:
        buffers += 1 + by_registers(device, precision, prologue)
    shared = buffers * stage + prologue * config.stages * 2 * 4 * config.block_k
    if prologue and not device.from_shared:
        shared += config.block_m * config.block_k * SIZES[precision]
    registers = registers_of(config, device, precision, prologue)
    return device.resident(config.warps, registers, shared)


def tiles_of(s: ConvShape, config: ConvConfig) -> int:
    """Number of tiles of a group."""
    return cdiv(s.rows, config.block_m) * cdiv(s.group_k, config.block_n)


def is_matrix(s: ConvShape, config: ConvConfig) -> bool:
    """Whether the input is the left matrix of the product as it is in memory."""
    return mode_of(s, config) == "pointwise" and s.groups == 1


def programs_of(
    s: ConvShape,
    config: ConvConfig,
    precision: str,
    device: Device,
    second: int = 0,
    prologue: bool = False,
) -> int:
    """Number of programs that compute the tiles of a group: one each, if they don't persist.

    Persistent ones are those that the GPU holds at a time, where there are more tiles than that,
    the input is a matrix, and the depth is neither split nor goes on in a second convolution: the
    loops over tiles and over the depth must be one, for which the inner one must be the only one.

    Args:
        s: Sizes of the convolution.
        config: The tile.
        precision: Precision of the products, a key of :data:`CONFIGS`.
        device: The GPU.
        second: Input channels of a 1x1 convolution that is added; 0 for none.
        prologue: Whether a batch norm is applied to the input.
    """
    tiles = tiles_of(s, config)
    if config.persistent and config.split_k == 1 and second == 0 and is_matrix(s, config):
        return min(tiles, device.processors * resident(config, device, precision, prologue))
    return tiles


def traffic(s: ConvShape, size: int, second: int, residual: bool) -> int:
    """Bytes of DRAM that a convolution moves: of each map and of the filters once.

    Args:
        s: Sizes of the convolution.
        size: Bytes of an element.
        second: Input channels of a 1x1 convolution that is added; 0 for none.
        residual: Whether a map is added.
    """
    pixels = min(s.n * s.h * s.w, s.rows * s.kh * s.kw)  # a stride may leave some out
    maps = pixels * s.c + s.rows * (second + s.k * (2 if residual else 1))
    return (maps + s.k * (s.depth + second)) * size


def cost(
    s: ConvShape,
    config: ConvConfig,
    precision: str,
    device: Device,
    second: int = 0,
    residual: bool = False,
    prologue: bool = False,
) -> float:
    """Estimated clock cycles until the last multiprocessor is done: a roofline.

    A tile takes its products and its loads from the L2 cache, of which large tiles have fewer for
    each product. A multiprocessor is busy for the longer of its tiles and its share of the DRAM's
    bytes, and a tenth of the shorter, a guess at what one does not hide of the other. A program by
    itself also waits while its pipeline fills, and computes nothing in its epilogue: others on the
    same multiprocessor use that time. Where there are none, each tile pays for it.

    Args:
        s: Sizes of the convolution.
        config: The tile.
        precision: Precision of the products, a key of :data:`CONFIGS`.
        device: The GPU.
        second: Input channels of a 1x1 convolution that is added; 0 for none.
        residual: Whether a map is added.
        prologue: Whether a batch norm is applied to the input.
    """
    size = SIZES[precision]
    m, n, k = config[:3]
    steps = cdiv(steps_of(s, config) + cdiv(second, k), config.split_k)
    tiles = max(1, tiles_of(s, config) * s.groups * config.split_k)
    step = m * n * k / device.products(precision) + (m + n) * k * size / LOADED[precision]
    if k * size < 128:
        step /= 0.9  # half of a row of swizzled shared memory
    if mode_of(s, config) == "flat" and s.group_c % 8:
        step *= 2  # elements are gathered one by one
    tile = step * steps
    moving = traffic(s, size, second, residual) / device.bandwidth

    busiest = cdiv(tiles, device.processors)
    computing = busiest * tile
    together = max(computing, moving) + min(computing, moving) / 10 + FIXED
    alone = max(tile, moving * min(tiles, device.processors) / tiles) + FIXED
    rounds = cdiv(busiest, resident(config, device, precision, prologue))
    cycles = max(together, rounds * alone)
    if config.split_k > 1:
        cycles += LAUNCH + 8 * config.split_k * s.rows * s.k / device.bandwidth
    return cycles


def candidates(s: ConvShape, x: Tensor, *, may_split: bool = True) -> list[ConvConfig]:
    """All configurations that can run a convolution of maps like ``x``, for those who time them.

    Persistent ones are among them where there are more tiles than programs. :func:`choose` knows
    none: until a GPU has timed them, a model of their cost would be a guess.
    """
    precision, device = precision_of(x), device_of(x)
    return _candidates(s, precision, device, may_split, 0) + [
        config
        for config in _candidates(s, precision, device, False, 0, PERSISTENT)
        if programs_of(s, config, precision, device) < tiles_of(s, config)
    ]


def _candidates(
    s: ConvShape,
    precision: str,
    device: Device,
    may_split: bool,
    second: int,
    table: dict[str, list[ConvConfig]] = CONFIGS,
) -> list[ConvConfig]:
    def fits(config: ConvConfig) -> bool:
        # Large tiles have no registers left to mask single channels.
        whole = s.group_c % 8 == 0 and s.group_k % 8 == 0 and s.group_c >= config.block_k
        stage = (config.block_m + config.block_n) * config.block_k * SIZES[precision]
        return (
            device.arch >= config.since
            and (whole or config.flat)
            and (s.group_k % 16 == 0 or not config.sixteens)
            and (second == 0 or device.arch not in config.second_spills)
            and config.stages * stage <= device.shared
        )

    return [
        config._replace(split_k=split, descriptors=device.arch >= 90)
        for config in table[precision]
        if fits(config)
        for split in SPLITS
        if split == 1 or (may_split and steps_of(s, config) >= split * LEAST_STEPS)
    ]


@functools.lru_cache(maxsize=4096)
def choose(
    s: ConvShape,
    precision: str,
    device: Device,
    second: int = 0,
    residual: bool = False,
    prologue: bool = False,
    may_split: bool = True,
) -> ConvConfig:
    """The candidate with the least estimated cost; remembered.

    Args:
        s: Sizes of the convolution.
        precision: Precision of the products, a key of :data:`CONFIGS`.
        device: The GPU, which need not be there.
        second: Input channels of a 1x1 convolution that is added; 0 for none.
        residual: Whether a map is added.
        prologue: Whether a batch norm is applied to the input.
        may_split: Whether split-K is allowed.
    """
    return min(
        _candidates(s, precision, device, may_split, second),
        key=lambda config: cost(s, config, precision, device, second, residual, prologue),
    )
