"""The convolution's Triton kernels and their host functions, in the hardened interpreter."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from cases import CONVS, FORMATS, Conv, normal
from precisions import PRECISIONS, Precision, half_precisions, precisions
from test_conv_bn_add_relu import (
    AWKWARD,
    PLANNED,
    Operands,
    channels_last,
    folded,
    geometry,
    packed,
)
from tolerances import error
from torch import Tensor

from fused_resnet.triton import _conv_plan

FLOAT16, BFLOAT16, TF32, FLOAT32 = PRECISIONS
#: Large ones cost seconds each and are of no other kind for these kernels.
LARGE = {"many-blocks"}


def check(interpreted, case: Conv, precision: Precision, **flags) -> list:
    """The launches."""
    operands = Operands(case, precision)
    result = operands.run(interpreted, **flags)
    precision.check(result, operands.eager(**flags), operands.truth(**flags))
    assert result.is_contiguous(memory_format=torch.channels_last)
    return interpreted.launches()


@precisions
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=str(c), marks=[pytest.mark.slow] * (str(c) in LARGE)) for c in CONVS],
)
def test_operation(interpreted, case, precision):
    check(interpreted, case, precision)


@precisions
@pytest.mark.parametrize("case", AWKWARD, ids=str)
def test_awkward_shapes(interpreted, case, precision):
    check(interpreted, case, precision)


@precisions
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_flags(interpreted, precision, relu, residual, bias):
    check(interpreted, AWKWARD[0], precision, relu=relu, residual=residual, bias=bias)


@half_precisions
def test_contiguous_maps_come_back_contiguous(interpreted, precision):
    operands = Operands(AWKWARD[0], precision)
    result = operands.run(interpreted, x=operands.x.contiguous())
    assert result.is_contiguous()
    assert torch.equal(result, operands.run(interpreted))


@precisions
def test_views(interpreted, precision):
    """One that begins between multiples of 16 bytes, and one of some of the channels."""
    operands = Operands(AWKWARD[0], precision)
    expected = operands.run(interpreted)
    n, c, h, w = operands.x.shape
    storage = torch.empty(operands.x.numel() + 1, dtype=operands.x.dtype)
    view = storage[1:].view(n, h, w, c).permute(0, 3, 1, 2)
    view.copy_(operands.x)
    assert torch.equal(operands.run(interpreted, x=view), expected)
    wide = channels_last(torch.cat([operands.x, operands.x], 1))
    assert torch.equal(operands.run(interpreted, x=wide[:, :16]), expected)


@precisions
def test_empty_batch(interpreted, precision):
    operands = Operands(Conv("empty", (0, 16, 6, 5), 24, args={"padding": 1}), precision)
    assert operands.run(interpreted).shape == (0, 24, 6, 5)
    z, mean, var = statistics(interpreted, operands, None)
    assert z.shape == (0, 24, 6, 5)
    assert mean.shape == var.shape == (24,)
    assert not mean.any()
    assert not var.any()
    assert interpreted.launches() == []


@precisions
def test_non_finite_values_pass_through(interpreted, precision):
    operands = Operands(AWKWARD[0], precision)
    operands.x[0, 3, 2, 2] = float("nan")
    operands.residual[0, 5, 5, 4] = float("inf")
    operands.residual[0, 6, 5, 4] = float("nan")
    result, truth = operands.run(interpreted), operands.truth()
    assert torch.equal(result.isnan(), truth.isnan())
    assert torch.equal(result.isinf(), truth.isinf())


@precisions
def test_the_same_bits_in_any_order_of_programs(interpreted, precision):
    operands = Operands(CONVS[4], precision)
    results = []
    for seed in (0, 1, 2):
        interpreted.seed(seed)
        results.append(operands.run(interpreted))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# Configurations: every tile, and each way through the depth, with and without a split


def configured(
    interpreted, operands: Operands, config, affine: tuple = (None, None), prologue: bool = False
) -> Tensor:
    scale, shift = folded(operands)
    with operands.precision.set():
        return interpreted.ops.conv_bn_add_relu_packed(
            operands.x,
            packed(operands.weight),
            scale,
            shift,
            operands.residual,
            operands.weight.shape,
            *geometry(operands.case),
            True,
            residual_scale=affine[0],
            residual_shift=affine[1],
            config=config,
        )


def tables() -> list:
    kinds = {FLOAT16: "half", BFLOAT16: "half", TF32: "tf32", FLOAT32: "ieee"}
    return [
        pytest.param(precision, config, id=f"{precision}-{'x'.join(map(str, config[:3]))}")
        for precision, kind in kinds.items()
        if precision is not FLOAT16  # as bfloat16, whose rounding shows more
        for config in _conv_plan.CONFIGS[kind]
    ]


#: By how the kernel goes through the depth.
MODES = {
    "taps": Conv("taps", (1, 64, 9, 9), 72, args={"padding": 1, "stride": 2}),
    "pointwise": Conv("pointwise", (1, 72, 9, 8), 136, (1, 1)),
    "flat": Conv("flat", (1, 12, 9, 8), 72, args={"padding": 1}),
}


@pytest.mark.parametrize(("precision", "config"), tables())
@pytest.mark.parametrize("mode", MODES)
def test_every_configuration(interpreted, precision, config, mode):
    operands = Operands(MODES[mode], precision)
    for split_k, descriptors in ((1, False), (1, True), (3, False)):
        forced = config._replace(split_k=split_k, descriptors=descriptors)
        result = configured(interpreted, operands, forced)
        precision.check(result, operands.eager(), operands.truth())
        launch, *finish = interpreted.launches()
        wanted = mode if mode != "flat" or config.flat else "taps"
        assert launch.constants["MODE"] == wanted
        assert len(finish) == (split_k > 1)
        assert launch.constants["X_DESCRIPTOR"] is (descriptors and mode == "pointwise")
        assert launch.constants["W_DESCRIPTOR"] is (descriptors and mode != "flat")


@precisions
@pytest.mark.parametrize("case", AWKWARD[:5], ids=str)
def test_split_of_awkward_shapes(interpreted, precision, case):
    """More parts than steps too: the last ones add nothing."""
    operands = Operands(case, precision)
    for split_k in (2, 5):
        config = plan(operands)._replace(split_k=split_k)
        result = configured(interpreted, operands, config)
        precision.check(result, operands.eager(), operands.truth())


def plan(operands: Operands):
    """What the host would choose."""
    from fused_resnet.triton._conv_shape import conv_shape

    shape = conv_shape("", operands.x, operands.weight.shape, *geometry(operands.case))
    with operands.precision.set():
        return _conv_plan.plan(shape, operands.x)


@half_precisions
def test_descriptors_of_awkward_shapes(interpreted, precision):
    """Where rows are no multiple of 16 bytes, or a tile would reach into another tap: pointers."""
    for case in (*AWKWARD, CONVS[2], CONVS[5], PLANNED):
        operands = Operands(case, precision)
        config = plan(operands)._replace(descriptors=True)
        result = configured(interpreted, operands, config)
        precision.check(result, operands.eager(), operands.truth())


def test_the_host_splits_small_maps_only(interpreted):
    deep, wide = check_plan((1, 512, 3, 3), 64), check_plan((8, 512, 56, 56), 512)
    assert deep.split_k > 1
    assert deep.block_m == 64
    assert wide.split_k == 1
    assert wide.block_m == 128


def check_plan(x: tuple, k: int):
    from fused_resnet.triton._conv_shape import conv_shape

    like = torch.empty(x, dtype=torch.float16, device="meta")
    shape = conv_shape("", like, (k, x[1], 3, 3), (1, 1), (1, 1), (1, 1), 1)
    return _conv_plan.plan(shape, like)


# Options


@precisions
@pytest.mark.parametrize("case", [AWKWARD[0], AWKWARD[1]], ids=str)
@pytest.mark.parametrize("split_k", [1, 2])
def test_residual_with_an_affine_step_of_its_own(interpreted, precision, case, split_k):
    operands = Operands(case, precision)
    scale, shift = torch.rand(case.k) + 0.5, torch.randn(case.k)

    def along(t: Tensor) -> Tensor:
        return t.view(-1, 1, 1)

    config = plan(operands)._replace(split_k=split_k)
    result = configured(interpreted, operands, config, (scale, shift))
    added = operands.residual.double() * along(scale.double()) + along(shift.double())
    truth = (operands.truth(residual=False, relu=False) + added).relu()
    dtype = precision.dtype
    eager = operands.eager(residual=False, relu=False)
    eager += operands.residual * along(scale.to(dtype)) + along(shift.to(dtype))
    precision.check(result, eager.relu(), truth)


@precisions
@pytest.mark.parametrize("case", [AWKWARD[0], AWKWARD[1], AWKWARD[4], *MODES.values()], ids=str)
def test_batch_norm_and_relu_of_the_input(interpreted, precision, case):
    """The shift is large, so that a padded zero which went through it would show."""
    operands = Operands(case, precision)
    scale, shift = torch.rand(case.x[1]) + 0.5, torch.randn(case.x[1]) + 1.0
    with precision.set():
        result = interpreted.ops.conv_bn_add_relu(
            operands.x, operands.weight, operands.bias, *operands.bn, operands.residual,
            *geometry(case), 1e-5, True, in_scale=scale, in_shift=shift,
        )  # fmt: skip
    # Rounded once, as if it had been stored.
    before = operands.x.double() * scale.double().view(-1, 1, 1) + shift.double().view(-1, 1, 1)
    operands.x = channels_last(before.relu().to(precision.dtype))
    truth, eager = operands.truth(), operands.eager()
    if precision in (FLOAT16, BFLOAT16):
        # A float32 sum now and then rounds to the other neighbour than float64's.
        assert error(result, truth) <= 1.6 * error(eager, truth)
    elif precision is TF32:
        assert error(result, truth) < 5e-6
    else:
        precision.check(result, eager, truth)


@precisions
@pytest.mark.parametrize("widths", [(24, 40, 16), (8, 5, 7), (64, 72, 64)], ids=str)
def test_a_second_convolution_in_the_same_sum(interpreted, precision, widths):
    c, k, c2 = widths
    dtype = precision.dtype
    x, x2 = (channels_last(normal(*s, dtype=dtype)) for s in ((2, c, 5, 6), (2, c2, 9, 11)))
    w = normal(k, c, 3, 3, dtype=dtype, scale=(9 * c + c2) ** -0.5)
    w2 = normal(k, c2, 1, 1, dtype=dtype, scale=(9 * c + c2) ** -0.5)
    shift = torch.randn(k)

    def plain(convert) -> Tensor:
        z = F.conv2d(convert(x), convert(w), None, 1, 1) + F.conv2d(
            convert(x2), convert(w2), None, 2
        )
        return (z + shift.to(z.dtype).view(-1, 1, 1)).relu()

    joined = torch.cat([t.permute(0, 2, 3, 1).flatten(1) for t in (w, w2)], 1).flatten()
    args = (x, x2, joined, shift, w.shape, (1, 1), (1, 1), (1, 1), (2, 2), True)
    with precision.set():
        result = interpreted.ops.conv_conv_add_relu_packed(*args)
        precision.check(result, plain(lambda t: t), plain(precision.operand))
        kind = _conv_plan.precision_of(x)
        for descriptors, split_k in ((True, 1), (False, 3), (False, 8)):
            config = _conv_plan.CONFIGS[kind][-2]._replace(descriptors=descriptors, split_k=split_k)
            result = interpreted.ops.conv_conv_add_relu_packed(*args, config=config)
            precision.check(result, plain(lambda t: t), plain(precision.operand))


# Statistics


def statistics(interpreted, operands: Operands, bias: Tensor | None, **options):
    with operands.precision.set():
        return interpreted.ops.conv_statistics(
            operands.x, operands.weight, bias, *geometry(operands.case), **options
        )


def assert_statistics(z: Tensor, mean: Tensor, var: Tensor, limit: float = 1e-6) -> None:
    assert error(mean, z.double().mean((0, 2, 3))) < 1e-6
    assert error(var, z.double().var((0, 2, 3), correction=0)) < limit


@precisions
@pytest.mark.parametrize("case", [*AWKWARD[:5], CONVS[3]], ids=str)
def test_statistics_are_those_of_the_rounded_result(interpreted, precision, case):
    operands = Operands(case, precision)
    z, mean, var = statistics(interpreted, operands, operands.bias)
    x, weight = map(precision.operand, (operands.x, operands.weight))
    truth = F.conv2d(x, weight, operands.bias.double(), **case.args)
    eager = F.conv2d(operands.x, operands.weight, operands.bias.to(z.dtype), **case.args)
    precision.check(z, eager, truth)
    assert_statistics(z, mean, var)


@pytest.mark.parametrize("config", _conv_plan.CONFIGS["half"], ids=lambda c: str(c[:3]))
def test_statistics_of_every_tile(interpreted, config):
    operands = Operands(PLANNED, BFLOAT16)
    assert_statistics(*statistics(interpreted, operands, None, config=config))


def test_statistics_survive_a_large_mean(interpreted):
    operands = Operands(CONVS[3], FLOAT32)
    assert_statistics(*statistics(interpreted, operands, torch.full((64,), 1000.0)), limit=1e-5)


# Errors


def test_float64_is_refused(interpreted):
    operands = Operands(AWKWARD[0], Precision("float64", torch.float64))
    message = "conv_bn_add_relu: x: expected dtype float32, bfloat16 or float16"
    with pytest.raises(TypeError, match=message):
        operands.run(interpreted)


def test_wrong_operands_are_named(interpreted):
    operands = Operands(AWKWARD[0], FLOAT16)
    operands.residual = operands.residual[..., :-1]
    message = re.escape("conv_bn_add_relu: residual: expected shape [1, 24, 6, 5], got [1, 24, 6")
    with pytest.raises(ValueError, match=message):
        operands.run(interpreted)
    operands = Operands(AWKWARD[0], FLOAT16)
    operands.weight = operands.weight.float()
    with pytest.raises(TypeError, match=r"conv_bn_add_relu: weight: expected dtype torch\.float16"):
        operands.run(interpreted)
    operands = Operands(AWKWARD[0], FLOAT16)
    with pytest.raises(ValueError, match="residual_scale, residual_shift: expected bo"):
        configured(interpreted, operands, None, (torch.ones(24), None))
    operands.bn = (operands.bn[0][:3], *operands.bn[1:])
    with pytest.raises(ValueError, match="conv_bn_add_relu: bn_weight: expected shape"):
        operands.run(interpreted)


@pytest.mark.parametrize("fmt", FORMATS)
def test_weights_are_packed_filter_by_filter(interpreted, fmt):
    weight = normal(4, 3, 2, 5, dtype=torch.bfloat16).contiguous(memory_format=FORMATS[fmt])
    flat = interpreted.ops.pack_conv_weight(weight, 1)
    assert torch.equal(flat, packed(weight))
    assert flat.data_ptr() != weight.data_ptr()
    assert torch.equal(interpreted.ops.unpack_conv_weight(flat, weight.shape, 1), weight)
    with pytest.raises(ValueError, match="pack_conv_weight: groups: expected a divisor of the 4"):
        interpreted.ops.pack_conv_weight(weight, 3)
    with pytest.raises(ValueError, match=r"unpack_conv_weight: packed: expected shape \[120\]"):
        interpreted.ops.unpack_conv_weight(flat[1:], weight.shape, 1)


def test_a_packed_weight_with_gaps(interpreted):
    operands = Operands(AWKWARD[0], FLOAT16)
    expected = configured(interpreted, operands, None)
    scale, shift = folded(operands)
    spread = torch.stack([packed(operands.weight)] * 2, 1)[:, 0]
    result = interpreted.ops.conv_bn_add_relu_packed(
        operands.x, spread, scale, shift, operands.residual, operands.weight.shape,
        *geometry(operands.case), True,
    )  # fmt: skip
    assert torch.equal(result, expected)
