"""Gradients on a GPU against float64 on the CPU, beside PyTorch's own on the same GPU."""

from __future__ import annotations

import pytest
import torch
from cases import CONVS, FORMATS, MAPS, Conv, normal
from on_gpu import bn_operands, called, conv_operands, exact, there, unfused
from precisions import Precision, precisions
from tolerances import RATIO, assert_as_exact_as_pytorch, error

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
formats = pytest.mark.parametrize("fmt", FORMATS)
maps = pytest.mark.parametrize("shape", MAPS.values(), ids=MAPS)
WANTED = ("x", "conv_weight", "conv_bias", "bn_weight", "bn_bias", "residual")


def gradients(function, operation, operands, gradient, **options):
    """Of every operand that has one; the operands stay as they were."""
    mine = {name: t.detach().clone() for name, t in operands.items()}
    leaves = {name: t.requires_grad_() for name, t in mine.items() if name in WANTED}
    y = function(operation, mine, **options)
    found = torch.autograd.grad(y, list(leaves.values()), gradient.to(y.device, y.dtype))
    return dict(zip(leaves, found, strict=True))


def clear_of_zero(operation, operands, **options):
    """Moves the residual so that no result is near zero, or rounding decides what is masked."""
    y = unfused(operation, exact(operands), relu=False, **options)
    residual = operands["residual"]
    moved = (residual.double() + 0.2 * y.sign()).to(residual.dtype)
    return {**operands, "residual": moved.contiguous(memory_format=torch.channels_last)}


def check(operation, operands, precision, **options):
    operands = clear_of_zero(operation, operands, **options)
    shape = operands["residual"].shape
    gradient = normal(*shape, dtype=precision.dtype)
    truth = gradients(unfused, operation, exact(operands), gradient, **options)
    with precision.set():
        eager = gradients(unfused, operation, there(operands), gradient, **options)
        result = gradients(called, operation, there(operands), gradient, **options)
    for name, wide in truth.items():
        ours, theirs = result[name].cpu(), eager[name].cpu()
        assert ours.dtype is operands[name].dtype
        if "conv_weight" not in operands:
            assert_as_exact_as_pytorch(ours, theirs, wide)
            continue
        # As fused-resnet verify judges. The gradients' convolutions are cuDNN's, which takes tf32
        # where it sees fit: its own error is no measure for that.
        floor = 2e-3 if precision.tf32 else 2 * torch.finfo(precision.dtype).eps
        bound = max(RATIO * error(theirs, wide), floor)
        assert error(ours, wide) <= bound, f"{name}: {error(ours, wide):.1e}, bound {bound:.1e}"


@dtypes
@formats
@maps
@pytest.mark.parametrize("training", [True, False])
def test_bn_add_relu(dtype, fmt, shape, training):
    operands = bn_operands(shape, dtype, fmt, residual=True)
    check("bn_add_relu", operands, Precision("", dtype), training=training)


@precisions
@pytest.mark.parametrize("case", [c for c in CONVS if "many" not in c.why], ids=str)
def test_conv_with_a_frozen_batch_norm(precision, case):
    operands = conv_operands(case, precision.dtype, "channels_last", residual=True)
    check("conv_bn_add_relu", operands, precision, **case.args)


@precisions
@pytest.mark.parametrize("case", [CONVS[3], CONVS[4], CONVS[11]], ids=str)
def test_conv_in_training(precision, case):
    operands = conv_operands(case, precision.dtype, "channels_last", residual=True)
    check("conv_bn_add_relu", operands, precision, training=True, **case.args)


@pytest.mark.parametrize("training", [True, False])
def test_stem(training):
    """Tie-free in float32: what the max-pool picks is the same in every precision."""
    case = Conv("stem", (2, 3, 32, 32), 64, (7, 7), {"stride": 2, "padding": 3})
    operands = conv_operands(case, torch.float32, "channels_last", residual=False)
    options = {"training": training, **case.args}
    shape = unfused("conv_bn_relu_maxpool", operands, **options).shape
    gradient = normal(*shape, dtype=torch.float32)
    operation = "conv_bn_relu_maxpool"
    truth = gradients(unfused, operation, exact(operands), gradient, **options)
    result = gradients(called, operation, there(operands), gradient, **options)
    for name, wide in truth.items():
        torch.testing.assert_close(result[name].cpu().double(), wide, rtol=2e-3, atol=2e-3)


def test_gradients_of_gradients():
    """A gradient penalty: the second derivative is the reference's, on the device."""
    operands = bn_operands((2, 6, 5, 5), torch.float32, "channels_last", residual=False)
    operands["bn_bias"] = operands["bn_bias"] + 5.0  # clear of zero

    def penalty(function, given):
        given = {name: t.detach().clone() for name, t in given.items()}
        x = given["x"].requires_grad_()
        y = function("bn_add_relu", given, training=True)
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0].cpu()

    truth = penalty(unfused, exact(operands))
    ours, theirs = penalty(called, there(operands)), penalty(unfused, there(operands))
    assert error(ours, truth) <= max(RATIO * error(theirs, truth), 1e-5)


def test_opcheck():
    """Schema, fake, autograd registration and AOT dispatch, on the device's own kernels."""
    compiled, check_operator = torch.ops.fused_resnet, torch.library.opcheck
    operands = there(conv_operands(CONVS[3], torch.float32, "channels_last", residual=True))
    x, w, r = (operands[name] for name in ("x", "conv_weight", "residual"))
    bn = [operands[n] for n in ("bn_weight", "bn_bias", "running_mean", "running_var")]
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    leaves = [t.requires_grad_() for t in (x, w, *bn[:2], r)]
    x, w, weight, bias, r = leaves
    check_operator(compiled.bn_add_relu.default, (x, weight, bias, *bn[2:], r, True, 1e-5, True))
    check_operator(
        compiled.conv_bn_add_relu.default,
        (x, w, None, weight, bias, *bn[2:], r, *geometry, 1e-5, True),
    )
    x, w, r = (t.detach() for t in (x, w, r))
    packed = compiled.pack_conv_weight(w, 1)
    check_operator(compiled.pack_conv_weight.default, (w, 1))
    check_operator(compiled.conv_statistics.default, (x, w, None, *geometry))
    check_operator(
        compiled.conv_bn_add_relu_packed.default,
        (x, packed, *bn[2:], r, list(w.shape), *geometry, True),
    )
    check_operator(
        compiled.conv_bn_relu_maxpool_packed.default,
        (x, packed, *bn[2:], list(w.shape), *geometry, [3, 3], [2, 2], [1, 1]),
    )
