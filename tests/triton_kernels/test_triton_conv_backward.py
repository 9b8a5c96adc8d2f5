"""conv_backward in Triton: every tile, phase and prologue, against float64."""

from __future__ import annotations

import pytest
import torch
from cases import Conv
from covering import cover
from precisions import BFLOAT16, FLOAT16, FLOAT32, TF32, Precision
from tolerances import error, tf32_bound
from training_cases import TRAINED, Backward, Gradients, affine, backward_of, geometry

from fused_resnet.backends.triton import _gradient_plan

BY_NAME = {str(case): case for case in TRAINED} | {
    # Rows of one phase only, a stride in one direction, and a kernel with fewer taps than phases.
    "one-column": Conv("one-column", (2, 16, 9, 1), 24, (3, 1), {"stride": 2, "padding": (1, 0)}),
    "half-strided": Conv("half-strided", (1, 24, 9, 8), 16, (3, 3), {"stride": (2, 1)}),
    "2x2-stride2": Conv("2x2-stride2", (2, 16, 7, 8), 32, (2, 2), {"stride": 2, "padding": 1}),
    "5x5": Conv("5x5", (1, 16, 9, 7), 16, (5, 5), {"padding": 2}),
}
kinds = pytest.mark.parametrize("kind", ["prologue", "add", "frozen"])
#: What the kernels take, and what is left to PyTorch's convolution.
OURS = ["1x1", "3x3-stride2-odd-wide", "1x1-stride2-odd", "prime-channels", "one-column",
        "half-strided", "2x2-stride2", "5x5"]  # fmt: skip
THEIRS = ["groups", "3x3-dilated", "one-channel"]
HALVES = (FLOAT16, BFLOAT16)


def run(interpreted, o: Backward, args, *flags: bool, **named) -> Gradients:
    scale, shift, mean = o.bn or (None, None, None)
    flags = flags or (True, True, o.bn is not None)
    return Gradients(*interpreted.ops.conv_backward(
        o.g, o.z, o.a, o.b, o.c, o.x, scale, shift, mean, o.w, o.add, *args.values(), *flags,
        False, **named,
    ))  # fmt: skip


def check(precision: Precision, o: Backward, result: Gradients, args) -> None:
    """Both gradients beside PyTorch's error, and the sums of the gradient that was stored."""
    truth, eager = o.to(torch.float64).plain(**args), o.plain(**args)
    check_values(precision, o, result, truth, eager)
    assert result.g_x.is_contiguous(memory_format=torch.channels_last)
    assert result.dw.stride() == o.w.stride()
    if o.bn is None:
        assert result.sum_g.numel() == result.sum_g_xc.numel() == 0
    else:
        check_sums(o, result)


def check_values(
    precision: Precision, o: Backward, result: Gradients, truth: Gradients, eager: Gradients
) -> None:
    """The gradients that were asked for: at least one."""
    assert result.g_x.numel() + result.dw.numel() > 0
    for ours, exact, theirs, scale in (
        (result.g_x, truth.g_x, eager.g_x, 1),
        (result.dw, truth.dw, eager.dw, o.x.shape[2]),
    ):
        if ours.numel() == 0 and exact.numel() > 0:
            continue
        if precision is TF32:
            assert error(ours, exact) < 5e-4  # operands are rounded to 11 bits, once each
        else:
            precision.check(ours / scale, theirs / scale, exact / scale)


def check_sums(o: Backward, result: Gradients) -> None:
    terms = result.g_x.double() * (o.x.double() - o.bn.mean.double()[:, None, None])
    for ours, each in ((result.sum_g, result.g_x.double()), (result.sum_g_xc, terms)):
        size = each.abs().sum((0, 2, 3)).max().clamp(min=1e-30)
        assert ((ours.double() - each.sum((0, 2, 3))).abs().max() / size) < 3e-7


@cover(name=OURS, precision=[BFLOAT16, FLOAT32], kind=["prologue", "add", "frozen"])
def test_both_gradients(interpreted, name, precision, kind):
    case = BY_NAME[name]
    o, args = backward_of(case, precision.dtype, kind), geometry(case)
    with precision.set():
        check(precision, o, run(interpreted, o, args), args)
    names = {launch.kernel for launch in interpreted.launches()}
    assert {"conv_data_gradient_kernel", "conv_weight_gradient_kernel"} <= names


@kinds
@pytest.mark.parametrize("name", [*THEIRS, "3x3-stride2-odd-wide"])
def test_pytorchs_convolution_between_passes(interpreted, name, kind):
    case, forced = BY_NAME[name], name not in THEIRS
    for precision in (FLOAT16, FLOAT32):
        o, args = backward_of(case, precision.dtype, kind), geometry(case)
        check(precision, o, run(interpreted, o, args, pytorch=forced), args)
    assert not any("gradient_kernel" in launch.kernel and "conv" in launch.kernel
                   for launch in interpreted.launches())  # fmt: skip


def tables(configs) -> list:
    kinds = {BFLOAT16: "half", TF32: "tf32", FLOAT32: "ieee"}
    return [
        pytest.param(precision, config, id=f"{precision}-{'x'.join(map(str, config[:3]))}")
        for precision, kind in kinds.items()
        for config in configs[kind]
    ]


def just_over_a_tile(name: str, channels: int, filters: int) -> Conv:
    """A tile of channels and of filters, and a pack more; as many pixels as one to four tiles."""
    c, k = channels + 8, filters + 8
    if name == "pointwise":
        return Conv(name, (1, c, 13, 11), k, (1, 1))
    return Conv(name, (1, c, 13, 11), k, args={"stride": 2, "padding": 1})


shapes = pytest.mark.parametrize("shape", ["taps", "pointwise"])


@pytest.mark.parametrize(("precision", "config"), tables(_gradient_plan.DATA_CONFIGS))
@shapes
def test_every_tile_of_the_data_gradient(interpreted, precision, config, shape):
    case = just_over_a_tile(shape, config.block_n, config.block_k)
    o, args = backward_of(case, precision.dtype, "prologue"), geometry(case)
    truth, eager = o.to(torch.float64).plain(**args), o.plain(**args)
    with precision.set():
        result = run(interpreted, o, args, True, False, True, data_config=config)
    check_values(precision, o, result, truth, eager)
    check_sums(o, result)


@pytest.mark.parametrize(("precision", "config"), tables(_gradient_plan.WEIGHT_CONFIGS))
@shapes
def test_every_tile_of_the_weight_gradient(interpreted, precision, config, shape):
    """In one part, in parts of which the last is short, and in more parts than there are steps."""
    case = just_over_a_tile(shape, config.block_c, config.block_k)
    o, args = backward_of(case, precision.dtype, "prologue"), geometry(case)
    truth, eager = o.to(torch.float64).plain(**args), o.plain(**args)
    for splits in (1, 2, 50):
        forced = config._replace(splits=splits)
        with precision.set():
            result = run(interpreted, o, args, False, True, True, weight_config=forced)
        check_values(precision, o, result, truth, eager)


# The order is that of the programs, whatever they multiply: one precision of each size is enough.
@pytest.mark.parametrize("precision", [BFLOAT16, TF32], ids=str)
def test_bits_do_not_depend_on_the_order_of_programs(interpreted, precision):
    case = BY_NAME["3x3-stride2-odd-wide"]
    o, args = backward_of(case, precision.dtype, "prologue"), geometry(case)
    with precision.set():
        runs = [run(interpreted, o, args) for _ in interpreted.orders()]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_each_gradient_alone_and_any_memory_format(interpreted):
    """Contiguous and sliced operands are copied; the weight's gradient has its strides."""
    case = BY_NAME["3x3-stride2-odd-wide"]
    o, args = backward_of(case, torch.float32, "prologue"), geometry(case)
    both = run(interpreted, o, args)
    wide = torch.cat([o.x, o.x], 3)
    scales = torch.stack([o.bn.scale, o.bn.shift], 1)
    bn = o.bn._replace(scale=scales[:, 0], shift=scales[:, 1])
    other = o._replace(g=o.g.contiguous(), x=wide[..., : case.x[3]], bn=bn, w=o.w.contiguous())
    result = run(interpreted, other, args)
    assert result.dw.stride() == other.w.stride()
    assert all(torch.equal(a, b) for a, b in zip(result, both, strict=True))
    alone = run(interpreted, o, args, True, False, True)
    assert alone.dw.numel() == 0
    assert torch.equal(alone.g_x, both.g_x)
    assert torch.equal(alone.sum_g_xc, both.sum_g_xc)
    alone = run(interpreted, o, args, False, True, True)
    assert alone.g_x.numel() == alone.sum_g.numel() == 0
    assert torch.equal(alone.dw, both.dw)


@pytest.mark.parametrize("name", ["cifar-3x3", "3x3-dilated"])
def test_no_images(interpreted, name):
    case = BY_NAME[name]
    empty = Conv("empty", (0, *case.x[1:]), case.k, case.kernel, case.args)
    for kind in ("prologue", "add", "frozen"):
        o, args = backward_of(empty, torch.float32, kind), geometry(case)
        result = run(interpreted, o, args)
        assert result.g_x.shape == o.x.shape
        assert result.dw.shape == o.w.shape
        assert not any(t.any() for t in result)


def test_nan_is_masked_as_by_pytorchs_relu(interpreted):
    """A mask by NaN lets the gradient pass, and NaN in x reaches the weight's gradient."""
    case = Conv("3x3", (1, 16, 9, 9), 16, args={"padding": 1})
    o, args = backward_of(case, torch.float32, "prologue"), geometry(case)
    x = o.x.clone(memory_format=torch.preserve_format)
    x[0, 3, 4, 4] = float("nan")
    result = run(interpreted, o._replace(x=x), args)
    assert result.dw[:, 3].isnan().any()
    assert not result.dw[:, :3].isnan().any()
    assert result.g_x.isfinite().all()
    assert result.sum_g_xc[3].isnan()
    open_mask = o._replace(bn=o.bn._replace(shift=o.bn.shift + 100))
    assert result.g_x[0, 3, 4, 4] == run(interpreted, open_mask, args).g_x[0, 3, 4, 4]


def test_tf32_is_rounded_to_nearest(interpreted):
    """Of operands that tf32 holds exactly, nothing is lost; the products' bound is derived."""
    case = BY_NAME["3x3-stride2-odd-wide"]
    o, args = backward_of(case, torch.float32, "frozen"), geometry(case)
    o = o._replace(w=TF32.operand(o.w).float())
    with TF32.set():
        result = run(interpreted, o, args)
    truth = o.to(torch.float64).plain(**args)
    assert error(result.g_x, truth.g_x) < tf32_bound(0)
    assert error(result.dw, truth.dw) < tf32_bound(0)


@pytest.mark.parametrize(
    ("change", "error_type", "message"),
    [
        ({"g": torch.zeros(2, 32, 8, 7)}, ValueError, r"g: expected shape \[2, 32, 8, 8\]"),
        ({"g": torch.zeros(2, 32, 8, 8).half()}, TypeError, "g: expected dtype"),
        ({"z": None}, ValueError, "z, b: expected both or neither"),
        ({"c": None}, ValueError, "z, c: expected both or neither"),
        ({"b": torch.zeros(31)}, ValueError, r"b: expected shape \[32\]"),
        ({"add": torch.zeros(2, 16, 8, 8)}, ValueError, "add: expected None with x_scale"),
        ({"bn": None}, ValueError, "x_scale, x_mean: expected tensors with sums=True"),
    ],
)
def test_wrong_arguments(interpreted, change, error_type, message):
    vector = torch.zeros(32)
    operands = Backward(
        torch.zeros(2, 32, 8, 8), torch.zeros(2, 32, 8, 8), vector, vector, vector,
        torch.zeros(2, 16, 8, 8), affine(16, torch.float32), torch.zeros(32, 16, 3, 3), None,
    )  # fmt: skip
    case = Conv("3x3", (2, 16, 8, 8), 32, args={"padding": 1})
    with pytest.raises(error_type, match=f"conv_backward: {message}"):
        run(interpreted, operands._replace(**change), geometry(case), True, True, True)
