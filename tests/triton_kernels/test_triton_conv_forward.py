"""conv_forward in Triton, and with all that the batch norm behind it needs, against float64."""

from __future__ import annotations

import pytest
import torch
from cases import Conv, batch_norm, normal
from precisions import BFLOAT16, FLOAT16, FLOAT32, TF32, Precision, precisions
from shapes import AWKWARD
from tolerances import error
from torch import Tensor
from training_cases import TRAINED, affine, coarse, convolve, geometry, weight_of

from fused_resnet.backends import reference_training as reference

BY_NAME = {str(case): case for case in TRAINED}
#: A precision for each shape, and both halves and both kinds of float32 for what kernels mask.
CASES = [
    ("1x1-stride2", FLOAT16),
    ("3x3-stride2-odd", BFLOAT16),
    ("7x7-stem", BFLOAT16),
    ("one-channel", FLOAT32),
    ("prime-channels", BFLOAT16),
    ("prime-channels", TF32),
    ("groups", FLOAT16),
    ("3x3-dilated", FLOAT32),
    ("one-pixel", BFLOAT16),
    ("3x3", BFLOAT16),
]
cases = pytest.mark.parametrize(
    ("case", "precision"), [pytest.param(BY_NAME[n], p, id=f"{n}-{p}") for n, p in CASES]
)
LAST = torch.channels_last
#: Whole packs of channels and none, groups; and tap by tap, pixel by pixel, and as one axis.
PROLOGUES = [
    AWKWARD[0],
    AWKWARD[1],
    AWKWARD[4],
    Conv("taps", (1, 64, 9, 9), 72, args={"padding": 1, "stride": 2}),
    Conv("pointwise", (1, 72, 9, 8), 136, (1, 1)),
    Conv("flat", (1, 12, 9, 8), 72, args={"padding": 1}),
]


def assert_statistics(z: Tensor, mean: Tensor, var: Tensor) -> None:
    """Of what is stored, and exactly."""
    assert mean.dtype == var.dtype == torch.float32
    exact_var, exact_mean = torch.var_mean(z.double(), (0, 2, 3), correction=0)
    deviation = exact_var.sqrt()
    assert ((mean.double() - exact_mean).abs() <= 1e-6 * (deviation + exact_mean.abs())).all()
    assert ((var.double() - exact_var).abs() <= 2e-6 * exact_var).all()


def check(precision: Precision, z: Tensor, x: Tensor, w: Tensor, bn, args) -> None:
    bn64 = bn and bn.double()
    p = x if bn is None else (x.double() * bn64.scale[:, None, None] + bn64.shift[:, None, None])
    # The prologue is exact, so rounding to what products are made of is all that it loses.
    p = p if bn is None else p.relu().to(x.dtype)
    truth = convolve(precision.operand(p), precision.operand(w), None, **args)
    precision.check(z, convolve(x, w, bn, **args), truth)


@cases
@pytest.mark.parametrize("prologue", [True, False])
@pytest.mark.parametrize("pytorch", [False, True])
def test_forward(interpreted, case, precision, prologue, pytorch):
    if pytorch and precision is TF32:
        pytest.skip("PyTorch's own convolution has no tf32 on a CPU")
    dtype, args = precision.dtype, geometry(case)
    x, w = coarse(*case.x, dtype=dtype).contiguous(memory_format=LAST), weight_of(case, dtype)
    bn = affine(case.x[1], dtype) if prologue else None
    scale, shift, _ = bn or (None, None, None)
    operands = (x, scale, shift, w, *args.values())
    with precision.set():
        z, mean, var = interpreted.ops.conv_forward(*operands, True, False, pytorch=pytorch)
        alone = interpreted.ops.conv_forward(*operands, False, False, pytorch=pytorch)
    check(precision, z, x, w, bn, args)
    assert z.is_contiguous(memory_format=LAST)
    assert_statistics(z, mean, var)
    check(precision, alone[0], x, w, bn, args)
    assert alone[1].numel() == alone[2].numel() == 0


@precisions
@pytest.mark.parametrize("case", PROLOGUES, ids=str)
def test_the_prologue_in_every_precision(interpreted, case, precision):
    """However the depth is traversed; zeros of the padding must not go through the prologue."""
    dtype, args = precision.dtype, geometry(case)
    x, w = coarse(*case.x, dtype=dtype).contiguous(memory_format=LAST), weight_of(case, dtype)
    bn = affine(case.x[1], dtype)
    with precision.set():
        z, *_ = interpreted.ops.conv_forward(x, *bn[:2], w, *args.values(), False, False)
    check(precision, z, x, w, bn, args)


def test_statistics_of_a_large_mean(interpreted):
    """A mean of a thousand deviations, in many tiles: two launches merge them."""
    x = torch.randn(6, 16, 53, 53).contiguous(memory_format=LAST) + 1000
    w = torch.eye(16)[:, :, None, None].contiguous()
    with FLOAT32.set():
        z, mean, var = interpreted.ops.conv_forward(
            x, None, None, w, [1, 1], [0, 0], [1, 1], 1, True, False
        )
    exact_var, exact_mean = torch.var_mean(z.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-5, atol=0)
    merged = [launch for launch in interpreted.launches() if "statistics" in launch.kernel]
    assert len(merged) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pytorch", [False, True])
@pytest.mark.parametrize("held", ["dense", "gaps", "none"])
def test_the_batch_norm_behind(interpreted, dtype, pytorch, held):
    """Scale, shift, running statistics and the count, by the kernel that has the statistics."""
    case = BY_NAME["3x3-stride2-odd"]
    args = geometry(case)
    x, w = coarse(*case.x, dtype=dtype), weight_of(case, dtype)
    scale, shift, _ = affine(case.x[1], dtype)
    weight, bias, *running = (t.to(dtype) for t in batch_norm(case.k, dtype))
    batches = torch.tensor(7)
    if held == "gaps":
        running = [torch.stack([t, t], 1)[:, 0] for t in running]
    given = [None, None] if held == "none" else running
    before = [t.double() for t in running]
    versions = [t._version for t in running]
    momentum, eps = 0.25, 2.0**-10  # exact in float32
    with FLOAT32.set():
        z, mean, var, found_scale, found_shift = interpreted.ops.conv_bn_forward(
            x, scale, shift, w, weight, bias, *given, batches, *args.values(), momentum, eps,
            False, pytorch=pytorch,
        )  # fmt: skip
        expected = interpreted.ops.conv_forward(
            x, scale, shift, w, *args.values(), True, False, pytorch=pytorch
        )
    assert all(torch.equal(a, b) for a, b in zip((z, mean, var), expected, strict=True))
    exact_var, exact_mean = torch.var_mean(z.double(), (0, 2, 3), correction=0)
    exact = reference.bn_coefficients(exact_mean, exact_var, weight.double(), bias.double(), eps)
    for ours, truth in zip((found_scale, found_shift), exact, strict=True):
        assert ours.dtype is torch.float32
        torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=1e-6)
    if held != "none":
        count = z.numel() // case.k
        reference.bn_update_running(exact_mean, exact_var, *before, momentum, count)
    for ours, truth in zip(running, before, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert [t._version for t in running] == versions
    assert batches == 8
    kernels = [launch.kernel for launch in interpreted.launches()]
    if not pytorch and held != "gaps":
        assert kernels[:2] == ["conv_bn_add_relu_kernel", "conv_statistics_kernel"]
        assert kernels.count("bn_coefficients_kernel") == 0


def test_many_tiles_count_one_batch(interpreted):
    """Two launches merge the statistics, and many programs the channels: the count is one more."""
    x = normal(5, 16, 53, 53, dtype=torch.bfloat16).contiguous(memory_format=LAST)
    w = normal(80, 16, 1, 1, dtype=torch.bfloat16)
    held = torch.zeros(80), torch.zeros(80), torch.tensor(0)
    z = interpreted.ops.conv_bn_forward(
        x, None, None, w, None, None, *held, [1, 1], [0, 0], [1, 1], 1, 1.0, 1e-5, False
    )[0]
    exact_var, exact_mean = torch.var_mean(z.double(), (0, 2, 3))
    assert error(held[0], exact_mean) < 1e-6
    assert error(held[1], exact_var) < 1e-6
    assert held[2] == 1


def test_no_images_and_one_value(interpreted):
    w, v = torch.zeros(16, 16, 1, 1), torch.zeros(16)
    pairs = ([1, 1], [0, 0], [1, 1], 1)
    z, mean, var = interpreted.ops.conv_forward(
        torch.zeros(0, 16, 4, 4), v, v, w, *pairs, True, False
    )
    assert z.shape == (0, 16, 4, 4)
    assert not mean.any()
    assert not var.any()
    with pytest.raises(ValueError, match="conv_bn_forward: x: expected more than 1 value"):
        interpreted.ops.conv_bn_forward(
            torch.zeros(1, 16, 1, 1), None, None, w, None, None, None, None, None, *pairs, 0.1,
            1e-5, False,
        )  # fmt: skip


def test_what_is_not_finite_passes(interpreted):
    case = BY_NAME["cifar-3x3"]
    x, w = coarse(1, 16, 9, 9, dtype=torch.float32), weight_of(case, torch.float32)
    bn, args = affine(16, torch.float32), geometry(case)
    x[0, 3, 4, 4] = float("nan")
    z, mean, var = interpreted.ops.conv_forward(x, *bn[:2], w, *args.values(), True, False)
    assert torch.equal(z.isnan(), convolve(x, w, bn, **args).isnan())
    assert mean.isnan().all()
    assert var.isnan().all()


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
def test_wrong_arguments(interpreted, change, error_type, message):
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
        interpreted.ops.conv_forward(*(args | change).values(), True, True)
