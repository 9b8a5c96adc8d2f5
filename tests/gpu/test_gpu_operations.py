"""The public functions on a GPU: values against float64, formats, parts, errors.

The bound is 1.5 times the error of PyTorch's own operators on the same GPU. With tf32 it is that of
exact products of rounded operands: cuDNN uses tf32 where it sees fit, and is no measure for it.
"""

from __future__ import annotations

import pytest
import torch
from cases import CONVS, FORMATS, MAPS, Conv, conv_weight, normal
from on_gpu import (
    BACKEND,
    DEVICE,
    bn_operands,
    called,
    conv_operands,
    exact,
    folded,
    on_the_device,
    there,
    unfused,
)
from precisions import PRECISIONS, Precision, half_precisions, precisions
from tolerances import assert_as_exact_as_pytorch, error, tf32_bound

import fused_resnet as fr
from fused_resnet import ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
formats = pytest.mark.parametrize("fmt", FORMATS)
convs = pytest.mark.parametrize("case", CONVS, ids=str)
maps = pytest.mark.parametrize("shape", MAPS.values(), ids=MAPS)
STEM = {"stride": 2, "padding": 3}
STEMS = [
    Conv("resnet", (2, 3, 64, 64), 64, (7, 7), STEM),
    Conv("odd", (1, 3, 45, 37), 24, (7, 7), STEM),
    Conv("whole", (2, 3, 224, 224), 64, (7, 7), STEM),
    Conv("tiles-in-turn", (32, 3, 224, 224), 64, (7, 7), STEM),
    Conv("deep-stem", (1, 32, 19, 19), 33, (3, 3), {"stride": 1, "padding": 1}),
]
POOLS = [
    {"pool_kernel": 2, "pool_stride": 2, "pool_padding": 0},
    {"pool_kernel": (3, 2), "pool_stride": (1, 2), "pool_padding": (1, 0)},
    {"pool_kernel": 2, "pool_stride": 3, "pool_padding": 1},
]

#: ResNet-50's own layers, a batch of 8: large grids, every tile, the whole-block kernel's shapes.
LAYERS = [
    Conv("stage1-1x1", (8, 64, 56, 56), 256, (1, 1)),
    Conv("stage1-3x3", (8, 64, 56, 56), 64, args={"padding": 1}),
    Conv("stage2-3x3/2", (8, 128, 56, 56), 128, args={"padding": 1, "stride": 2}),
    Conv("stage2-shortcut", (8, 256, 56, 56), 512, (1, 1), {"stride": 2}),
    Conv("stage3-3x3", (8, 256, 14, 14), 256, args={"padding": 1}),
    Conv("stage4-1x1", (8, 2048, 7, 7), 512, (1, 1)),
    Conv("stage4-3x3", (1, 512, 7, 7), 512, args={"padding": 1}),
    Conv("resnext", (4, 128, 28, 28), 128, args={"padding": 1, "groups": 32}),
]


def check(operation, operands, fmt, precision, **options):
    operands = there(operands)
    with precision.set():
        result = on_the_device(called(operation, operands, **options), fmt)
    eager = unfused(operation, operands, **options).cpu()
    convolves = precision if "conv_weight" in operands else None
    truth = unfused(operation, exact(operands, convolves), **options)
    precision.check(result, eager, truth, operands["conv_weight"][0].numel() if convolves else 0)


@dtypes
@formats
@maps
@pytest.mark.parametrize("residual", [True, False])
def test_bn_add_relu(dtype, fmt, shape, residual):
    operands = bn_operands(shape, dtype, fmt, residual=residual)
    check("bn_add_relu", operands, fmt, Precision("", dtype))


@dtypes
@formats
@maps
def test_bn_add_relu_training(dtype, fmt, shape):
    operands = there(bn_operands(shape, dtype, fmt, residual=True))
    truth_operands = exact(operands)
    options = {"training": True, "momentum": 0.3}
    own = {name: t.clone() for name, t in operands.items()}
    result = on_the_device(called("bn_add_relu", own, **options), fmt)
    eager = unfused("bn_add_relu", operands, **options).cpu()
    truth = unfused("bn_add_relu", truth_operands, **options)
    assert_as_exact_as_pytorch(result, eager, truth)
    for name in ("running_mean", "running_var"):
        assert error(own[name].cpu(), truth_operands[name]) < 2e-6


@precisions
@formats
@convs
def test_conv_bn_add_relu(precision, fmt, case):
    operands = conv_operands(case, precision.dtype, fmt, residual=True)
    check("conv_bn_add_relu", operands, fmt, precision, **case.args)


@precisions
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_layers_of_resnet50(precision, case):
    operands = conv_operands(case, precision.dtype, "channels_last", residual=True)
    check("conv_bn_add_relu", operands, "channels_last", precision, **case.args)


@precisions
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_parts(precision, relu, residual, bias):
    case = CONVS[4]
    operands = conv_operands(case, precision.dtype, "channels_last", residual=residual)
    if bias:
        operands["conv_bias"] = normal(case.k, dtype=precision.dtype)
    check("conv_bn_add_relu", operands, "channels_last", precision, relu=relu, **case.args)


@precisions
@formats
@pytest.mark.parametrize("case", [CONVS[3], CONVS[4], CONVS[9], CONVS[11]], ids=str)
def test_conv_in_training(precision, fmt, case):
    """Convolution with the statistics in its epilogue, then batch norm by them."""
    operands = there(conv_operands(case, precision.dtype, fmt, residual=True))
    truth_operands = exact(operands, precision)
    options = {"training": True, "momentum": 0.3, **case.args}
    own = {name: t.clone() for name, t in operands.items()}
    with precision.set():
        result = on_the_device(called("conv_bn_add_relu", own, **options), fmt)
    eager = unfused("conv_bn_add_relu", operands, **options).cpu()
    truth = unfused("conv_bn_add_relu", truth_operands, **options)
    # Statistics are those of the rounded convolution, as PyTorch's are.
    limit = {torch.float32: 2e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}[precision.dtype]
    if precision.tf32:
        bound = tf32_bound(operands["conv_weight"][0].numel())
        assert error(result, truth) < bound
        limit = 2 * bound  # the variance is a square
    else:
        assert_as_exact_as_pytorch(result, eager, truth)
    for name in ("running_mean", "running_var"):
        assert error(own[name].cpu(), truth_operands[name]) < limit


@precisions
@formats
@pytest.mark.parametrize("case", STEMS, ids=str)
def test_conv_bn_relu_maxpool(precision, fmt, case):
    operands = conv_operands(case, precision.dtype, fmt, residual=False)
    check("conv_bn_relu_maxpool", operands, fmt, precision, **case.args)


@half_precisions
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_maxpool_windows(precision, pool):
    operands = conv_operands(STEMS[1], precision.dtype, "channels_last", residual=False)
    options = {**STEMS[1].args, **pool}
    check("conv_bn_relu_maxpool", operands, "channels_last", precision, **options)


# Packed forms: what a frozen network calls


@precisions
@pytest.mark.parametrize("case", [*CONVS, *LAYERS], ids=str)
def test_packed_equals_live(precision, case):
    operands = there(conv_operands(case, precision.dtype, "channels_last", residual=True))
    weight, (scale, shift) = operands["conv_weight"], folded(operands)
    packed = ops.pack_conv_weight(weight, case.args.get("groups", 1))
    assert packed.dtype is weight.dtype
    assert torch.equal(
        ops.unpack_conv_weight(packed, tuple(weight.shape), case.args.get("groups", 1)), weight
    )
    with precision.set(), fr.use_backend(BACKEND):
        live = ops.conv_bn_add_relu(**operands, **case.args)
        result = ops.conv_bn_add_relu_packed(
            operands["x"],
            packed,
            scale,
            shift,
            operands["residual"],
            weight_shape=tuple(weight.shape),
            **case.args,
        )
    # The same kernel; scale and shift were rounded from float64 here and from float32 there.
    rtol = 1e-5 if precision.dtype is torch.float32 else torch.finfo(precision.dtype).eps * 2
    torch.testing.assert_close(result, live, rtol=rtol, atol=rtol)


@precisions
@pytest.mark.parametrize("case", STEMS, ids=str)
def test_packed_stem_equals_live(precision, case):
    operands = there(conv_operands(case, precision.dtype, "channels_last", residual=False))
    weight, (scale, shift) = operands["conv_weight"], folded(operands)
    with precision.set(), fr.use_backend(BACKEND):
        live = ops.conv_bn_relu_maxpool(**operands, **case.args)
        result = ops.conv_bn_relu_maxpool_packed(
            operands["x"],
            ops.pack_conv_weight(weight),
            scale,
            shift,
            weight_shape=tuple(weight.shape),
            **case.args,
        )
    rtol = 1e-5 if precision.dtype is torch.float32 else torch.finfo(precision.dtype).eps * 2
    torch.testing.assert_close(result, live, rtol=rtol, atol=rtol)


# Inputs that are not plain


@precisions
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_pass_through(precision, value):
    operands = conv_operands(CONVS[3], precision.dtype, "channels_last", residual=True)
    operands["x"][1, 3, 4, 5] = value
    operands["residual"][0, 5, 0, 0] = value
    operands = there(operands)
    with precision.set():
        result = called("conv_bn_add_relu", operands, **CONVS[3].args).cpu()
    truth = unfused("conv_bn_add_relu", exact(operands, precision), **CONVS[3].args)
    assert torch.equal(result.isnan(), truth.isnan())
    assert torch.equal(result.isposinf(), truth.isposinf())


@dtypes
def test_views_give_what_their_copies_give(dtype):
    operands = there(conv_operands(CONVS[3], dtype, "channels_last", residual=False))
    n, c, h, w = CONVS[3].x
    big = there(normal(n + 1, c + 8, h + 2, 2 * w, dtype=dtype))
    flat = there(normal(1, 1, 1, n * c * h * w + 1, dtype=dtype)).flatten()[1:]
    views = {
        "sliced": big[1:, 5:-3, 1:-1, ::2],
        "channels of a wider map": big.contiguous(memory_format=torch.channels_last)[1:, 8:, 2:],
        "transposed": there(normal(n, c, w, h, dtype=dtype)).transpose(2, 3),
        "expanded": there(normal(1, c, h, w, dtype=dtype)).expand(n, c, h, w),
        "misaligned": flat.view(n, c, h, w),
        "misaligned channels_last": flat.view(n, h, w, c).permute(0, 3, 1, 2),
    }
    for name, x in views.items():
        before = x.clone()
        result = called("conv_bn_add_relu", {**operands, "x": x}, **CONVS[3].args)
        copy = called("conv_bn_add_relu", {**operands, "x": x.clone()}, **CONVS[3].args)
        rtol = max(torch.finfo(dtype).eps * 4, 1e-5)
        torch.testing.assert_close(result, copy, rtol=rtol, atol=rtol, msg=lambda m: f"{name}: {m}")  # noqa: B023
        assert torch.equal(x, before), name


@dtypes
@formats
def test_empty_batch(dtype, fmt):
    case = Conv("empty", (0, 16, 8, 8), 24, args={"padding": 1})
    operands = there(conv_operands(case, dtype, fmt, residual=False))
    assert called("conv_bn_add_relu", operands, padding=1).shape == (0, 24, 8, 8)
    assert called("conv_bn_relu_maxpool", operands, padding=1).shape == (0, 24, 2, 2)
    operands = there(bn_operands((0, 16, 8, 8), dtype, fmt, residual=True))
    assert called("bn_add_relu", operands).shape == (0, 16, 8, 8)


# The backend's choice


def test_auto_takes_the_kernels_of_the_device():
    operands = there(conv_operands(CONVS[3], torch.float16, "channels_last", residual=True))
    forced = called("conv_bn_add_relu", operands, **CONVS[3].args)
    assert torch.equal(ops.conv_bn_add_relu(**operands, **CONVS[3].args), forced)


def test_float64_is_pytorchs_own():
    operands = there(bn_operands((2, 8, 5, 5), torch.float64, "channels_last", residual=True))
    expected = unfused("bn_add_relu", operands)
    torch.testing.assert_close(ops.bn_add_relu(**operands), expected, rtol=0, atol=0)
    with pytest.raises(TypeError, match="bn_add_relu: x: expected dtype"):
        called("bn_add_relu", operands)


def test_the_cpus_backend_is_not_for_this_device():
    operands = there(bn_operands((2, 8, 5, 5), torch.float32, "channels_last", residual=False))
    with (
        fr.use_backend("cpu"),
        pytest.raises(fr.BackendUnavailable, match=r"bn_add_relu: backend 'cpu'.*'cuda'"),
    ):
        ops.bn_add_relu(**operands)


def test_autocast_casts_the_convolution_only():
    operands = there(conv_operands(CONVS[3], torch.float32, "channels_last", residual=False))
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast(DEVICE.type, dtype):
            result = called("conv_bn_add_relu", operands, **CONVS[3].args)
            eager = unfused("conv_bn_add_relu", operands, **CONVS[3].args)
        assert result.dtype is eager.dtype is dtype
        rounded = {**operands, "x": operands["x"].to(dtype)}
        rounded["conv_weight"] = operands["conv_weight"].to(dtype)
        truth = unfused("conv_bn_add_relu", exact(rounded), **CONVS[3].args)
        assert_as_exact_as_pytorch(result.cpu(), eager.cpu(), truth)


def conv_changes():
    w = conv_weight(CONVS[3], torch.float32)
    return [
        ({"conv_weight": w}, ValueError, "conv_weight: expected device cuda"),
        ({"residual": torch.empty(2, 64, 14, 14)}, ValueError, "residual: expected device cuda"),
        ({"running_mean": torch.zeros(64)}, ValueError, "running_mean: expected device cuda"),
        ({"bn_weight": torch.zeros(63)}, ValueError, r"bn_weight: expected shape \(64,\)"),
        ({"conv_weight": w.half().to(DEVICE)}, TypeError, "conv_weight: expected dtype"),
        ({"groups": 5}, ValueError, "groups: expected a divisor"),
    ]


@pytest.mark.parametrize("number", range(6))
def test_wrong_arguments_are_named(number):
    changes, kind, message = conv_changes()[number]
    operands = there(conv_operands(CONVS[3], torch.float32, "channels_last", residual=False))
    with pytest.raises(kind, match=f"conv_bn_add_relu: {message}"):
        called("conv_bn_add_relu", {**operands, **changes}, **CONVS[3].args)


def test_bare_operators_check_for_themselves():
    """``torch.ops`` goes past the Python checks: the compiled code must refuse too."""
    compiled = torch.ops.fused_resnet
    x, w, one = there((torch.randn(1, 4, 5, 5), torch.randn(6, 4, 3, 3), torch.ones(6)))
    geometry = ([1, 1], [0, 0], [1, 1], 1)
    flags = (*geometry, 1e-5, True)
    for call in (
        lambda: compiled.conv_bn_add_relu(x, w, None, None, None, one[:5], one, None, *flags),
        lambda: compiled.conv_bn_add_relu(x[0], w, None, None, None, one, one, None, *flags),
        lambda: compiled.conv_bn_add_relu(x, w.cpu(), None, None, None, one, one, None, *flags),
        lambda: compiled.conv_bn_add_relu(x, w, None, None, None, one.cpu(), one, None, *flags),
        lambda: compiled.conv_bn_add_relu_packed(
            x, one, one, one, None, [6, 4, 3, 3], *geometry, True
        ),
        lambda: compiled.bn_add_relu(x, one, None, None, None, None, True, 1e-5, True),
        lambda: compiled.bn_add_relu_backward(
            x, x, None, None, one[:4], one[:4], True, 1e-5, True, False
        ),
    ):
        with pytest.raises((ValueError, TypeError)):
            call()


def test_every_precision_is_here():
    """The decorators are the simulator's: a precision left out there would be left out here."""
    assert [p.name for p in PRECISIONS] == ["float16", "bfloat16", "tf32", "float32"]
