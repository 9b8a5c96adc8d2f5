"""How the batch norm kernels traverse a map: tiles, slabs, addresses and launches.

Tiles are rows (pixels, counted through the batch) by channels, 2048 elements for 256 threads: each
thread has one or two loads of 16 bytes in flight for every operand. The compiler orders the threads
of a tile along the contiguous axis, channels in NHWC or pixels in NCHW, so one kernel serves both.
A program processes a slab of rows, all slabs of the same length, with four programs for every
multiprocessor; it loads the vectors of its channels once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ._common import Kernel, cdiv, check_map, multiprocessors, on_device, power_of_two, vector


class BnConfig(NamedTuple):
    """A tile.

    Attributes:
        block_r: Rows.
        block_c: Channels.
        warps: Warps of the program.
    """

    block_r: int
    block_c: int
    warps: int = 8


#: From one channel (planes of NCHW) to 64 (NHWC), always 2048 elements.
CONFIGS = [BnConfig(2048 // c, c) for c in (1, 2, 4, 8, 16, 32, 64)]

#: The limit of registers per thread at which two programs fit on a multiprocessor.
BN_REGISTERS = 128

#: Channels of a program, and slabs at a time, of the kernels that finish sums.
FINISH_C, FINISH_S = 32, 32


@triton.jit
def map_offsets(r, c, C, P, LAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Offsets of pixels and channels in a map.

    Args:
        r: Pixels, counted through the batch.
        c: Channels.
        C: Channels of the map.
        P: Pixels of an image.
        LAST: Whether a pixel's channels are neighbours in memory (NHWC), or its plane's pixels
            (NCHW).
    """
    if LAST:
        return r.to(tl.int64)[:, None] * C + c[None, :]
    else:
        image = r // P
        return (image.to(tl.int64) * C * P + r - image * P)[:, None] + (c * P)[None, :]


class BnMap:
    """The maps of one call: memory format, tile, slabs, and launches of its kernels.

    Args:
        op: Name of the operation, for messages.
        x: The map, ``(N, C, H, W)``; float32, float16 or bfloat16.
        config: The tile; None chooses one.

    Attributes:
        format: Memory format of all maps of the call, that of ``x``.
        channels: Number of channels.
        plane: Pixels of an image.
        rows: Pixels of the batch.
        last: Whether a pixel's channels are neighbours in memory.
        slab_rows: Rows of a slab.
        slabs: Number of slabs.
        grid: Number of programs, ``(blocks of channels, slabs)``.
    """

    def __init__(self, op: str, x: Tensor, config: BnConfig | None) -> None:
        check_map(op, "x", x)
        self.op, self.x, self.format = op, x, suggest_memory_format(x)
        self.channels, self.plane = x.shape[1], x.shape[2] * x.shape[3]
        self.rows = x.shape[0] * self.plane
        for what, size in (("pixels in a batch", self.rows),
                           ("elements in an image", self.channels * self.plane)):  # fmt: skip
            if size >= 2**30:
                raise ValueError(f"{op}: x: expected less than 2^30 {what}, got {list(x.shape)}")
        # With one channel or one pixel both formats are the same memory: use the longer axis.
        channels_last = self.format == torch.channels_last
        self.last = self.channels > 1 if channels_last else self.plane == 1
        self.config = config or self._choose()
        blocks = cdiv(self.channels, self.config.block_c)
        slabs = max(1, 4 * multiprocessors(x) // max(blocks, 1))
        tiles = cdiv(max(self.rows, 1), self.config.block_r)
        self.slab_rows = cdiv(tiles, slabs) * self.config.block_r
        self.slabs = max(1, cdiv(self.rows, self.slab_rows))
        self.grid = (blocks, self.slabs)

    def _choose(self) -> BnConfig:
        # NCHW is read along pixels: more than one channel only where planes are short.
        most = 64 if self.last else 1 if self.plane >= 1024 else 8
        return CONFIGS[min(most, power_of_two(self.channels)).bit_length() - 1]

    def input(self, t: Tensor) -> Tensor:
        """An operand in the memory format of the call; a copy where it has another one."""
        return t.contiguous(memory_format=self.format)

    def result(self) -> Tensor:
        """An uninitialised map in the shape, dtype and memory format of ``x``."""
        return torch.empty(
            self.x.shape, dtype=self.x.dtype, device=self.x.device, memory_format=self.format
        )

    def floats(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised tensor on the device of the call, for sums and statistics."""
        return torch.empty(shape, dtype=dtype, device=self.x.device)

    def vector(self, name: str, v: Tensor | None) -> Tensor | None:
        """A checked and contiguous vector of one value per channel; None for None."""
        return vector(self.op, name, v, self.channels, self.x)

    def launch(
        self, kernel: Kernel, *args: Any, registers: int = BN_REGISTERS, **constants: Any
    ) -> None:
        """Run a kernel over the maps: a program for each block of channels and slab of rows.

        Args:
            kernel: The kernel.
            args: Its own arguments.
            registers: The most registers of a thread.
            constants: Its own compile-time arguments.
        """
        with on_device(self.x):
            kernel[self.grid](
                *args,
                R=self.rows,
                C=self.channels,
                P=self.plane,
                slab_rows=self.slab_rows,
                LAST=self.last,
                BLOCK_R=self.config.block_r,
                BLOCK_C=self.config.block_c,
                num_warps=self.config.warps,
                maxnreg=registers,
                **constants,
            )

    def finish(self, kernel: Kernel, *args: Any, **named: Any) -> None:
        """Run a kernel that adds up the slabs' partial sums of each channel."""
        with on_device(self.x):
            kernel[(cdiv(self.channels, FINISH_C),)](
                *args,
                R=self.rows,
                C=self.channels,
                slabs=self.slabs,
                BLOCK_S=FINISH_S,
                BLOCK_C=FINISH_C,
                num_warps=4,
                maxnreg=BN_REGISTERS,
                **named,
            )
