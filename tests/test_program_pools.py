"""Pools of a program with ``ceil_mode``, whose last window may reach beyond the padding."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import normal
from programs import Program, encode
from tolerances import DTYPES

from fused_resnet import _C
from fused_resnet.ops.program_shapes import windows

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
pools = pytest.mark.parametrize("pool", ["max_pool", "avg_pool"])

#: Kernel, stride and padding: torchvision's googlenet and squeezenet, timm's shortcuts, windows
#: that overlap by more, and that leave pixels out.
POOLS = [(3, 2, 0), (2, 2, 0), (3, 1, 1), (3, 2, 1), (3, 3, 0), (3, 3, 1), (2, 3, 1), (5, 2, 2)]
windows_of = pytest.mark.parametrize("window", POOLS, ids=str)


def channels_last(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return normal(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def pooled(pool: str, x: torch.Tensor, *window: int) -> torch.Tensor:
    p = Program(x.shape[1], x.dtype)
    getattr(p, pool)(0, *window, ceil=True)
    return p.run(x)[0]


@dtypes
@pools
@windows_of
def test_the_bits_are_pytorchs(window, pool, dtype):
    """Heights and widths of every remainder; below zero too, so that no zero beyond may win."""
    pytorchs = {"max_pool": F.max_pool2d, "avg_pool": F.avg_pool2d}[pool]
    for h, w in ((6, 7), (7, 8), (8, 9), (9, 6), (11, 10)):
        x = channels_last(2, 37, h, w, dtype=dtype) - 3
        y = pooled(pool, x, *window)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(y, pytorchs(x, *window, ceil_mode=True)), (h, w)


@pools
def test_the_last_window_begins_before_the_maps_end(pool):
    """Of 3 pixels a window of 2 at 4 would be beyond: in the padding behind the map, or outside."""
    x = channels_last(1, 5, 3, 4)
    for window, size in (((2, 2, 1), (2, 3)), ((2, 3, 1), (2, 2)), ((1, 5, 0), (1, 1))):
        y = pooled(pool, x, *window)
        assert y.shape[2:] == size
        assert torch.equal(y, getattr(F, f"{pool}2d")(x, *window, ceil_mode=True))


@pools
def test_windows_larger_than_the_map(pool):
    """By less than a stride; as many as fit are averaged."""
    x = channels_last(2, 5, 2, 3)
    for window in ((3, 2, 0), (5, 4, 0), (5, 9, 0), (4, 2**31 - 1, 1)):
        y = pooled(pool, x, *window)
        assert torch.equal(y, getattr(F, f"{pool}2d")(x, *window, ceil_mode=True)), window
    with pytest.raises(ValueError, match=rf"{pool}\): pool_kernel: expected at most .* got \[4, 4"):
        pooled(pool, x, 4, 2, 0)
    with pytest.raises(RuntimeError, match=r"[Oo]utput size is too small"):
        getattr(F, f"{pool}2d")(x, 4, 2, 0, ceil_mode=True)


@pools
def test_micro_batches_and_threads_do_not_show(pool):
    p = Program(8)
    first = getattr(p, pool)(p.conv(0, 64), 3, 2, 0, ceil=True)
    getattr(p, pool)(p.conv(first, 64, 1, residual=first), 2, 2, 0, ceil=True)
    x = channels_last(17, 8, 128, 125)
    report = _C.program_report(p.tensors, p.steps, [len(p)], list(x.shape), x.dtype)
    assert min(step[2] for step in report) < 9
    expected = p.one_by_one(x)[-1]
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(p.run(x)[0], expected)


def test_sizes_are_pytorchs():
    """Of the map, in Python as in the extension."""
    for size, kernel, stride in itertools.product(range(1, 12), range(1, 6), range(1, 5)):
        for padding in range(kernel // 2 + 1):
            window = (kernel, stride, padding)
            if size + 2 * padding + stride - 1 < kernel:
                continue
            x = torch.zeros(1, 1, size, size + 1)
            expected = list(F.max_pool2d(x, *window, ceil_mode=True).shape[2:])
            pairs = [(value, value) for value in window]
            assert windows(x.shape, *pairs, ceil_mode=True) == expected, (size, *window)
            assert list(pooled("max_pool", x, *window).shape[2:]) == expected, (size, *window)


def test_another_ceil_mode_is_refused():
    steps = encode("max_pool", 0, kernel=2, stride=2, ceil_mode=2)
    with pytest.raises(ValueError, match=r"\(max_pool\): ceil_mode: expected 0 or 1, got 2"):
        torch.ops.fused_resnet.run_program(channels_last(1, 5, 4, 4), [], steps, [1])
