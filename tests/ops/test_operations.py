"""Every operation against float64: values and memory formats."""

from __future__ import annotations

import pytest
import torch
from cases import CONVS, FORMATS, batch_norm, conv_weight, doubled, normal
from operation_cases import (
    STEMS,
    convs,
    dtypes,
    extras,
    formats,
    keeps_format,
    maps,
    run_conv,
)
from tolerances import assert_as_exact_as_pytorch, error

from fused_resnet import ops, reference

# bn_add_relu


@dtypes
@formats
@maps
@extras
def test_bn_add_relu(dtype, fmt, shape, relu, residual):
    x = normal(*shape, dtype=dtype, shift=0.5).contiguous(memory_format=FORMATS[fmt])
    r = normal(*shape, dtype=dtype).contiguous(memory_format=FORMATS[fmt]) if residual else None
    bn = batch_norm(shape[1], dtype)
    truth = reference.bn_add_relu(
        doubled(x), *doubled(bn), None if r is None else doubled(r), relu=relu
    )
    eager = reference.bn_add_relu(x, *bn, r, relu=relu)
    result = ops.bn_add_relu(x, *bn, r, relu=relu)
    assert_as_exact_as_pytorch(result, eager, truth)
    assert keeps_format(result, fmt)


@dtypes
@formats
@maps
def test_bn_add_relu_training(dtype, fmt, shape):
    x = normal(*shape, dtype=dtype, shift=3.0).contiguous(memory_format=FORMATS[fmt])
    r = normal(*shape, dtype=dtype)
    bn = batch_norm(shape[1], dtype)
    eager_bn, truth_bn = tuple(t.clone() for t in bn), doubled(bn)
    truth = reference.bn_add_relu(doubled(x), *truth_bn, doubled(r), training=True, momentum=0.3)
    eager = reference.bn_add_relu(x, *eager_bn, r, training=True, momentum=0.3)
    result = ops.bn_add_relu(x, *bn, r, training=True, momentum=0.3)
    assert_as_exact_as_pytorch(result, eager, truth)
    # Running statistics are float32 for all storage types of x but float64.
    limit = 1e-12 if dtype is torch.float64 else 2e-6
    assert error(bn[2], truth_bn[2]) < limit
    assert error(bn[3], truth_bn[3]) < limit


@maps
@formats
def test_statistics_survive_a_large_mean(shape, fmt):
    """A mean of a thousand deviations, where sums of squares would lose all digits."""
    x = normal(*shape, dtype=torch.float32, shift=1000.0).contiguous(memory_format=FORMATS[fmt])
    mean, var = torch.zeros(2, shape[1])
    truth_mean, truth_var = torch.zeros(2, shape[1], dtype=torch.float64)
    ops.bn_add_relu(x, None, None, mean, var, training=True, momentum=1.0)
    reference.bn_add_relu(
        doubled(x), None, None, truth_mean, truth_var, training=True, momentum=1.0
    )
    assert error(mean, truth_mean) < 1e-6
    assert error(var, truth_var) < 1e-5


def test_no_affine_no_statistics():
    x = normal(2, 8, 5, 5, dtype=torch.float32)
    result = ops.bn_add_relu(x, None, None, None, None, training=True)
    truth = reference.bn_add_relu(doubled(x), None, None, None, None, training=True)
    torch.testing.assert_close(result.double(), truth, rtol=1e-5, atol=1e-5)


# conv_bn_add_relu


@dtypes
@formats
@convs
def test_conv_bn_add_relu(dtype, fmt, case):
    result, eager, truth = run_conv(case, dtype, fmt, "conv_bn_add_relu", r=True)
    assert_as_exact_as_pytorch(result, eager, truth)
    assert keeps_format(result, fmt)


@formats
@extras
@pytest.mark.parametrize("case", CONVS[3:5], ids=str)
def test_conv_bn_add_relu_options(fmt, relu, residual, case):
    result, eager, truth = run_conv(
        case, torch.float32, fmt, "conv_bn_add_relu", r=residual, relu=relu
    )
    assert_as_exact_as_pytorch(result, eager, truth)
    assert relu == bool((result >= 0).all())


@dtypes
def test_conv_bias_and_eps(dtype):
    case = CONVS[3]
    bias = normal(case.k, dtype=dtype)
    x, w, bn = normal(*case.x, dtype=dtype), conv_weight(case, dtype), batch_norm(case.k, dtype)
    truth = reference.conv_bn_add_relu(
        doubled(x), doubled(w), *doubled(bn), conv_bias=doubled(bias), padding=1, eps=1e-1
    )
    eager = reference.conv_bn_add_relu(x, w, *bn, conv_bias=bias, padding=1, eps=1e-1)
    result = ops.conv_bn_add_relu(x, w, *bn, conv_bias=bias, padding=1, eps=1e-1)
    assert_as_exact_as_pytorch(result, eager, truth)


@formats
def test_conv_in_training_updates_the_statistics(fmt):
    case = CONVS[3]
    x = normal(*case.x, dtype=torch.float64).contiguous(memory_format=FORMATS[fmt])
    w = conv_weight(case, torch.float64)
    bn = batch_norm(case.k, torch.float64)
    truth_bn = doubled(bn)
    truth = reference.conv_bn_add_relu(x, w, *truth_bn, training=True, **case.args)
    result = ops.conv_bn_add_relu(x, w, *bn, training=True, **case.args)
    torch.testing.assert_close(result, truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(bn, truth_bn, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_weight_in_either_memory_format(weight_format):
    case = CONVS[3]
    x, w = normal(*case.x, dtype=torch.float32), conv_weight(case, torch.float32)
    bn = batch_norm(case.k, torch.float32)
    expected = ops.conv_bn_add_relu(x, w, *bn, **case.args)
    w = w.contiguous(memory_format=FORMATS[weight_format])
    assert torch.equal(ops.conv_bn_add_relu(x, w, *bn, **case.args), expected)


# conv_bn_relu_maxpool

POOLS = [
    {},
    {"pool_kernel": 2, "pool_stride": 2, "pool_padding": 0},
    {"pool_kernel": (3, 2), "pool_stride": (1, 2), "pool_padding": (1, 0)},
    {"pool_kernel": 2, "pool_stride": 3, "pool_padding": 1},
]


@dtypes
@formats
@pytest.mark.parametrize("case", STEMS, ids=str)
def test_conv_bn_relu_maxpool(dtype, fmt, case):
    result, eager, truth = run_conv(case, dtype, fmt, "conv_bn_relu_maxpool", r=False)
    assert_as_exact_as_pytorch(result, eager, truth)
    assert keeps_format(result, fmt)


@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_maxpool_windows(pool):
    result, eager, truth = run_conv(
        STEMS[1], torch.float32, "channels_last", "conv_bn_relu_maxpool", r=False, **pool
    )
    assert_as_exact_as_pytorch(result, eager, truth)
