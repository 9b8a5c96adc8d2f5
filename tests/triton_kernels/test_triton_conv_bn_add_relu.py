"""What only Triton's convolution has: every configuration, splits, descriptors, fused inputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import CONVS, Conv, normal
from conv_operands import Operands, with_affine_residual
from precisions import BFLOAT16, FLOAT16, FLOAT32, TF32, half_precisions, precisions
from shapes import AWKWARD, PLANNED, channels_last, geometry, packed
from tolerances import error
from torch import Tensor

from fused_resnet.backends.triton import _conv_plan

# Configurations: every tile, and each way through the depth, with and without a split


def configured(interpreted, operands: Operands, config, affine: tuple = (None, None)) -> Tensor:
    with operands.precision.set():
        return interpreted.ops.conv_bn_add_relu_packed(
            operands.x,
            packed(operands.weight),
            *operands.folded(),
            operands.residual,
            operands.weight.shape,
            *geometry(operands.case),
            True,
            residual_scale=affine[0],
            residual_shift=affine[1],
            config=config,
        )


def name(config) -> str:
    return "x".join(map(str, (*config[:3], config.stages)))


def tables() -> list:
    kinds = {FLOAT16: "half", BFLOAT16: "half", TF32: "tf32", FLOAT32: "ieee"}
    return [
        pytest.param(precision, config, id=f"{precision}-{name(config)}")
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


def plan_of(shape, x: torch.Tensor):
    """What the host would choose for a convolution of ``x``."""
    from fused_resnet.backends.triton._device import device_of

    return _conv_plan.choose(shape, _conv_plan.precision_of(x), device_of(x))


def plan(operands: Operands):
    """What the host would choose."""
    from fused_resnet.backends.triton._conv_shape import conv_shape

    shape = conv_shape("", operands.x, operands.weight.shape, *geometry(operands.case))
    with operands.precision.set():
        return plan_of(shape, operands.x)


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
    from fused_resnet.backends.triton._conv_shape import conv_shape

    like = torch.empty(x, dtype=torch.float16, device="meta")
    shape = conv_shape("", like, (k, x[1], 3, 3), (1, 1), (1, 1), (1, 1), 1)
    return plan_of(shape, like)


# Options


@precisions
@pytest.mark.parametrize("case", [AWKWARD[0], AWKWARD[1]], ids=str)
@pytest.mark.parametrize("split_k", [1, 2])
def test_residual_with_an_affine_step_of_its_own(interpreted, precision, case, split_k):
    operands = Operands(case, precision)
    affine = torch.rand(case.k) + 0.5, torch.randn(case.k)
    config = plan(operands)._replace(split_k=split_k)
    result = configured(interpreted, operands, config, affine)
    precision.check(result, *with_affine_residual(operands, *affine))


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

    concatenated = torch.cat([t.permute(0, 2, 3, 1).flatten(1) for t in (w, w2)], 1).flatten()
    args = (x, x2, concatenated, shift, w.shape, (1, 1), (1, 1), (1, 1), (2, 2), True)
    with precision.set():
        result = interpreted.ops.conv_conv_add_relu_packed(*args)
        precision.check(result, plain(lambda t: t), plain(precision.operand))
        kind = _conv_plan.precision_of(x)
        for descriptors, split_k in ((True, 1), (False, 3), (False, 8)):
            config = _conv_plan.CONFIGS[kind][-2]._replace(descriptors=descriptors, split_k=split_k)
            result = interpreted.ops.conv_conv_add_relu_packed(*args, config=config)
            precision.check(result, plain(lambda t: t), plain(precision.operand))


@pytest.mark.parametrize("config", _conv_plan.CONFIGS["half"], ids=name)
def test_statistics_of_every_tile(interpreted, config):
    operands = Operands(PLANNED, BFLOAT16)
    z, mean, var = interpreted.ops.conv_statistics(
        operands.x, operands.weight, None, *geometry(operands.case), config=config
    )
    assert error(mean, z.double().mean((0, 2, 3))) < 1e-6
    assert error(var, z.double().var((0, 2, 3), correction=0)) < 1e-6


def test_half_an_affine_step_is_refused(interpreted):
    operands = Operands(AWKWARD[0], FLOAT16)
    with pytest.raises(ValueError, match="residual_scale, residual_shift: expected bo"):
        configured(interpreted, operands, None, (torch.ones(24), None))


def test_a_packed_weight_with_gaps(interpreted):
    operands = Operands(AWKWARD[0], FLOAT16)
    spread = torch.stack([packed(operands.weight)] * 2, 1)[:, 0]
    expected = operands.run_packed(interpreted, packed(operands.weight))
    assert torch.equal(operands.run_packed(interpreted, spread), expected)
