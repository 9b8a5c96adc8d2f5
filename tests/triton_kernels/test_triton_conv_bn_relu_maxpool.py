"""The stem's Triton kernel, in the hardened interpreter."""

from __future__ import annotations

import pytest
import torch
from cases import FORMATS, Conv, batch_norm, conv_weight, doubled, normal
from precisions import PRECISIONS, half_precisions, precisions
from test_conv_bn_relu_maxpool import POOLS, RESNET, STEMS, geometry, window
from torch._prims_common import suggest_memory_format

from fused_resnet import reference
from fused_resnet.backends.triton._conv_plan import precision_of
from fused_resnet.backends.triton.conv_bn_relu_maxpool import CONFIGS

FLOAT16, BFLOAT16, TF32, FLOAT32 = PRECISIONS
EPS = 1e-5


def operands(case: Conv, precision, bias: bool = True, affine: bool = True, fmt="channels_last"):
    dtype = precision.dtype
    x = normal(*case.x, dtype=dtype).contiguous(memory_format=FORMATS[fmt])
    bn = batch_norm(case.k, dtype)
    bn = bn if affine else (None, None, *bn[2:])
    return x, conv_weight(case, dtype), bn, normal(case.k, dtype=dtype) if bias else None


def check(interpreted, case, precision, *, config=None, kernels=1, pool=None, **options) -> None:
    x, w, bn, conv_bias = operands(case, precision, **options)
    pool = pool or {}

    def run(x, w, bn, conv_bias):
        return reference.conv_bn_relu_maxpool(
            x, w, *bn, conv_bias=conv_bias,
            **{"stride": 1, "padding": 0, **case.args, **pool}, eps=EPS,
        )  # fmt: skip

    wide = [None if t is None else t.double() for t in (*bn, conv_bias)]
    truth = run(precision.operand(x), precision.operand(w), wide[:4], wide[4])
    eager = run(x, w, bn, conv_bias)
    with precision.set():
        result = interpreted.ops.conv_bn_relu_maxpool(
            x, w, conv_bias, *bn, *geometry(case), EPS, *window(pool), config=config
        )
    names = [launch.kernel for launch in interpreted.launches()]
    assert names.count("conv_bn_relu_maxpool_kernel") == kernels
    precision.check(result, eager, truth)
    assert result.is_contiguous(memory_format=suggest_memory_format(x))


@precisions
@pytest.mark.parametrize("case", STEMS, ids=str)
def test_stem(interpreted, case, precision):
    check(interpreted, case, precision)


@pytest.mark.parametrize("precision", [BFLOAT16, TF32, FLOAT32], ids=str)
@pytest.mark.parametrize("index", [0, 1])
def test_every_configuration(interpreted, precision, index):
    with precision.set():
        table = CONFIGS[precision_of(torch.empty(0, dtype=precision.dtype))]
    if index < len(table):
        for case in (STEMS[1], STEMS[5]):
            check(interpreted, case, precision, config=table[index])


@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("case", [STEMS[2], STEMS[4]], ids=str)
def test_maxpool_windows(interpreted, pool, case):
    check(interpreted, case, FLOAT16, pool=pool)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_parts(interpreted, fmt, bias, affine):
    check(interpreted, STEMS[2], BFLOAT16, fmt=fmt, bias=bias, affine=affine)


def test_what_the_kernel_cannot_do_goes_in_two_steps(interpreted):
    grouped = Conv("groups", (1, 4, 9, 9), 8, (3, 3), {"groups": 2})
    check(interpreted, grouped, FLOAT16, kernels=0)
    large = Conv("large", (1, 3, 20, 20), 8, (3, 3))
    check(interpreted, large, FLOAT16, kernels=0, pool={"pool_kernel": 17, "pool_stride": 1})


@precisions
@pytest.mark.parametrize("case", [STEMS[1], STEMS[4]], ids=str)
def test_packed_equals_live(interpreted, precision, case):
    x, w, bn, _ = operands(case, precision)
    weight, bias, mean, var = doubled(bn)
    scale = weight / torch.sqrt(var + EPS)
    flat = w.permute(0, 2, 3, 1).reshape(-1)
    with precision.set():
        live = interpreted.ops.conv_bn_relu_maxpool(
            x, w, None, *bn, *geometry(case), EPS, *window({})
        )
        packed = interpreted.ops.conv_bn_relu_maxpool_packed(
            x, flat, scale.float(), (bias - mean * scale).float(), list(w.shape),
            *geometry(case), *window({}),
        )  # fmt: skip
    rtol = max(torch.finfo(precision.dtype).eps * 2, 1e-5)
    torch.testing.assert_close(packed, live, rtol=rtol, atol=rtol)
    assert packed.is_contiguous(memory_format=torch.channels_last)


@half_precisions
@pytest.mark.parametrize("case", [STEMS[2], STEMS[4]], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_reach_what_they_should(interpreted, precision, case, value):
    """And no other: neither through what pads a tile nor from the neighbouring pixels."""
    x, w, bn, _ = operands(case, precision)
    for y, column in ((0, 0), (5, 6), (case.x[2] - 1, case.x[3] - 1), (8, case.x[3] - 1)):
        x[0, :, y, column] = value
    result = interpreted.ops.conv_bn_relu_maxpool(
        x, w, None, *bn, *geometry(case), EPS, *window({})
    )
    expected = reference.conv_bn_relu_maxpool(
        doubled(x), doubled(w), *doubled(bn), **{"stride": 1, "padding": 0, **case.args}
    )
    rtol = {torch.float16: 4e-3, torch.bfloat16: 3e-2}[precision.dtype]
    torch.testing.assert_close(result.double(), expected, rtol=rtol, atol=rtol, equal_nan=True)


def test_empty_batch(interpreted):
    w, bn = torch.randn(16, 3, 7, 7).half(), batch_norm(16, torch.float16)
    y = interpreted.ops.conv_bn_relu_maxpool(
        torch.empty(0, 3, 20, 20).half(), w, None, *bn, [2, 2], [3, 3], [1, 1], 1, EPS,
        *window({}),
    )  # fmt: skip
    assert y.shape == (0, 16, 5, 5)
    assert interpreted.launches() == []


def test_the_same_bits_in_any_order_of_programs(interpreted):
    case = Conv("odd", (2, 3, 45, 37), 72, (7, 7), RESNET)
    x, w, bn, _ = operands(case, FLOAT16)
    results = []
    for seed in (0, 1, 2):
        interpreted.seed(seed)
        results.append(
            interpreted.ops.conv_bn_relu_maxpool(x, w, None, *bn, *geometry(case), EPS, *window({}))
        )
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_wrong_arguments_are_named(interpreted):
    x, w, one = torch.randn(1, 3, 9, 9).half(), torch.randn(4, 3, 3, 3).half(), torch.ones(4)
    plain = [[1, 1], [0, 0], [1, 1], 1]

    def call(x=x, w=w, var=one, pool=((3, 3), (2, 2), (1, 1))):
        return interpreted.ops.conv_bn_relu_maxpool(
            x, w, None, one, one, one, var, *plain, EPS, *pool
        )

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
