"""Winograd's algorithm on the CPU: its error, its bits, and the shapes that it is used for."""

from __future__ import annotations

import pytest
import torch
from cases import Conv, batch_norm, conv_weight, doubled, normal
from operation_cases import (
    extras,
)
from tolerances import error

import fused_resnet as fr
from fused_resnet import _C, ops, reference

WINOGRADS = [
    Conv("56x56", (1, 64, 56, 56), 64, args={"padding": 1}),
    Conv("28x28-batch", (3, 128, 28, 28), 96, args={"padding": 1}),
    Conv("14x14", (1, 256, 14, 14), 256, args={"padding": 1}),
    Conv("7x7-batch", (5, 64, 7, 7), 64, args={"padding": 1}),
    Conv("odd-valid", (2, 32, 19, 23), 64),
    Conv("wide-padding", (1, 32, 13, 18), 32, args={"padding": (2, 0)}),
    # Weights are transformed for 128 channels at a time, the last time for 16.
    Conv("two-passes-and-a-rest", (1, 272, 17, 17), 64, args={"padding": 1}),
    # Panels of output channels are two vectors wide; the last one of these is a single vector.
    Conv("narrow-panel", (3, 16, 16, 16), 16, args={"padding": 1}),
    Conv("narrow-last-panel", (2, 32, 16, 16), 48, args={"padding": 1}),
]

# Tiles of 2x2: small maps, odd sizes, padding on one axis, batches, panels and several passes.
SMALL_WINOGRADS = [
    Conv("10x10", (1, 64, 10, 10), 64, args={"padding": 1}),
    Conv("7x7", (1, 256, 7, 7), 256, args={"padding": 1}),
    Conv("odd-valid-2x2", (1, 128, 9, 11), 96),
    Conv("wide-padding-2x2", (2, 64, 5, 8), 64, args={"padding": (2, 0)}),
    Conv("two-passes-2x2", (1, 272, 9, 9), 48, args={"padding": 1}),
]

# With two threads one has a tile fewer than the other, and one group of tiles instead of two: a
# group has at most 14 tiles with vectors of 64 bytes, otherwise 18.
UNEVEN_WINOGRADS = [
    Conv("15-and-14-tiles", (1, 16, 4, 116), 16, args={"padding": 1}),
    Conv("19-and-18-tiles", (1, 16, 4, 148), 16, args={"padding": 1}),
]


def winograd_operands(case, dtype=torch.float32):
    """The arguments of ``ops.conv_bn_add_relu_packed``, and its result in float64."""
    x = normal(*case.x, dtype=dtype).contiguous(memory_format=torch.channels_last)
    w, bn = conv_weight(case, dtype), batch_norm(case.k, torch.float32)
    weight, bias, mean, var = doubled(bn)
    scale = weight / torch.sqrt(var + 1e-5)
    operands = (x, ops.pack_conv_weight(w), scale.float(), (bias - mean * scale).float())
    return operands, lambda r, relu: reference.conv_bn_add_relu(
        doubled(x), doubled(w), *doubled(bn), None if r is None else doubled(r), relu=relu,
        **case.args,
    ), {"weight_shape": tuple(w.shape), **case.args}  # fmt: skip


@pytest.mark.parametrize("case", WINOGRADS + SMALL_WINOGRADS, ids=str)
@extras
def test_winograd(case, relu, residual):
    """Within 2e-6 of float64; differs from the direct sum, so Winograd's algorithm did run."""
    operands, truth_of, options = winograd_operands(case)
    r = normal(*truth_of(None, relu).shape, dtype=torch.float32) if residual else None
    truth = truth_of(r, relu)
    result = ops.conv_bn_add_relu_packed(*operands, r, winograd=True, relu=relu, **options)
    direct = ops.conv_bn_add_relu_packed(*operands, r, relu=relu, **options)
    assert error(result, truth) < 2e-6
    assert not torch.equal(result, direct)


# Large enough that Winograd's algorithm beats AVX512-BF16's direct sum too, but not AMX's.
NARROW_WINOGRADS = [
    *WINOGRADS[:2],
    Conv("14x14-batch", (4, 256, 14, 14), 256, args={"padding": 1}),
    Conv("odd-valid-narrow", (2, 128, 29, 35), 128),
    Conv("two-passes-and-a-rest-narrow", (1, 272, 34, 35), 144, args={"padding": (2, 1)}),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", NARROW_WINOGRADS, ids=str)
@extras
def test_winograd_in_float_over_narrow_maps(case, dtype, relu, residual):
    """The error is that of rounding the result; the algorithm's is negligible."""
    operands, truth_of, options = winograd_operands(case, dtype)
    r = normal(*truth_of(None, relu).shape, dtype=dtype) if residual else None
    truth = truth_of(r, relu)
    result = ops.conv_bn_add_relu_packed(*operands, r, winograd=True, relu=relu, **options)
    geometry = {"padding": 0, **case.args}
    assert result.dtype is dtype
    assert error(result, truth) < 1.01 * error(truth.to(dtype), truth)
    by_tiles = dtype is torch.bfloat16 and fr.build_info()["isa"].startswith("amx")
    name = "direct" if by_tiles else "winograd 4x4"
    assert algorithm(case.x, options["weight_shape"], **geometry, dtype=dtype) == name
    direct = ops.conv_bn_add_relu_packed(*operands, r, relu=relu, **options)
    assert torch.equal(result, direct) is by_tiles


@pytest.mark.parametrize("case", WINOGRADS[:4] + SMALL_WINOGRADS[:2] + UNEVEN_WINOGRADS, ids=str)
def test_winograd_has_the_same_bits_on_any_number_of_threads(case):
    """Threads divide the tiles, the panels of output channels or both."""
    operands, _, options = winograd_operands(case)
    geometry = {"padding": 0, **case.args}
    assert algorithm(case.x, options["weight_shape"], **geometry).startswith("winograd")
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(ops.conv_bn_add_relu_packed(*operands, winograd=True, **options))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def algorithm(x, w, stride=1, padding=1, dilation=1, groups=1, winograd=True, dtype=torch.float32):
    """The algorithm that is chosen for an input and a weight of these sizes."""
    pairs = ([v, v] if isinstance(v, int) else list(v) for v in (stride, padding, dilation))
    return _C.conv_algorithm(list(x), list(w), *pairs, groups, dtype, winograd)


@pytest.mark.parametrize(
    "other",
    [{"stride": 2}, {"dilation": 2}, {"groups": 2, "w": (64, 32, 3, 3)}, {"w": (64, 64, 1, 1)},
     {"w": (64, 62, 3, 3), "x": (8, 62, 56, 56)}, {"w": (33, 64, 3, 3)}, {"winograd": False},
     {"x": (1, 64, 4, 4)}],
    ids=str,
)  # fmt: skip
def test_winograd_is_for_plain_3x3_convolutions_with_some_tiles(other):
    """On a 4x4 map with its four tiles of 2x2, transforming the weight costs more than it saves."""
    case = {"x": (8, 64, 56, 56), "w": (64, 64, 3, 3)}
    assert algorithm(**case) == "winograd 4x4"
    assert algorithm(**{**case, **other}) == "direct"


@pytest.mark.parametrize("side", ["4x4", "2x2"])
def test_winograd_has_larger_tiles_for_larger_maps(side):
    for case in WINOGRADS if side == "4x4" else SMALL_WINOGRADS:
        geometry = {"padding": 0, **case.args}
        assert algorithm(case.x, (case.k, case.x[1], 3, 3), **geometry) == f"winograd {side}"


def test_float64_uses_the_direct_sum():
    x, w = normal(1, 64, 16, 16, dtype=torch.float64), normal(64, 64, 3, 3, dtype=torch.float64)
    one = torch.ones(64, dtype=torch.float64)
    arguments = (x, ops.pack_conv_weight(w), one, one)
    options = {"weight_shape": tuple(w.shape), "padding": 1}
    result = ops.conv_bn_add_relu_packed(*arguments, winograd=True, **options)
    assert torch.equal(result, ops.conv_bn_add_relu_packed(*arguments, **options))
