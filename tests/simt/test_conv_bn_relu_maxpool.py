"""The stem's CUDA kernel, every thread of it executed on the CPU."""

from __future__ import annotations

import pytest
import torch
from cases import FORMATS, Conv, batch_norm, conv_weight, doubled, normal
from precisions import PRECISIONS, Precision
from torch._prims_common import suggest_memory_format

from fused_resnet import reference

FLOAT16, BFLOAT16, TF32, FLOAT32 = PRECISIONS
on_tensor_cores = pytest.mark.parametrize("precision", [FLOAT16, BFLOAT16, TF32], ids=str)
EPS = 1e-5
RESNET = {"stride": 2, "padding": 3}

#: Pixels at even places and at odd ones take different ways through the kernel.
STEMS = [
    Conv("resnet", (1, 3, 64, 64), 64, (7, 7), RESNET),
    Conv("odd", (2, 3, 45, 37), 64, (7, 7), RESNET),
    Conv("few-channels-out", (1, 3, 23, 21), 20, (7, 7), RESNET),
    Conv("two-blocks-of-channels", (1, 3, 21, 23), 72, (7, 7), RESNET),
    Conv("odd-places", (1, 3, 13, 15), 16, (3, 3), {"padding": 1}),
    Conv("odd-places-dilated", (1, 3, 17, 15), 16, (3, 3), {"padding": 2, "dilation": 2}),
    Conv(
        "even-places-dilated", (1, 4, 17, 15), 16, (3, 3), {"padding": (1, 3), "dilation": (1, 3)}
    ),
    Conv("deep-stem", (1, 32, 14, 14), 33, (3, 3), {"padding": 1}),
    Conv("one-channel", (2, 1, 12, 12), 8, (5, 5), {"stride": 2, "padding": 2}),
    Conv("oblong", (1, 3, 11, 26), 24, (3, 5), {"stride": (1, 3), "padding": (0, 2)}),
    Conv("one-pixel", (3, 3, 1, 1), 16, (7, 7), RESNET),
    Conv("1x1", (1, 8, 9, 7), 16, (1, 1)),
]
stems = pytest.mark.parametrize("case", STEMS, ids=str)
POOLS = [
    {"pool_kernel": 2, "pool_stride": 2, "pool_padding": 0},
    {"pool_kernel": (3, 2), "pool_stride": (1, 2), "pool_padding": (1, 0)},
    {"pool_kernel": 2, "pool_stride": 3, "pool_padding": 1},
    {"pool_kernel": 1, "pool_stride": 1, "pool_padding": 0},
    {"pool_kernel": (4, 7), "pool_stride": (3, 1), "pool_padding": (2, 3)},
]


def pair(v):
    return list(v) if isinstance(v, tuple) else [v, v]


def geometry(case: Conv) -> list:
    a = case.args
    return [pair(a.get("stride", 1)), pair(a.get("padding", 0)), pair(a.get("dilation", 1)),
            a.get("groups", 1)]  # fmt: skip


def window(pool: dict) -> list:
    names, default = ("pool_kernel", "pool_stride", "pool_padding"), (3, 2, 1)
    return [pair(pool.get(n, d)) for n, d in zip(names, default, strict=True)]


def check(
    simt,
    case: Conv,
    precision: Precision,
    *,
    fmt: str = "channels_last",
    bias: bool = True,
    affine: bool = True,
    kernels: int = 1,
    **pool,
) -> None:
    dtype = precision.dtype
    x = normal(*case.x, dtype=dtype).contiguous(memory_format=FORMATS[fmt])
    w = conv_weight(case, dtype)
    bn = batch_norm(case.k, dtype)
    if not affine:
        bn = (None, None, *bn[2:])
    conv_bias = normal(case.k, dtype=dtype) if bias else None

    def run(x, w, bn, conv_bias):
        return reference.conv_bn_relu_maxpool(
            x, w, *bn, conv_bias=conv_bias,
            **{"stride": 1, "padding": 0, **case.args, **pool}, eps=EPS,
        )  # fmt: skip

    wide = [None if t is None else t.double() for t in (*bn, conv_bias)]
    truth = run(precision.operand(x), precision.operand(w), wide[:4], wide[4])
    eager = run(x, w, bn, conv_bias)
    simt.launches()
    with precision.set():
        result = simt.ops.conv_bn_relu_maxpool(
            x, w, conv_bias, *bn, *geometry(case), EPS, *window(pool)
        )
    names = [launch.kernel for launch in simt.launches()]
    assert len([n for n in names if "conv_bn_relu_maxpool_kernel" in n]) == kernels
    precision.check(result, eager, truth)
    # A single channel is the same memory in both formats, and PyTorch calls it contiguous.
    assert result.is_contiguous(memory_format=suggest_memory_format(x))


@pytest.mark.variants
@on_tensor_cores
@stems
def test_stem(simt, precision, case):
    # Its filters would fill shared memory.
    too_deep = precision is TF32 and case.why == "deep-stem"
    check(simt, case, precision, kernels=0 if too_deep else 1)


@pytest.mark.variants
@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("case", [STEMS[2], STEMS[4]], ids=str)
def test_maxpool_windows(simt, pool, case):
    check(simt, case, FLOAT16, **pool)


@on_tensor_cores
def test_whole_size(simt, precision):
    check(simt, Conv("224", (1, 3, 224, 224), 64, (7, 7), RESNET), precision)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_parts(simt, fmt, bias, affine):
    check(simt, STEMS[2], BFLOAT16, fmt=fmt, bias=bias, affine=affine)


@pytest.mark.parametrize(
    "case",
    [
        Conv("groups", (1, 4, 9, 9), 8, (3, 3), {"groups": 2}),
        Conv("too-deep", (1, 128, 9, 9), 8, (3, 3)),
    ],
    ids=str,
)
def test_what_the_kernel_cannot_do_goes_in_two_steps(simt, case):
    check(simt, case, FLOAT16, kernels=0)


def test_a_window_too_large_goes_in_two_steps(simt):
    case = Conv("large-window", (1, 3, 20, 20), 8, (3, 3))
    check(simt, case, FLOAT16, kernels=0, pool_kernel=17, pool_stride=1)


def test_strict_float32_goes_in_two_steps(simt):
    check(simt, STEMS[2], FLOAT32, kernels=0)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("case", [STEMS[1], STEMS[4]], ids=str)
def test_packed_equals_live(simt, precision, case):
    dtype = precision.dtype
    x, w, bn = normal(*case.x, dtype=dtype), conv_weight(case, dtype), batch_norm(case.k, dtype)
    weight, bias, mean, var = doubled(bn)
    scale = weight / torch.sqrt(var + EPS)
    shift = bias - mean * scale
    with precision.set():
        live = simt.ops.conv_bn_relu_maxpool(x, w, None, *bn, *geometry(case), EPS, *window({}))
        packed = simt.ops.conv_bn_relu_maxpool_packed(
            x,
            simt.ops.pack_conv_weight(w, 1),
            scale.float(),
            shift.float(),
            list(w.shape),
            *geometry(case),
            *window({}),
        )
    rtol = 1e-5 if dtype is torch.float32 else torch.finfo(dtype).eps * 2
    torch.testing.assert_close(packed, live, rtol=rtol, atol=rtol)
    assert packed.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.variants
@on_tensor_cores
@pytest.mark.parametrize("case", [STEMS[2], STEMS[4]], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_reach_what_they_should(simt, precision, case, value):
    """And no other: neither through what pads a kernel's row nor from the neighbouring pixels."""
    dtype = precision.dtype
    x = normal(*case.x, dtype=dtype)
    for y, column in ((0, 0), (5, 6), (case.x[2] - 1, case.x[3] - 1), (8, case.x[3] - 1)):
        x[0, :, y, column] = value
    w, bn = conv_weight(case, dtype), batch_norm(case.k, dtype)
    with precision.set():
        result = simt.ops.conv_bn_relu_maxpool(x, w, None, *bn, *geometry(case), EPS, *window({}))
    expected = reference.conv_bn_relu_maxpool(
        doubled(x), doubled(w), *doubled(bn), **{"stride": 1, "padding": 0, **case.args}
    )
    rtol = 3e-2 if precision is BFLOAT16 else 4e-3
    torch.testing.assert_close(result.double(), expected, rtol=rtol, atol=rtol, equal_nan=True)


@pytest.mark.variants
def test_views_give_what_their_copies_give(simt):
    case = STEMS[2]
    n, c, h, w = case.x
    x = normal(n + 1, c + 2, h + 1, 2 * w, dtype=torch.float16)[1:, 1:-1, 1:, ::2]
    # One element past a multiple of 16 bytes.
    flat = normal(1, 1, 1, n * c * h * w + 1, dtype=x.dtype).flatten()[1:]
    weight, bn = conv_weight(case, x.dtype), batch_norm(case.k, x.dtype)
    for view in (x, flat.view(n, h, w, c).permute(0, 3, 1, 2)):
        results = [
            simt.ops.conv_bn_relu_maxpool(m, weight, None, *bn, *geometry(case), EPS, *window({}))
            for m in (view, view.clone())
        ]
        assert torch.equal(*results)


@pytest.mark.variants
def test_empty_batch(simt):
    w, bn = torch.randn(16, 3, 7, 7).half(), batch_norm(16, torch.float16)
    x = torch.empty(0, 3, 20, 20).half()
    y = simt.ops.conv_bn_relu_maxpool(x, w, None, *bn, [2, 2], [3, 3], [1, 1], 1, EPS, *window({}))
    assert y.shape == (0, 16, 5, 5)


def test_same_bits_in_any_order_of_threads(simt):
    case = STEMS[1]
    x, w = normal(*case.x, dtype=torch.float16), conv_weight(case, torch.float16)
    bn = batch_norm(case.k, torch.float16)
    results = []
    for seed in (0, 1, 2):
        simt.seed(seed)
        results.append(
            simt.ops.conv_bn_relu_maxpool(x, w, None, *bn, *geometry(case), EPS, *window({}))
        )
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_wrong_arguments_are_named(simt):
    x, w, one = torch.randn(1, 3, 9, 9).half(), torch.randn(4, 3, 3, 3).half(), torch.ones(4)
    plain = [[1, 1], [0, 0], [1, 1], 1]

    def call(x=x, w=w, var=one, pool=((3, 3), (2, 2), (1, 1))):
        return simt.ops.conv_bn_relu_maxpool(x, w, None, one, one, one, var, *plain, EPS, *pool)

    with pytest.raises(TypeError, match="conv_bn_relu_maxpool: x: expected dtype"):
        call(x.double(), w.double())
    with pytest.raises(TypeError, match="conv_bn_relu_maxpool: weight: expected dtype"):
        call(w=w.float())
    with pytest.raises(ValueError, match="conv_bn_relu_maxpool: var: expected shape"):
        call(var=one[:3])
    with pytest.raises(ValueError, match="pool_padding: expected at most half"):
        call(pool=((2, 2), (2, 2), (2, 2)))
    with pytest.raises(ValueError, match="pool_kernel: expected at most the padded map"):
        call(pool=((9, 9), (2, 2), (0, 0)))
    with pytest.raises(ValueError, match="conv_bn_relu_maxpool_packed: packed: expected shape"):
        simt.ops.conv_bn_relu_maxpool_packed(
            x, w.flatten()[1:], one, one, [4, 3, 3, 3], *plain, [3, 3], [2, 2], [1, 1]
        )
