"""conv_forward in CUDA C++: a prologue as a pass, and statistics in the epilogue."""

from __future__ import annotations

import pytest
import torch
from precisions import BFLOAT16, FLOAT16, FLOAT32, TF32, Precision
from torch import Tensor
from training_cases import TRAINED, affine, coarse, convolve, geometry, weight_of

from fused_resnet.backends import reference_training as reference
from fused_resnet.backends.activation import Activation

BY_NAME = {str(case): case for case in TRAINED}
#: A precision for each shape, and both halves and both kinds of float32 for what kernels mask.
CASES = [
    ("1x1-stride2", FLOAT16),
    ("3x3-stride2-odd", BFLOAT16),
    ("7x7-stem", BFLOAT16),
    ("one-channel", FLOAT32),
    ("prime-channels", FLOAT16),
    ("prime-channels", TF32),
    ("groups", FLOAT16),
    ("3x3-dilated", FLOAT32),
    ("one-pixel", BFLOAT16),
]
cases = pytest.mark.parametrize(
    ("case", "precision"), [pytest.param(BY_NAME[n], p, id=f"{n}-{p}") for n, p in CASES]
)
LAST = torch.channels_last


def check(precision: Precision, z: Tensor, x: Tensor, w: Tensor, bn, args) -> None:
    p = x
    if bn is not None:  # exact, so rounding to what products are made of is all that it loses
        bn64 = bn.double()
        p = (x.double() * bn64.scale[:, None, None] + bn64.shift[:, None, None]).relu().to(x.dtype)
    truth = convolve(precision.operand(p), precision.operand(w), None, **args)
    precision.check(z, convolve(x, w, bn, **args), truth)


@pytest.mark.variants
@cases
@pytest.mark.parametrize("prologue", [True, False])
def test_forward(simt, case, precision, prologue):
    dtype, args = precision.dtype, geometry(case)
    x, w = coarse(*case.x, dtype=dtype).contiguous(memory_format=LAST), weight_of(case, dtype)
    bn = affine(case.x[1], dtype) if prologue else None
    scale, shift, _ = bn or (None, None, None)
    operands = (x, scale, shift, w, *args.values())
    with precision.set():
        z, mean, var = simt.ops.conv_forward(*operands, True, False)
        alone = simt.ops.conv_forward(*operands, False, False)
    kernels = [launch.kernel for launch in simt.launches()]
    assert sum("block_end_kernel" in name for name in kernels) == 2 * prologue
    for found in (z, alone[0]):
        check(precision, found, x, w, bn, args)
        assert found.is_contiguous(memory_format=LAST)
    assert alone[1].numel() == alone[2].numel() == 0
    # Of what is stored, and exactly.
    exact_var, exact_mean = torch.var_mean(z.double(), (0, 2, 3), correction=0)
    size = exact_var.sqrt() + exact_mean.abs()
    assert mean.dtype == var.dtype == torch.float32
    assert ((mean.double() - exact_mean).abs() <= 1e-6 * size).all()
    assert ((var.double() - exact_var).abs() <= 2e-6 * exact_var).all()


@pytest.mark.parametrize("activation", Activation, ids=lambda a: a.name.lower())
def test_the_activation_of_the_prologue(simt, activation):
    """Zeros of the padding do not go through it: a shift would make them something."""
    case = BY_NAME["3x3-dilated"]
    args = geometry(case)
    x, w = coarse(*case.x, dtype=torch.float32), weight_of(case, torch.float32)
    bn = affine(case.x[1], torch.float32)
    with FLOAT32.set():
        z, *_ = simt.ops.conv_forward(x, *bn[:2], w, *args.values(), False, False, activation)
    wide = (x.double(), *bn.double()[:2], w.double())
    truth = reference.conv_forward(*wide, *args.values(), False, False, activation)[0]
    torch.testing.assert_close(z.double(), truth, rtol=1e-5, atol=1e-5)


def test_no_images(simt):
    w, v = torch.zeros(16, 16, 1, 1), torch.zeros(16)
    z, mean, var = simt.ops.conv_forward(
        torch.zeros(0, 16, 4, 4), v, v, w, [1, 1], [0, 0], [1, 1], 1, True, False
    )
    assert z.shape == (0, 16, 4, 4)
    assert not mean.any()
    assert not var.any()


@pytest.mark.parametrize(
    ("change", "error_type", "message"),
    [
        ({"x": torch.zeros(2, 16, 8)}, ValueError, "x: expected 4 dimensions"),
        ({"x": torch.zeros(2, 16, 8, 8).double()}, TypeError, "x: expected dtype"),
        ({"x_scale": None}, ValueError, "x_scale, x_shift: expected both or neither"),
        ({"x_scale": torch.zeros(15)}, ValueError, r"x_scale: expected shape \[16\]"),
        ({"x_shift": torch.zeros(16).half()}, TypeError, "x_shift: expected dtype float32"),
        ({"weight": torch.zeros(32, 8, 3, 3)}, ValueError, "x: expected 8 channels"),
        ({"weight": torch.zeros(32, 16, 3, 3).half()}, TypeError, "weight: expected dtype"),
        ({"groups": 5}, ValueError, "groups: expected a divisor"),
    ],
)
def test_wrong_arguments(simt, change, error_type, message):
    args = {
        "x": torch.zeros(2, 16, 8, 8),
        "x_scale": torch.zeros(16),
        "x_shift": torch.zeros(16),
        "weight": torch.zeros(32, 16, 3, 3),
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "groups": 1,
    }
    with pytest.raises(error_type, match=f"conv_forward: .*{message}"):
        simt.ops.conv_forward(*(args | change).values(), True, True)
