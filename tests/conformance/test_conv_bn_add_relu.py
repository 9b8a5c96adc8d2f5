"""conv_bn_add_relu, packed and not, and its statistics, on every backend.

Shapes decide how a kernel goes through memory, and that by the size of an element alone; so every
shape runs with elements of each size, and the awkward ones, where tiles and packs end, with every
precision.
"""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from cases import CONVS, FORMATS, Conv, normal
from conv_operands import Operands, check
from marks import ACTIVATIONS, half_precisions, on_gpu_kernels, rows
from precisions import FLOAT16, FLOAT32, FLOAT64, tensor_core_depth
from shapes import AWKWARD, channels_last, geometry, packed
from tolerances import error

FLAG = (True, False)
awkward = pytest.mark.parametrize("case", AWKWARD, ids=str)


@rows({"case": CONVS})
def test_operation(backend, precision, case):
    check(backend, case, precision)


@pytest.mark.variants
@awkward
def test_awkward_shapes(backend, precision, case):
    check(backend, case, precision)


@rows({"activation": ACTIVATIONS, "residual": FLAG, "bias": FLAG})
def test_flags(backend, precision, activation, residual, bias):
    flags = {"activation": activation, "residual": residual, "bias": bias}
    check(backend, AWKWARD[0], precision, **flags)


@rows({"activation": ACTIVATIONS, "case": [AWKWARD[0], CONVS[0]]})
def test_packed_has_the_activations_of_live(backend, precision, activation, case):
    operands = Operands(case, precision)
    weight = backend.ops.pack_conv_weight(operands.weight, 1)
    result = operands.run_packed(backend, weight, activation)
    operands.check(backend, result, activation=activation)


@half_precisions
def test_contiguous_maps_come_back_contiguous(backend, precision):
    operands = Operands(AWKWARD[0], precision)
    result = operands.run(backend, x=operands.x.contiguous())
    assert result.is_contiguous()
    assert torch.equal(result, operands.run(backend))


def test_a_map_that_begins_off_the_pack(backend, precision):
    """Such a view may not be read 16 bytes at a time."""
    operands = Operands(AWKWARD[0], precision)
    n, c, h, w = operands.x.shape
    storage = torch.empty(operands.x.numel() + 1, dtype=operands.x.dtype)
    view = storage[1:].view(n, h, w, c).permute(0, 3, 1, 2)
    view.copy_(operands.x)
    assert view.data_ptr() % 16 != 0
    result = operands.run(backend, x=view)
    operands.check(backend, result)
    assert torch.equal(result, operands.run(backend))


def test_sliced_channels(backend, precision):
    operands = Operands(AWKWARD[0], precision)
    wide = channels_last(torch.cat([operands.x, operands.x], 1))
    assert torch.equal(operands.run(backend, x=wide[:, :16]), operands.run(backend))


def test_empty_batch(backend, precision):
    case = Conv("empty", (0, 16, 6, 5), 24, args={"padding": 1})
    assert Operands(case, precision).run(backend).shape == (0, 24, 6, 5)
    assert backend.launches() == []


def test_non_finite_values_pass_through(backend, precision):
    operands = Operands(AWKWARD[0], precision)
    operands.x[0, 3, 2, 2] = float("nan")
    operands.residual[0, 5, 5, 4] = float("inf")
    operands.residual[0, 6, 5, 4] = float("nan")
    operands.residual[0, 7, 5, 4] = float("-inf")  # of which ReLU makes zero
    result, truth = operands.run(backend), operands.truth()
    assert torch.equal(result.isnan(), truth.isnan())
    assert torch.equal(result.isinf(), truth.isinf())


def test_the_same_bits_in_any_order(backend, precision):
    """Of threads or programs, whichever a backend has."""
    operands = Operands(CONVS[4], precision)
    results = [operands.run(backend) for _ in backend.orders()]
    assert len(results) > 1
    assert all(torch.equal(results[0], other) for other in results[1:])


# Packed weights


@rows({"case": AWKWARD})
def test_packed(backend, precision, case):
    operands = Operands(case, precision)
    weight = backend.ops.pack_conv_weight(operands.weight, case.args.get("groups", 1))
    result = operands.run_packed(backend, weight)
    operands.check(backend, result)


@rows({"fmt": list(FORMATS)}, groups=[1, 2])
def test_packing_is_lossless(backend, precision, fmt, groups):
    """Odd in every size, so that nothing fills a vector."""
    weight = normal(6, 3, 2, 5, dtype=precision.dtype).contiguous(memory_format=FORMATS[fmt])
    before = weight.clone()
    flat = backend.ops.pack_conv_weight(weight, groups)
    assert flat.data_ptr() != weight.data_ptr()
    unpacked = backend.ops.unpack_conv_weight(flat, weight.shape, groups)
    assert torch.equal(unpacked.to(weight.dtype), weight)
    assert torch.equal(weight, before)


@on_gpu_kernels
@pytest.mark.parametrize("fmt", FORMATS)
def test_weights_are_packed_filter_by_filter(backend, fmt):
    """One layout for CUDA's and Triton's kernels, which take each other's weights."""
    weight = normal(4, 3, 2, 5, dtype=torch.bfloat16).contiguous(memory_format=FORMATS[fmt])
    assert torch.equal(backend.ops.pack_conv_weight(weight, 1), packed(weight))


# Statistics of the convolution's result, which GPU kernels sum on the way


def run_statistics(backend, operands: Operands, bias: torch.Tensor | None):
    with operands.precision.set():
        return backend.ops.conv_statistics(
            operands.x, operands.weight, bias, *geometry(operands.case)
        )


def assert_statistics(z, mean, var, limit: float = 1e-6) -> None:
    assert error(mean, z.double().mean((0, 2, 3))) < 1e-6
    assert error(var, z.double().var((0, 2, 3), correction=0)) < limit


@pytest.mark.variants
@on_gpu_kernels
@pytest.mark.parametrize("case", AWKWARD[:5], ids=str)
def test_statistics_are_those_of_the_rounded_result(backend, precision, case):
    operands = Operands(case, precision)
    z, mean, var = run_statistics(backend, operands, operands.bias)
    x, weight = map(precision.operand, (operands.x, operands.weight))
    truth = F.conv2d(x, weight, operands.bias.double(), **case.args)
    eager = F.conv2d(operands.x, operands.weight, operands.bias.to(z.dtype), **case.args)
    precision.check(z, eager, truth, tensor_core_depth(backend, operands.weight))
    assert_statistics(z, mean, var)


@on_gpu_kernels
@rows({"case": [CONVS[3], CONVS[18]]})
def test_statistics_over_many_slabs(backend, precision, case):
    operands = Operands(case, precision)
    assert_statistics(*run_statistics(backend, operands, None))


@on_gpu_kernels
def test_statistics_of_slabs_that_are_merged_twice(backend):
    """More slabs than one block merges by itself, and the last one has fewer rows."""
    case = Conv("slabs", (4, 8, 73, 69), 16, (1, 1))
    z, mean, var = run_statistics(backend, Operands(case, FLOAT16), None)
    assert_statistics(z, mean, var)
    if backend.name in ("simulator", "device"):
        launched = [name for name in backend.kernels() if "conv_statistics_kernel" in name]
        assert len(launched) == 2


@on_gpu_kernels
def test_statistics_survive_a_large_mean(backend):
    operands = Operands(CONVS[3], FLOAT32)
    assert_statistics(*run_statistics(backend, operands, torch.full((64,), 1000.0)), limit=1e-5)


@on_gpu_kernels
def test_statistics_of_an_empty_batch(backend, precision):
    case = Conv("empty", (0, 16, 6, 5), 24, args={"padding": 1})
    z, mean, var = run_statistics(backend, Operands(case, precision), None)
    assert z.shape == (0, 24, 6, 5)
    assert mean.shape == var.shape == (24,)


# Errors


@on_gpu_kernels
def test_float64_is_refused(backend):
    message = "conv_bn_add_relu: x: expected dtype float32, bfloat16 or float16"
    with pytest.raises(TypeError, match=message):
        Operands(AWKWARD[0], FLOAT64).run(backend)


def test_wrong_operands_are_named(backend):
    operands = Operands(AWKWARD[0], FLOAT16)
    operands.residual = operands.residual[..., :-1]
    message = re.escape("conv_bn_add_relu: residual: expected shape [1, 24, 6, 5], got [1, 24, 6")
    with pytest.raises(ValueError, match=message):
        operands.run(backend)
    operands = Operands(AWKWARD[0], FLOAT16)
    operands.weight = operands.weight.float()
    message = r"conv_bn_add_relu: weight: expected dtype (Half|torch\.float16), got"
    with pytest.raises(TypeError, match=message):
        operands.run(backend)
    operands = Operands(AWKWARD[0], FLOAT16)
    operands.bn = (operands.bn[0][:3], *operands.bn[1:])
    with pytest.raises(ValueError, match="conv_bn_add_relu: bn_weight: expected shape"):
        operands.run(backend)


def test_wrong_packed_weights_are_named(backend):
    weight = torch.randn(4, 3, 2, 5)
    with pytest.raises(ValueError, match="pack_conv_weight: groups: expected a divisor of"):
        backend.ops.pack_conv_weight(weight, 3)
    flat = backend.ops.pack_conv_weight(weight, 1)
    message = r"unpack_conv_weight: packed: expected (shape|the elements of a weight) \["
    with pytest.raises(ValueError, match=message):
        backend.ops.unpack_conv_weight(flat[1:], weight.shape, 1)
