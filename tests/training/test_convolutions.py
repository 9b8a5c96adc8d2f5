"""conv_forward and conv_backward against PyTorch in float64, by kernels and by its convolution."""

from __future__ import annotations

import pytest
import torch
from cases import Conv
from covering import cover
from tolerances import DTYPES, assert_as_exact_as_pytorch, error
from training_cases import (
    LARGE_GRADIENTS,
    LARGE_MAPS,
    LARGE_RESULT,
    TRAINED,
    Backward,
    affine,
    backward_of,
    coarse,
    convolve,
    geometry,
    vectors_of,
    weight_of,
)

import fused_resnet  # noqa: F401  the operators

OPS = torch.ops.fused_resnet
BY_NAME = {str(case): case for case in TRAINED}
#: A 1x1, a 3x3 of stride 2 and one of stride 1, each of several blocks, a 1x1 that multiplies pairs
#: in bfloat16 where the processor does, and one for PyTorch.
FEW = [
    BY_NAME[n]
    for n in ("cifar-1x1", "3x3-stride2-many", "cifar-3x3", "1x1-pairs", "prime-channels")
]
few = pytest.mark.parametrize("case", FEW, ids=str)

#: Winograd's bound in float32, relative root mean square: the forward, both gradients.
WINOGRAD = 5e-6


def assert_sums(result, terms, exact) -> None:
    """Sums are as near as float32 addition in blocks brings them, measured by their terms' size."""
    size = terms.double().abs().sum((0, 2, 3)).max().clamp(min=1e-30)
    assert ((result.double() - exact).abs().max() / size).item() < 3e-7


# The case and the storage type choose the kernel and its tiles; what it reads its input through and
# what it adds to its result are the same lines in each.
@cover({"dtype": DTYPES, "case": TRAINED}, prologue=[True, False])
def test_forward(dtype, case, prologue):
    # As PyTorch's own run has it: for other layouts it may take another algorithm.
    x = coarse(*case.x, dtype=dtype).contiguous(memory_format=torch.channels_last)
    w = weight_of(case, dtype)
    bn = affine(case.x[1], dtype) if prologue else None
    scale, shift, _ = bn or (None, None, None)
    args = geometry(case)
    z, mean, var = OPS.conv_forward(x, scale, shift, w, *args.values(), True, False)
    truth = convolve(x.double(), w.double(), bn and bn.double(), **args)
    assert_as_exact_as_pytorch(z, convolve(x, w, bn, **args), truth)
    assert z.is_contiguous(memory_format=torch.channels_last)
    # Of what is stored, and exactly.
    assert mean.dtype == var.dtype == vectors_of(dtype)
    exact_var, exact_mean = torch.var_mean(z.double(), (0, 2, 3), correction=0)
    deviation = exact_var.sqrt()
    assert ((mean.double() - exact_mean).abs() <= 1e-6 * (deviation + exact_mean.abs())).all()
    assert ((var.double() - exact_var).abs() <= 2e-6 * exact_var).all()


@cover({"dtype": DTYPES, "case": TRAINED}, kind=["prologue", "add", "frozen"])
def test_backward(dtype, case, kind):
    operands, args = backward_of(case, dtype, kind), geometry(case)
    result, eager = operands.run(**args), operands.plain(**args)
    truth = operands.to(torch.float64).plain(**args)
    assert_as_exact_as_pytorch(result.g_x, eager.g_x, truth.g_x)
    assert_as_exact_as_pytorch(result.dw / case.x[2], eager.dw / case.x[2], truth.dw / case.x[2])
    assert result.g_x.is_contiguous(memory_format=torch.channels_last)
    assert result.dw.stride() == operands.w.stride()
    if kind != "prologue":
        assert result.sum_g.numel() == result.sum_g_xc.numel() == 0
        return
    terms = result.g_x.double() * (operands.x.double() - operands.bn.mean.double()[:, None, None])
    assert_sums(result.sum_g, result.g_x, result.g_x.double().sum((0, 2, 3)))
    assert_sums(result.sum_g_xc, terms, terms.sum((0, 2, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", [c for c in TRAINED if c.kernel == (3, 3)], ids=str)
def test_with_winograd(dtype, case):
    operands, args = backward_of(case, dtype, "prologue"), geometry(case)
    truth = operands.to(torch.float64).plain(**args)
    result, eager = operands.run(winograd=True, **args), operands.plain(**args)
    z, mean, var = OPS.conv_forward(
        operands.x, *operands.bn[:2], operands.w, *args.values(), True, True
    )
    exact = convolve(operands.x.double(), operands.w.double(), operands.bn.double(), **args)
    plain = convolve(operands.x, operands.w, operands.bn, **args)
    for ours, theirs, wanted in [
        (z, plain, exact),
        (result.g_x, eager.g_x, truth.g_x),
        (result.dw, eager.dw, truth.dw),
    ]:
        assert error(ours, wanted) <= max(WINOGRAD, 1.5 * error(theirs, wanted))
    exact_var, exact_mean = torch.var_mean(z.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var.double(), exact_var, rtol=5e-6, atol=1e-12)
    terms = result.g_x.double() * (operands.x.double() - operands.bn.mean.double()[:, None, None])
    assert_sums(result.sum_g, result.g_x, result.g_x.double().sum((0, 2, 3)))
    assert_sums(result.sum_g_xc, terms, terms.sum((0, 2, 3)))


def test_a_large_result():
    test_forward(torch.float32, LARGE_RESULT, prologue=True)


@pytest.mark.parametrize("kind", ["prologue", "add", "frozen"])
@pytest.mark.parametrize("case", LARGE_GRADIENTS, ids=str)
def test_large_gradients(case, kind):
    test_backward(torch.float32, case, kind)


def test_large_maps_with_winograd():
    test_with_winograd(case=LARGE_MAPS, dtype=torch.float32)


@few
@pytest.mark.parametrize("winograd", [False, True])
def test_each_gradient_alone(case, winograd):
    """One gradient does not depend on whether the other is made too."""
    operands, args = backward_of(case, torch.float32, "prologue"), geometry(case)
    both = operands.run(winograd, **args)
    alone = operands.run(winograd, (True, False), **args)
    assert alone.dw.numel() == 0
    torch.testing.assert_close(alone.g_x, both.g_x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alone.sum_g_xc, both.sum_g_xc, rtol=1e-4, atol=1e-3)
    alone = operands.run(winograd, (False, True), **args)
    assert alone.g_x.numel() == alone.sum_g.numel() == 0
    torch.testing.assert_close(alone.dw, both.dw, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", FEW[:4], ids=str)
def test_bits_do_not_depend_on_threads(case, dtype):
    """Where a kernel runs; PyTorch's convolutions promise no such thing."""
    operands, args = backward_of(case, dtype, "prologue"), geometry(case)
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        forward = OPS.conv_forward(
            operands.x, *operands.bn[:2], operands.w, *args.values(), True, True
        )
        runs.append((*forward, *operands.run(winograd=True, **args)))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@few
def test_any_memory_format(case):
    """Contiguous and sliced operands are copied; the weight's gradient has its strides."""
    operands, args = backward_of(case, torch.float32, "prologue"), geometry(case)
    expected = operands.run(**args)
    wide = torch.cat([operands.x, operands.x], 3)
    scales = torch.stack([operands.bn.scale, operands.bn.shift], 1)
    bn = operands.bn._replace(scale=scales[:, 0], shift=scales[:, 1])
    other = operands._replace(
        g=operands.g.contiguous(), x=wide[..., : case.x[3]], bn=bn, w=operands.w.contiguous()
    )
    result = other.run(**args)
    assert result.dw.stride() == other.w.stride()
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@few
def test_no_images(case):
    empty = Conv("empty", (0, *case.x[1:]), case.k, case.kernel, case.args)
    for kind in ("prologue", "add", "frozen"):
        operands, args = backward_of(empty, torch.float32, kind), geometry(case)
        z, mean, var = OPS.conv_forward(
            operands.x, None, None, operands.w, *args.values(), True, True
        )
        assert z.shape == operands.g.shape
        assert not mean.any()
        assert not var.any()
        result = operands.run(winograd=True, **args)
        assert result.g_x.shape == operands.x.shape
        assert result.dw.shape == operands.w.shape
        assert not any(t.any() for t in result)


@few
def test_what_is_not_finite_passes(case):
    """NaN and infinity reach what depends on them, through ReLU too, and its mask lets NaN pass."""
    operands, args = backward_of(case, torch.float32, "prologue"), geometry(case)
    x = operands.x.clone(memory_format=torch.preserve_format)
    x[0, 3, 4, 4] = float("nan")
    z, mean, var = OPS.conv_forward(x, *operands.bn[:2], operands.w, *args.values(), True, False)
    expected = convolve(x, operands.w, operands.bn, **args)
    assert torch.equal(z.isnan(), expected.isnan())
    assert mean.isnan().all()
    assert var.isnan().all()
    result = operands._replace(x=x).run(**args)
    assert result.dw[:, 3].isnan().any()
    assert not result.dw[:, :3].isnan().any()
    assert result.g_x.isfinite().all()  # masked by NaN, not made of it
    assert result.sum_g_xc[3].isnan()
    untouched = operands.run(**args).g_x[0, 3, 4, 4]
    open_mask = operands._replace(bn=operands.bn._replace(shift=operands.bn.shift + 100))
    assert result.g_x[0, 3, 4, 4] == open_mask.run(**args).g_x[0, 3, 4, 4] or untouched.isnan()


def test_statistics_of_a_large_mean():
    """A mean of a thousand deviations: sums of squares alone would have lost the variance."""
    x = torch.randn(4, 32, 20, 20).contiguous(memory_format=torch.channels_last)
    w = torch.eye(32)[:, :, None, None].contiguous()
    x = x + 1000
    z, mean, var = OPS.conv_forward(x, None, None, w, [1, 1], [0, 0], [1, 1], 1, True, False)
    exact_var, exact_mean = torch.var_mean(z.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-5, atol=0)


@few
def test_nothing_is_recorded_or_cast(case):
    """Autograd and autocast have had their turn when an operator runs."""
    operands, args = backward_of(case, torch.float32, "prologue"), geometry(case)
    x, w = operands.x.requires_grad_(), operands.w.requires_grad_()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        z, _, _ = OPS.conv_forward(x, *operands.bn[:2], w, *args.values(), True, False)
        result = operands.run(**args)
    assert z.dtype == result.g_x.dtype == result.dw.dtype == torch.float32
    assert not z.requires_grad


FORWARD = {"x": (2, 16, 8, 8), "w": (32, 16, 3, 3)}


@pytest.mark.parametrize(
    ("change", "error_type", "message"),
    [
        ({"x": torch.zeros(2, 16, 8)}, ValueError, "x: expected 4 dimensions"),
        ({"x": torch.zeros(2, 16, 8, 8, dtype=torch.int32)}, TypeError, "x: expected dtype"),
        ({"x_scale": None}, ValueError, "x_scale, x_shift: expected both or neither"),
        ({"x_scale": torch.zeros(15)}, ValueError, r"x_scale: expected shape \[16\]"),
        ({"x_shift": torch.zeros(16).half()}, TypeError, "x_shift: expected dtype Float"),
        ({"weight": torch.zeros(32, 8, 3, 3)}, ValueError, "x: expected 8 channels"),
        ({"weight": torch.zeros(32, 16, 3, 3).double()}, TypeError, "weight: expected dtype"),
        ({"padding": [-1, 1]}, ValueError, "padding: expected two ints from 0"),
        ({"padding": [1 << 40, 1]}, ValueError, "padding: expected sizes below"),
        ({"dilation": [1 << 31, 1]}, ValueError, "dilation: expected sizes below"),
        ({"stride": [0, 1]}, ValueError, "stride: expected two ints from 1"),
        ({"padding": [1 << 30, 1 << 30]}, ValueError, "at most 2.56 elements"),
        ({"groups": 5}, ValueError, "groups: expected a divisor"),
    ],
)
def test_wrong_arguments_of_the_forward(change, error_type, message):
    args = {
        "x": torch.zeros(FORWARD["x"]),
        "x_scale": torch.zeros(16),
        "x_shift": torch.zeros(16),
        "weight": torch.zeros(FORWARD["w"]),
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "groups": 1,
    }
    with pytest.raises(error_type, match=f"conv_forward: .*{message}"):
        OPS.conv_forward(*(args | change).values(), True, True)


@pytest.mark.parametrize(
    ("change", "error_type", "message"),
    [
        ({"g": torch.zeros(2, 32, 8, 7)}, ValueError, r"g: expected shape \[2, 32, 8, 8\]"),
        ({"g": torch.zeros(2, 32, 8, 8).double()}, TypeError, "g: expected dtype"),
        ({"z": None}, ValueError, "z, b: expected both or neither"),
        ({"c": None}, ValueError, "z, c: expected both or neither"),
        ({"b": torch.zeros(31)}, ValueError, r"b: expected shape \[32\]"),
        ({"add": torch.zeros(2, 16, 8, 8)}, ValueError, "add: expected None with x_scale"),
    ],
)
def test_wrong_arguments_of_the_backward(change, error_type, message):
    vector = torch.zeros(32)
    operands = Backward(
        torch.zeros(2, 32, 8, 8), torch.zeros(2, 32, 8, 8), vector, vector, vector,
        torch.zeros(FORWARD["x"]), affine(16, torch.float32), torch.zeros(FORWARD["w"]), None,
    )  # fmt: skip
    case = Conv("3x3", FORWARD["x"], 32, args={"padding": 1})
    with pytest.raises(error_type, match=f"conv_backward: {message}"):
        operands._replace(**change).run(**geometry(case))


def test_sums_need_a_prologue():
    case = Conv("3x3", FORWARD["x"], 32, args={"padding": 1})
    o = backward_of(case, torch.float32, "add")
    with pytest.raises(ValueError, match="x_scale, x_mean: expected tensors with sums=True"):
        OPS.conv_backward(
            o.g, o.z, o.a, o.b, o.c, o.x, None, None, None, o.w, None, *geometry(case).values(),
            True, True, True, False,
        )  # fmt: skip


def test_a_freed_storage_is_an_error():
    """As sharded training leaves it: sizes and strides of memory that is not there."""
    x = torch.zeros(FORWARD["x"]).contiguous(memory_format=torch.channels_last)
    x.untyped_storage().resize_(0)
    with pytest.raises(
        ValueError, match="conv_forward: x: expected a storage of at least 8192 bytes"
    ):
        OPS.conv_forward(
            x, None, None, torch.zeros(FORWARD["w"]), [1, 1], [1, 1], [1, 1], 1, True, False
        )
