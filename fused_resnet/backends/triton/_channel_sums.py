"""Adds up what programs have summed per channel: in a fixed order, in float64."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._bn_map import BN_REGISTERS
from ._common import cdiv, on_device

#: Channels of a program, and slabs at a time.
BLOCK_C, BLOCK_S = 32, 32

#: Slabs that one program adds by itself. More are first added to so many, by a program each, so
#: that all multiprocessors read them.
MOST_SLABS = 128


@triton.jit
def two_sum(high, low, v):  # type: ignore[no-untyped-def]
    """(high, low) + v, with the rounding error of high added to low (Knuth).

    Args:
        high: Sum, float32.
        low: What the sum has lost by rounding, float32.
        v: Values to add.
    """
    total = high + v
    part = total - high
    return total, low + ((high - (total - part)) + (v - part))


@triton.jit
def channel_sums_kernel(  # type: ignore[no-untyped-def]
    partial_ptr, merged_ptr,
    first_ptr, second_ptr, third_ptr,
    J, C, slabs,
    span,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sum_slab partial[slab][j][c], of each program's slabs; the last program axis is the sum j.

    Args:
        partial_ptr: Partial sums of each slab, (slabs, J, C) float32 or float64.
        merged_ptr: Receives the sums of each program's slabs, (programs, J, C) float64; None in the
            last launch.
        first_ptr: Receives sum 0, (C,) float32; None with ``merged_ptr``.
        second_ptr: Receives sum 1, (C,) float32; None without one.
        third_ptr: Receives sum 2, (C,) float32; None without one.
        J: Number of sums.
        C: Number of channels.
        slabs: Number of slabs.
        span: Slabs of a program; the last may have fewer.
        BLOCK_S: Slabs at a time.
        BLOCK_C: Channels of a program.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    program, j = tl.program_id(1), tl.program_id(2)
    begin = program * span
    end = tl.minimum(begin + span, slabs)
    total = tl.zeros((BLOCK_C,), tl.float64)
    for s0 in range(begin, end, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        valid = (s < end)[:, None] & (c < C)[None, :]
        at = partial_ptr + (s.to(tl.int64)[:, None] * J + j) * C + c[None, :]
        total += tl.sum(tl.load(at, mask=valid, other=0.0).to(tl.float64), 0)
    if merged_ptr is not None:
        tl.store(merged_ptr + (program.to(tl.int64) * J + j) * C + c, total, mask=c < C)
    else:
        rounded = total.to(tl.float32)
        tl.store(first_ptr + c, rounded, mask=(c < C) & (j == 0))
        if second_ptr is not None:
            tl.store(second_ptr + c, rounded, mask=(c < C) & (j == 1))
        if third_ptr is not None:
            tl.store(third_ptr + c, rounded, mask=(c < C) & (j == 2))


def channel_sums(partial: Tensor) -> list[Tensor]:
    """The sums of all slabs, ``(C,)`` float32 each.

    Args:
        partial: Partial sums of each slab, ``(slabs, sums, C)``, float32 or float64; one to three
            sums.
    """
    slabs, count, channels = partial.shape
    # Tensors of their own: compilers take two results for two tensors.
    results = [
        torch.empty((channels,), dtype=torch.float32, device=partial.device) for _ in range(count)
    ]

    def launch(source: Tensor, merged: Tensor | None, programs: int, span: int) -> None:
        padded: list[Tensor | None] = [*results, None, None]
        targets = padded[:3] if merged is None else [None] * 3
        channel_sums_kernel[(cdiv(channels, BLOCK_C), programs, count)](
            source, merged, *targets, count, channels, source.shape[0], span,
            BLOCK_S=BLOCK_S, BLOCK_C=BLOCK_C, num_warps=4, maxnreg=BN_REGISTERS,
        )  # fmt: skip

    with on_device(partial):
        if slabs > MOST_SLABS:
            span = cdiv(slabs, MOST_SLABS)
            programs = cdiv(slabs, span)
            merged = torch.empty(
                (programs, count, channels), dtype=torch.float64, device=partial.device
            )
            launch(partial, merged, programs, span)
            partial, slabs = merged, programs
        launch(partial, None, 1, slabs)
    return results
