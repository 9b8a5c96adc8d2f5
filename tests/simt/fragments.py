"""Matrices as the registers of a warp's lanes, by maps that a test chooses."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from driver import Runtime
from torch import Tensor

LANES = range(32)

#: (lane, element of its fragment) -> (row, column) of the matrix
Map = dict[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Maps:
    """Of one mma: A is 16 x depth, B depth x 8, C 16 x 8."""

    a: Map
    b: Map
    c: Map
    depth: int


def pointer(t: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


def manual_maps(half: bool) -> Maps:
    """The PTX manual's figures for mma.m16n8k16 (16-bit elements) and mma.m16n8k8 (tf32)."""

    def a(lane: int, element: int) -> tuple[int, int]:
        group, thread = lane >> 2, lane & 3
        if not half:
            return group + 8 * (element in (1, 3)), thread + 4 * (element >= 2)
        row = group if element in (0, 1, 4, 5) else group + 8
        return row, thread * 2 + (element & 1) + (8 if element >= 4 else 0)

    def b(lane: int, element: int) -> tuple[int, int]:
        group, thread = lane >> 2, lane & 3
        if not half:
            return thread + 4 * element, group
        return thread * 2 + (element & 1) + (8 if element >= 2 else 0), group

    def c(lane: int, element: int) -> tuple[int, int]:
        return (lane >> 2) + (8 if element >= 2 else 0), (lane & 3) * 2 + (element & 1)

    def every(of, elements: int) -> Map:
        return {(lane, e): of(lane, e) for lane in LANES for e in range(elements)}

    each = 2 if half else 1
    return Maps(every(a, 4 * each), every(b, 2 * each), every(c, 4), 16 if half else 8)


def to_registers(matrix: Tensor, places: Map, registers: int) -> Tensor:
    """(warps, 32, registers) of int32 from (warps, rows, columns) of 16 or 32 bits."""
    width = 8 * matrix.element_size()
    integers = matrix.view(torch.int16 if width == 16 else torch.int32)
    bits = integers.to(torch.int64) & (2**width - 1)
    result = torch.zeros(len(matrix), 32, registers, dtype=torch.int64)
    for (lane, element), (row, column) in places.items():
        at = element * width
        result[:, lane, at // 32] |= bits[:, row, column] << at % 32
    return torch.where(result >= 2**31, result - 2**32, result).to(torch.int32)


def check_multiply(toys: Runtime, dtype: torch.dtype, maps: Maps, seed: int) -> None:
    """Warp w adds a product to its sums w + 1 times: against plain PyTorch."""
    warps, operands = 3, [torch.float16, torch.bfloat16, torch.float32].index(dtype)
    a = torch.randn(warps, 16, maps.depth).to(dtype)
    b = torch.randn(warps, maps.depth, 8).to(dtype)
    c = torch.randn(warps, 16, 8)
    in_a, in_b = to_registers(a, maps.a, 4), to_registers(b, maps.b, 2)
    sums = to_registers(c, maps.c, 4).view(torch.float32)
    toys.seed(seed)
    arguments = (pointer(in_a), pointer(in_b), pointer(sums))
    assert toys.library.toy_multiply(operands, warps, *arguments) == 0
    toys.check()
    if dtype == torch.float32:  # a tensor core does not see the low bits
        a, b = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (a, b))
    times = torch.arange(1, warps + 1).view(-1, 1, 1)
    expected = c.double() + times * (a.double() @ b.double())
    actual = torch.full((warps, 16, 8), float("nan"))
    for (lane, element), (row, column) in maps.c.items():
        actual[:, row, column] = sums[:, lane, element]
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-5)


def load_matrices(toys: Runtime, rows: Tensor, seed: int) -> Tensor:
    """What ldmatrix gives: (32 lanes, 8) 16-bit elements, from (32 lanes, 8) that they point to."""
    loaded = torch.empty(32, 4, dtype=torch.int32)
    toys.seed(seed)
    assert toys.library.toy_matrices(pointer(rows), pointer(loaded)) == 0
    toys.check()
    return loaded.view(torch.int16)
