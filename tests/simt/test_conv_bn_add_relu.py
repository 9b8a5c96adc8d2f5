"""The convolution's CUDA kernels, their launchers and their host functions, executed on the CPU."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from cases import CONVS, FORMATS, Conv, batch_norm, conv_weight, doubled, normal
from precisions import PRECISIONS, Precision, half_precisions, precisions
from tolerances import error
from torch import Tensor

from fused_resnet import reference

EPS = 1e-5

#: Small, and each for a reason: what every build and schedule runs.
AWKWARD = [
    Conv("packs", (1, 16, 6, 5), 24, args={"padding": 1}),
    Conv("no-packs", (1, 3, 6, 5), 5, args={"padding": 1}),
    Conv("packs-in-only", (1, 8, 4, 4), 7, (1, 1)),
    Conv("packs-out-only", (1, 5, 4, 4), 8, (1, 1)),
    Conv("groups-of-packs", (1, 32, 4, 5), 32, args={"padding": 1, "groups": 2}),
    Conv("groups-of-four", (1, 8, 4, 5), 8, args={"padding": 1, "groups": 2}),
    Conv("taps-in-one-step", (2, 8, 5, 5), 8, args={"padding": 2, "dilation": 2, "stride": 2}),
]
awkward = pytest.mark.parametrize("case", AWKWARD, ids=str)


def geometry(case: Conv) -> tuple:
    args = case.args
    pairs = [args.get("stride", 1), args.get("padding", 0), args.get("dilation", 1)]
    return *((v, v) if isinstance(v, int) else v for v in pairs), args.get("groups", 1)


def out_shape(case: Conv) -> torch.Size:
    x, w = (
        torch.empty(case.x, device="meta"),
        torch.empty(case.k, case.x[1] // case.args.get("groups", 1), *case.kernel, device="meta"),
    )
    return F.conv2d(x, w, **case.args).shape


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def packed(weight: Tensor) -> Tensor:
    """[k][kh][kw][c], said without the code under test."""
    return weight.permute(0, 2, 3, 1).reshape(-1)


class Operands:
    """Of one case: random, and the same numbers for every backend."""

    def __init__(self, case: Conv, precision: Precision) -> None:
        dtype = precision.dtype
        self.case, self.precision = case, precision
        self.x = channels_last(normal(*case.x, dtype=dtype))
        self.weight = channels_last(conv_weight(case, dtype))
        self.bn = batch_norm(case.k, dtype)
        self.bias = torch.randn(case.k)
        self.residual = channels_last(normal(*out_shape(case), dtype=dtype))

    def truth(self, residual: bool = True, relu: bool = True, bias: bool = True) -> Tensor:
        weight, x = map(self.precision.operand, (self.weight, self.x))
        return reference.conv_bn_add_relu(
            x,
            weight,
            *doubled(self.bn),
            self.residual.double() if residual else None,
            conv_bias=self.bias.double() if bias else None,
            relu=relu,
            eps=EPS,
            **self.case.args,
        )

    def eager(self, residual: bool = True, relu: bool = True, bias: bool = True) -> Tensor:
        return reference.conv_bn_add_relu(
            self.x,
            self.weight,
            *self.bn,
            self.residual if residual else None,
            conv_bias=self.bias.to(self.x.dtype) if bias else None,
            relu=relu,
            eps=EPS,
            **self.case.args,
        )

    def run(
        self, simt, residual: bool = True, relu: bool = True, bias: bool = True, x=None
    ) -> Tensor:
        with self.precision.set():
            return simt.ops.conv_bn_add_relu(
                self.x if x is None else x,
                self.weight,
                self.bias if bias else None,
                *self.bn,
                self.residual if residual else None,
                *geometry(self.case),
                EPS,
                relu,
            )


def check(simt, case: Conv, precision: Precision, **flags) -> None:
    operands = Operands(case, precision)
    result = operands.run(simt, **flags)
    precision.check(result, operands.eager(**flags), operands.truth(**flags))
    assert result.is_contiguous(memory_format=torch.channels_last)


@precisions
@pytest.mark.parametrize("case", CONVS, ids=str)
def test_operation(simt, case, precision):
    check(simt, case, precision)


@pytest.mark.variants
@precisions
@awkward
def test_awkward_shapes(simt, case, precision):
    check(simt, case, precision)


@precisions
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_flags(simt, precision, relu, residual, bias):
    check(simt, AWKWARD[0], precision, relu=relu, residual=residual, bias=bias)


@half_precisions
def test_contiguous_maps_come_back_contiguous(simt, precision):
    operands = Operands(AWKWARD[0], precision)
    result = operands.run(simt, x=operands.x.contiguous())
    assert result.is_contiguous()
    assert torch.equal(result, operands.run(simt))


@precisions
def test_a_map_that_begins_off_the_pack(simt, precision):
    """Such a view may not be read 16 bytes at a time."""
    operands = Operands(AWKWARD[0], precision)
    n, c, h, w = operands.x.shape
    storage = torch.empty(operands.x.numel() + 1, dtype=operands.x.dtype)
    view = storage[1:].view(n, h, w, c).permute(0, 3, 1, 2)
    view.copy_(operands.x)
    assert view.data_ptr() % 16 != 0
    precision.check(operands.run(simt, x=view), operands.eager(), operands.truth())


@precisions
def test_sliced_channels(simt, precision):
    operands = Operands(AWKWARD[0], precision)
    wide = channels_last(torch.cat([operands.x, operands.x], 1))
    assert torch.equal(operands.run(simt, x=wide[:, :16]), operands.run(simt))


@precisions
def test_empty_batch(simt, precision):
    case = Conv("empty", (0, 16, 6, 5), 24, args={"padding": 1})
    assert Operands(case, precision).run(simt).shape == (0, 24, 6, 5)


@precisions
def test_non_finite_values_pass_through(simt, precision):
    operands = Operands(AWKWARD[0], precision)
    operands.x[0, 3, 2, 2] = float("nan")
    operands.residual[0, 5, 5, 4] = float("inf")
    operands.residual[0, 6, 5, 4] = float("nan")
    result, truth = operands.run(simt), operands.truth()
    assert torch.equal(result.isnan(), truth.isnan())
    assert torch.equal(result.isinf(), truth.isinf())


@precisions
def test_the_same_bits_in_every_schedule(simt, precision):
    operands = Operands(CONVS[4], precision)
    first = operands.run(simt)
    for seed in (1, 2, 3):
        simt.seed(seed)
        assert torch.equal(operands.run(simt), first)


# Plans: every tile, with and without a split


PLANNED = Conv("planned", (1, 72, 11, 13), 136, args={"padding": 1})


def run_planned(simt, operands: Operands, tile: int, split_k: int, affine=(None, None)) -> Tensor:
    scale, shift = folded(operands)
    with operands.precision.set():
        return simt.ops.conv_bn_add_relu_planned(
            operands.x,
            packed(operands.weight),
            scale,
            shift,
            operands.residual,
            *affine,
            operands.weight.shape,
            *geometry(operands.case),
            True,
            tile,
            split_k,
        )


def folded(operands: Operands) -> tuple[Tensor, Tensor]:
    weight, bias, mean, var = doubled(operands.bn)
    scale = weight / (var + EPS).sqrt()
    return scale.float(), (bias + (operands.bias.double() - mean) * scale).float()


@precisions
@pytest.mark.parametrize("tile", [0, 1, 2])
@pytest.mark.parametrize("split_k", [1, 3])
def test_every_plan(simt, precision, tile, split_k):
    operands = Operands(PLANNED, precision)
    result = run_planned(simt, operands, tile, split_k)
    precision.check(result, operands.eager(), operands.truth())
    kernels = [launch.kernel for launch in simt.launches()]
    rows = {0: "Tile<128, 128", 1: "Tile<128, 64", 2: "Tile<64, 64"}[tile]
    assert rows in kernels[0]
    assert len(kernels) == (1 if split_k == 1 else 2)


@pytest.mark.variants
@precisions
@pytest.mark.parametrize("case", AWKWARD[:4], ids=str)
def test_split_of_awkward_shapes(simt, precision, case):
    """More parts than steps too: the last ones add nothing."""
    operands = Operands(case, precision)
    result = run_planned(simt, operands, 2, 5)
    precision.check(result, operands.eager(), operands.truth())


@pytest.mark.variants
@pytest.mark.parametrize("tile", [0, 1])
@pytest.mark.parametrize("precision", [PRECISIONS[1], PRECISIONS[3]], ids=str)
def test_large_tiles_in_every_build(simt, precision, tile):
    operands = Operands(Conv("pipeline", (1, 40, 5, 5), 72, args={"padding": 1}), precision)
    result = run_planned(simt, operands, tile, 1)
    precision.check(result, operands.eager(), operands.truth())


@pytest.mark.parametrize("precision", [PRECISIONS[1], PRECISIONS[3]], ids=str)
def test_the_host_plans_small_tiles_and_splits_for_small_maps(simt, precision):
    deep = Operands(Conv("deep", (1, 512, 3, 3), 64, args={"padding": 1}), precision)
    precision.check(deep.run(simt), deep.eager(), deep.truth())
    conv, finish = simt.launches()
    assert "Tile<64, 64" in conv.kernel
    assert conv.grid[1] > 1
    assert "conv_split_finish_kernel" in finish.kernel
    wide = Operands(Conv("wide", (1, 64, 64, 64), 128, (1, 1)), precision)
    precision.check(wide.run(simt), wide.eager(), wide.truth())
    (conv,) = simt.launches()
    assert "Tile<128, 128" in conv.kernel


@precisions
@pytest.mark.parametrize("case", [AWKWARD[0], AWKWARD[1]], ids=str)
def test_residual_with_an_affine_step_of_its_own(simt, precision, case):
    """Two convolutions that meet, each behind a batch norm."""
    operands = Operands(case, precision)
    scale, shift = torch.rand(case.k) + 0.5, torch.randn(case.k)

    def along(t: Tensor) -> Tensor:
        return t.view(-1, 1, 1)

    result = run_planned(simt, operands, 2, 1, (scale, shift))
    added = operands.residual.double() * along(scale.double()) + along(shift.double())
    truth = (operands.truth(residual=False, relu=False) + added).relu()
    dtype = precision.dtype
    eager = operands.eager(residual=False, relu=False)
    eager += operands.residual * along(scale.to(dtype)) + along(shift.to(dtype))
    precision.check(result, eager.relu(), truth)


# Statistics


def run_statistics(simt, operands: Operands, bias: Tensor | None):
    with operands.precision.set():
        return simt.ops.conv_statistics(operands.x, operands.weight, bias, *geometry(operands.case))


@pytest.mark.variants
@precisions
@pytest.mark.parametrize("case", AWKWARD[:4], ids=str)
def test_statistics_are_those_of_the_rounded_result(simt, precision, case):
    operands = Operands(case, precision)
    z, mean, var = run_statistics(simt, operands, operands.bias)
    x, weight = map(precision.operand, (operands.x, operands.weight))
    truth = F.conv2d(x, weight, operands.bias.double(), **case.args)
    eager = F.conv2d(operands.x, operands.weight, operands.bias.to(z.dtype), **case.args)
    precision.check(z, eager, truth)
    assert error(mean, z.double().mean((0, 2, 3))) < 1e-6
    assert error(var, z.double().var((0, 2, 3), correction=0)) < 1e-6


@precisions
@pytest.mark.parametrize("case", [CONVS[3], CONVS[18]], ids=str)
def test_statistics_over_many_slabs(simt, precision, case):
    operands = Operands(case, precision)
    z, mean, var = run_statistics(simt, operands, None)
    assert error(mean, z.double().mean((0, 2, 3))) < 1e-6
    assert error(var, z.double().var((0, 2, 3), correction=0)) < 1e-6


def test_statistics_survive_a_large_mean(simt):
    operands = Operands(CONVS[3], PRECISIONS[3])
    z, mean, var = run_statistics(simt, operands, torch.full((64,), 1000.0))
    assert error(mean, z.double().mean((0, 2, 3))) < 1e-6
    assert error(var, z.double().var((0, 2, 3), correction=0)) < 1e-5


# Errors


def test_float64_is_refused(simt):
    operands = Operands(AWKWARD[0], Precision("float64", torch.float64))
    message = "conv_bn_add_relu: x: expected dtype float32, bfloat16 or float16"
    with pytest.raises(TypeError, match=message):
        operands.run(simt)


def test_wrong_operands_are_named(simt):
    operands = Operands(AWKWARD[0], PRECISIONS[0])
    operands.residual = operands.residual[..., :-1]
    message = re.escape("conv_bn_add_relu: residual: expected shape [1, 24, 6, 5], got [1, 24, 6")
    with pytest.raises(ValueError, match=message):
        operands.run(simt)
    operands = Operands(AWKWARD[0], PRECISIONS[0])
    operands.weight = operands.weight.float()
    with pytest.raises(TypeError, match="conv_bn_add_relu: weight: expected dtype Half, got Float"):
        operands.run(simt)
    operands = Operands(AWKWARD[0], PRECISIONS[0])
    with pytest.raises(ValueError, match="conv_bn_add_relu_planned: tile: expected -1 to 2, got 3"):
        run_planned(simt, operands, 3, 1)


@pytest.mark.parametrize("fmt", FORMATS)
def test_weights_are_packed_filter_by_filter(simt, fmt):
    weight = normal(4, 3, 2, 5, dtype=torch.bfloat16).contiguous(memory_format=FORMATS[fmt])
    flat = simt.ops.pack_conv_weight(weight, 1)
    assert torch.equal(flat, packed(weight))
    assert torch.equal(simt.ops.unpack_conv_weight(flat, weight.shape, 1), weight)
