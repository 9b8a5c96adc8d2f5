"""bfloat16 convolutions on the CPU: shapes that their kernel handles specially, and its errors."""

from __future__ import annotations

import pytest
import torch
from cases import Conv, batch_norm, conv_weight, doubled, normal
from tolerances import assert_as_exact_as_pytorch

import fused_resnet as fr
from fused_resnet import ops, reference

ISA = fr.build_info()["isa"]
NATIVE = ISA in ("amx", "avx512_bf16", "amx_emulated")

#: Channels in pairs, halves of pairs, pixels that are copied and pixels that are not.
CASES = [
    Conv("1x1-odd", (2, 7, 5, 6), 40, (1, 1)),
    Conv("1x1-stride2-odd", (2, 9, 7, 8), 33, (1, 1), {"stride": 2}),
    Conv("1x1-stride3x1", (2, 10, 7, 8), 16, (1, 1), {"stride": (3, 1)}),
    Conv("1x1-stride-padded", (2, 6, 7, 5), 16, (1, 1), {"stride": (1, 2), "padding": (2, 1)}),
    Conv("1x1-pixels-4KiB-apart", (2, 2048, 4, 4), 32, (1, 1)),
    Conv("1x1-strided-4KiB-apart", (2, 1024, 5, 6), 32, (1, 1), {"stride": 2}),
    Conv("3x3-pixels-4KiB-apart", (1, 2048, 3, 5), 32, args={"padding": 1}),
    Conv("3x3-strided-4KiB-apart", (2, 1024, 5, 7), 32, args={"stride": 2, "padding": 1}),
    Conv("groups-4KiB-apart", (1, 2048, 3, 4), 64, args={"padding": 1, "groups": 32}),
    Conv("3x3-valid-odd", (2, 5, 9, 8), 16),
    Conv("3x3-stride2-valid", (2, 6, 9, 9), 16, args={"stride": 2}),
    Conv("dilated", (1, 8, 11, 9), 16, args={"dilation": 2, "padding": 2}),
    Conv("dilated-valid", (1, 8, 11, 9), 16, args={"dilation": (2, 3)}),
    Conv("dilated-odd", (2, 5, 11, 9), 16, args={"dilation": 2, "padding": 2}),
    Conv("dilated-odd-strided", (2, 3, 11, 13), 16, args={"dilation": (1, 3), "stride": 2}),
    Conv("dilated-rows-odd", (1, 3, 11, 9), 16, args={"dilation": (3, 1), "padding": (3, 1)}),
    Conv("groups-odd", (2, 15, 6, 7), 24, args={"padding": 1, "groups": 3}),
    Conv("groups-odd-dilated", (2, 15, 8, 9), 24, args={"dilation": 2, "groups": 3}),
    Conv("groups-1x1-strided", (2, 12, 7, 7), 24, (1, 1), {"stride": 2, "groups": 4}),
    Conv("groups-panel-and-one", (1, 8, 5, 5), 66, args={"padding": 1, "groups": 2}),
    Conv("row-of-odd-width", (1, 3, 9, 20), 48, (5, 3), {"stride": (2, 1), "padding": (2, 1)}),
    Conv("narrow", (3, 6, 7, 7), 40, args={"padding": 1}),
    Conv("narrow-tall-odd", (2, 5, 19, 4), 16, args={"padding": (0, 2), "dilation": (2, 1)}),
    Conv("narrow-groups", (2, 12, 8, 6), 16, args={"padding": 1, "groups": 2}),
    Conv("wide-padding", (1, 4, 3, 3), 16, args={"padding": (5, 4)}),
    # AMX's tiles are 16 pixels x 16 pairs x 16 channels, two by two of them.
    Conv("15-pairs-16-pixels", (1, 30, 4, 4), 16, (1, 1)),
    Conv("16-pairs-1-pixel", (1, 32, 1, 1), 33, (1, 1)),
    Conv("16-pairs-17-pixels", (1, 32, 1, 17), 32, (1, 1)),
    Conv("17-pairs-31-pixels", (1, 34, 1, 31), 48, (1, 1)),
    Conv("31-pairs-33-pixels", (1, 62, 3, 11), 64, (1, 1)),
    Conv("32-pairs-32-pixels", (2, 64, 4, 4), 40, (1, 1)),
    Conv("33-pairs-and-half", (1, 67, 5, 9), 65, (1, 1)),
    Conv("16-pairs-and-half-in-a-row", (1, 11, 3, 56), 33, args={"padding": 1}),
    Conv("tiles-of-24-and-23-pixels", (1, 12, 4, 47), 32, args={"padding": 1}),
    Conv("tiles-of-wide-groups", (1, 96, 5, 6), 66, args={"padding": 1, "groups": 2}),
    Conv("tiles-of-odd-groups", (1, 105, 4, 5), 99, args={"padding": 1, "groups": 3}),
    Conv("tiles-dilated", (1, 40, 9, 20), 16, args={"dilation": 2, "padding": 2}),
    Conv("tiles-dilated-narrow", (1, 40, 7, 6), 16, args={"dilation": 2, "padding": 2}),
    Conv("tiles-strided", (2, 16, 9, 37), 32, args={"stride": 2, "padding": 1}),
    Conv("tiles-1x1-strided", (1, 40, 9, 9), 32, (1, 1), {"stride": 2}),
    Conv("tiles-narrow", (2, 12, 7, 7), 40, args={"padding": 1}),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def operands(case: Conv) -> tuple[torch.Tensor, ...]:
    x = normal(*case.x, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    return x, conv_weight(case, torch.bfloat16), *batch_norm(case.k, torch.bfloat16)


@cases
@pytest.mark.parametrize("relu", [True, False])
def test_bfloat16_conv(case, relu):
    x, w, *bn = operands(case)
    r = normal(*reference.conv_bn_add_relu(x, w, *bn, **case.args).shape, dtype=torch.bfloat16)
    truth = reference.conv_bn_add_relu(
        doubled(x), doubled(w), *doubled(bn), doubled(r), relu=relu, **case.args
    )
    eager = reference.conv_bn_add_relu(x, w, *bn, r, relu=relu, **case.args)
    result = ops.conv_bn_add_relu(x, w, *bn, r, relu=relu, **case.args)
    assert_as_exact_as_pytorch(result, eager, truth)


@cases
def test_bfloat16_result_is_rounded_once(case):
    """Nearly all elements are the nearest bfloat16; a second rounding would change a sixth."""
    x, w, *bn = operands(case)
    truth = reference.conv_bn_add_relu(doubled(x), doubled(w), *doubled(bn), **case.args)
    result = ops.conv_bn_add_relu(x, w, *bn, **case.args)
    assert (result == truth.to(torch.bfloat16)).double().mean() > 0.99


@cases
def test_bfloat16_packing_is_lossless(case):
    groups = case.args.get("groups", 1)
    w = conv_weight(case, torch.bfloat16)
    for weight in (w, w.contiguous(memory_format=torch.channels_last)):
        packed = ops.pack_conv_weight(weight, groups)
        assert packed.dtype is (torch.bfloat16 if NATIVE else torch.float32)
        back = ops.unpack_conv_weight(packed, tuple(w.shape), groups)
        assert torch.equal(back.to(torch.bfloat16), w)


def test_bfloat16_weights_are_half_the_memory():
    w = normal(64, 64, 3, 3, dtype=torch.bfloat16)
    packed = ops.pack_conv_weight(w)
    assert packed.numel() * packed.element_size() == w.numel() * (2 if NATIVE else 4)


def test_a_weight_packed_for_another_type_is_an_error():
    x, w, one = torch.ones(1, 8, 2, 2), torch.ones(32, 8, 1, 1), torch.ones(32)
    pairs = [(torch.bfloat16, torch.float64), (torch.float32, torch.float64)]
    if NATIVE:
        pairs += [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
    for dtype, other in pairs:
        packed = ops.pack_conv_weight(w.to(other))
        with pytest.raises(TypeError, match="packed: expected dtype"):
            ops.conv_bn_add_relu_packed(x.to(dtype), packed, one, one, weight_shape=tuple(w.shape))
    foreign = torch.float16 if NATIVE else torch.bfloat16
    with pytest.raises(TypeError, match="packed: expected a dtype that pack_conv_weight returns"):
        ops.unpack_conv_weight(torch.zeros(256, dtype=foreign), (8, 8, 1, 1))


@pytest.mark.parametrize("channels", [1, 3, 5, 33, 35])
@pytest.mark.parametrize("size", [1, 3])
def test_half_a_pair_does_not_read_its_neighbour(channels, size):
    """The element after an odd number of channels is another pixel's: 0 * NaN must not occur."""
    x = normal(1, channels, 5, 40, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    x[0, :, :, 20] = float("nan")
    w = normal(16, channels, size, size, dtype=torch.bfloat16)
    bn = batch_norm(16, torch.bfloat16)
    expected = reference.conv_bn_add_relu(doubled(x), doubled(w), *doubled(bn)).isnan()
    result = ops.conv_bn_add_relu(x, w, *bn).isnan()
    assert torch.equal(result, expected)
    assert expected.any()
    assert not expected.all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_bfloat16_non_finite_values_pass_through(value):
    x = normal(2, 16, 9, 9, dtype=torch.bfloat16)
    x[1, 3, 4, 5] = value
    w, bn = normal(40, 16, 3, 3, dtype=torch.bfloat16), batch_norm(40, torch.bfloat16)
    for relu in (True, False):
        result = ops.conv_bn_add_relu(x, w, *bn, padding=1, relu=relu)
        truth = reference.conv_bn_add_relu(
            doubled(x), doubled(w), *doubled(bn), padding=1, relu=relu
        )
        torch.testing.assert_close(
            result.double(), truth.double(), rtol=3e-2, atol=3e-2, equal_nan=True
        )


@pytest.mark.skipif(not NATIVE, reason="float32 arithmetic knows them")
def test_subnormal_elements_are_zeros():
    """In tiles and in the pairs after them; without flushing to zero, products would be 0.125."""
    x, w = normal(1, 43, 5, 7, dtype=torch.bfloat16), normal(18, 43, 1, 1, dtype=torch.bfloat16)
    bn = batch_norm(18, torch.bfloat16)
    zeros = [doubled(x), doubled(w)]
    for tensor, other, at in ((x, w, 0), (w, x, 1)):
        tensor[:, at::3], other[:, at::3] = 2.0**-130, 2.0**127
        zeros[at][:, at::3] = 0
    truth = reference.conv_bn_add_relu(*zeros, *doubled(bn), relu=False)
    result = ops.conv_bn_add_relu(x, w, *bn, relu=False)
    torch.testing.assert_close(result.double(), truth, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("channels", [24, 40])
def test_dilated_rows_have_the_same_bits_in_any_block(channels):
    """Alone a row is read in place, with others it is copied.

    The true sums are all zero: what is left of one depends on its order.
    """
    half = normal(1, channels // 2, 9, 8, dtype=torch.bfloat16)
    w = normal(64, channels // 2, 3, 3, dtype=torch.bfloat16)
    one, zero = torch.ones(64), torch.zeros(64)
    operands = torch.cat([half, half], 1), torch.cat([w, -w], 1), one, zero, zero, one
    results = []
    for count in (1, 9, 4):
        torch.set_num_threads(count)
        results.append(ops.conv_bn_add_relu(*operands, padding=2, dilation=2, relu=False))
    assert results[0].count_nonzero() > 500
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("channels", [16, 33, 64])
@pytest.mark.parametrize("pool", [{}, {"pool_kernel": (3, 2), "pool_stride": 1}], ids=str)
def test_bfloat16_stem(channels, pool):
    """Zeros of both signs, values that ReLU cuts off, and NaN, which is propagated."""
    x = normal(2, 3, 21, 18, dtype=torch.bfloat16)
    x[0, 1, 9, 9:11] = float("inf")  # inf - inf is a NaN with its sign bit set
    x[1] = -0.0
    w, bn = normal(channels, 3, 7, 7, dtype=torch.bfloat16), batch_norm(channels, torch.bfloat16)
    truth = reference.conv_bn_relu_maxpool(
        doubled(x), doubled(w), *doubled(bn), stride=2, padding=3, **pool
    )
    result = ops.conv_bn_relu_maxpool(x, w, *bn, stride=2, padding=3, **pool)
    assert truth.isnan().any()
    torch.testing.assert_close(result, truth.to(torch.bfloat16), rtol=8e-3, atol=0, equal_nan=True)


def test_nothing_outside_a_partial_panel_is_written():
    """33 channels: the second panel has one channel; the next 31 elements are other pixels'."""
    x = normal(1, 8, 6, 15, dtype=torch.bfloat16)
    w, bn = normal(33, 8, 3, 3, dtype=torch.bfloat16), batch_norm(33, torch.bfloat16)
    y = ops.conv_bn_add_relu(x, w, *bn, padding=1)
    one = ops.conv_bn_add_relu(x, w[32:], *(t[32:] for t in bn), padding=1)
    rest = ops.conv_bn_add_relu(x, w[:32], *(t[:32] for t in bn), padding=1)
    assert torch.equal(y, torch.cat([rest, one], 1))
