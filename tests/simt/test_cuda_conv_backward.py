"""conv_backward in CUDA C++: our data gradient of stride 1, and PyTorch's between our passes."""

from __future__ import annotations

import pytest
import torch
from cases import Conv
from covering import cover
from precisions import BFLOAT16, FLOAT16, FLOAT32, TF32, Precision
from tolerances import error
from training_cases import TRAINED, Backward, Gradients, affine, backward_of, geometry

from fused_resnet.backends import reference_training as reference
from fused_resnet.backends.activation import Activation

BY_NAME = {str(case): case for case in TRAINED} | {
    "half-strided": Conv("half-strided", (1, 24, 9, 8), 16, (3, 3), {"stride": (2, 1)}),
    "2x2": Conv("2x2", (2, 16, 7, 8), 32, (2, 2), {"padding": (0, 1)}),
    "5x5": Conv("5x5", (1, 16, 9, 7), 16, (5, 5), {"padding": 2}),
    "oblong-dilated": Conv(
        "oblong-dilated", (1, 8, 12, 9), 16, (3, 2), {"dilation": (1, 3), "padding": (2, 1)}
    ),
    # The window of the first pixel lies outside of dz for some taps, or for all.
    "padded-wide": Conv("padded-wide", (1, 16, 5, 4), 8, (3, 3), {"padding": 4}),
}
#: Of stride 1, with our data gradient; and others, with PyTorch's.
OURS = ["1x1", "1x1-padded", "3x3-valid", "prime-channels", "groups", "3x3-dilated", "2x2", "5x5",
        "oblong-dilated", "padded-wide", "one-channel", "depthwise", "one-pixel"]  # fmt: skip
THEIRS = ["3x3-stride2-odd", "1x1-stride2-odd", "half-strided"]
KINDS = ["prologue", "add", "frozen"]
LAST = torch.channels_last


def run(simt, o: Backward, args, *flags: bool, activation: int = 1) -> Gradients:
    scale, shift, mean = o.bn or (None, None, None)
    flags = flags or (True, True, o.bn is not None)
    return Gradients(*simt.ops.conv_backward(
        o.g, o.z, o.a, o.b, o.c, o.x, scale, shift, mean, o.w, o.add, *args.values(), *flags,
        False, activation,
    ))  # fmt: skip


def check(precision: Precision, o: Backward, result: Gradients, args) -> None:
    """Both gradients beside PyTorch's error, and the sums of the gradient that was stored."""
    truth, eager = o.to(torch.float64).plain(**args), o.plain(**args)
    for ours, exact, theirs, scale in (
        (result.g_x, truth.g_x, eager.g_x, 1),
        (result.dw, truth.dw, eager.dw, max(o.x.shape[2], 1)),
    ):
        if precision is TF32:
            assert error(ours, exact) < 5e-4  # operands are rounded to 11 bits, once each
        else:
            precision.check(ours / scale, theirs / scale, exact / scale)
    assert result.g_x.is_contiguous(memory_format=LAST)
    assert result.dw.stride() == o.w.stride()
    if o.bn is None:
        assert result.sum_g.numel() == result.sum_g_xc.numel() == 0
        return
    terms = result.g_x.double() * (o.x.double() - o.bn.mean.double()[:, None, None])
    for ours, each in ((result.sum_g, result.g_x.double()), (result.sum_g_xc, terms)):
        size = each.abs().sum((0, 2, 3)).max().clamp(min=1e-30)
        assert ((ours.double() - each.sum((0, 2, 3))).abs().max() / size) < 3e-7


@pytest.mark.variants
@cover(name=OURS, precision=[BFLOAT16, FLOAT16, TF32, FLOAT32], kind=KINDS)
def test_stride_1(simt, name, precision, kind):
    case = BY_NAME[name]
    o, args = backward_of(case, precision.dtype, kind), geometry(case)
    with precision.set():
        check(precision, o, run(simt, o, args), args)
    kernels = [launch.kernel for launch in simt.launches()]
    assert any("conv_bn_add_relu_kernel" in kernel for kernel in kernels)


@cover(name=THEIRS, precision=[BFLOAT16, FLOAT32], kind=KINDS)
def test_strides_by_pytorch(simt, name, precision, kind):
    case = BY_NAME[name]
    o, args = backward_of(case, precision.dtype, kind), geometry(case)
    with precision.set():
        check(precision, o, run(simt, o, args), args)
    kernels = [launch.kernel for launch in simt.launches()]
    assert not any("conv_bn_add_relu_kernel" in kernel for kernel in kernels)


@pytest.mark.parametrize("activation", Activation, ids=lambda a: a.name.lower())
@pytest.mark.parametrize("name", ["2x2", "half-strided"])
def test_activations_and_what_is_wanted(simt, name, activation):
    """Each gradient alone has the bits of both together, without and with its sums."""
    case = BY_NAME[name]
    o, args = backward_of(case, torch.float32, "prologue"), geometry(case)
    with FLOAT32.set():
        both = run(simt, o, args, activation=activation)
        simt.launches()
        data = run(simt, o, args, True, False, False, activation=activation)
        weight = run(simt, o, args, False, True, False, activation=activation)
        neither = run(simt, o, args, False, False, False, activation=activation)
    wide = o.to(torch.float64)
    truth = reference.conv_backward(
        *wide[:6], *wide.bn, wide.w, None, *args.values(), True, True, True, False, activation
    )
    for ours, exact in zip(both, truth, strict=True):
        assert error(ours, exact) < 1e-6
    assert torch.equal(data.g_x, both.g_x)
    assert torch.equal(weight.dw, both.dw)
    assert data.dw.numel() == weight.g_x.numel() == 0
    assert [t.numel() for t in (*data[2:], *weight[2:], *neither)] == [0] * 8
    assert len({t.untyped_storage()._cdata for t in neither}) == 4


def test_any_memory_format(simt):
    """Contiguous and sliced operands are copied and not written to."""
    case = BY_NAME["2x2"]
    o, args = backward_of(case, torch.float32, "prologue"), geometry(case)
    both = run(simt, o, args)
    wide = torch.cat([o.x, o.x], 3)
    scales = torch.stack([o.bn.scale, o.bn.shift], 1)
    bn = o.bn._replace(scale=scales[:, 0], shift=scales[:, 1])
    other = o._replace(g=o.g.contiguous(), x=wide[..., : case.x[3]], bn=bn, w=o.w.contiguous())
    before = [t.clone() for t in (other.g, other.x, other.w)]
    result = run(simt, other, args)
    assert result.dw.stride() == other.w.stride()
    for ours, theirs in zip(result, both, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(result.g_x, both.g_x)
    for now, then in zip((other.g, other.x, other.w), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("name", ["cifar-3x3", "1x1-stride2-odd"])
def test_no_images(simt, name):
    case = BY_NAME[name]
    empty = Conv("empty", (0, *case.x[1:]), case.k, case.kernel, case.args)
    for kind in KINDS:
        o, args = backward_of(empty, torch.float32, kind), geometry(case)
        result = run(simt, o, args)
        assert result.g_x.shape == o.x.shape
        assert result.dw.shape == o.w.shape
        assert not any(t.any() for t in result)


def test_nan_is_masked_as_by_pytorchs_relu(simt):
    """A mask by NaN lets the gradient pass, and NaN in x reaches the weight's gradient."""
    case = Conv("3x3", (1, 16, 9, 9), 16, args={"padding": 1})
    o, args = backward_of(case, torch.float32, "prologue"), geometry(case)
    x = o.x.clone(memory_format=torch.preserve_format)
    x[0, 3, 4, 4] = float("nan")
    result = run(simt, o._replace(x=x), args)
    assert result.dw[:, 3].isnan().any()
    assert result.g_x.isfinite().all()
    assert result.sum_g_xc[3].isnan()
    open_mask = o._replace(bn=o.bn._replace(shift=o.bn.shift + 100))
    assert result.g_x[0, 3, 4, 4] == run(simt, open_mask, args).g_x[0, 3, 4, 4]


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
        ({"w": torch.zeros(32, 16, 3, 3).half()}, TypeError, "weight: expected dtype"),
    ],
)
def test_wrong_arguments(simt, change, error_type, message):
    vector = torch.zeros(32)
    operands = Backward(
        torch.zeros(2, 32, 8, 8), torch.zeros(2, 32, 8, 8), vector, vector, vector,
        torch.zeros(2, 16, 8, 8), affine(16, torch.float32), torch.zeros(32, 16, 3, 3), None,
    )  # fmt: skip
    case = Conv("3x3", (2, 16, 8, 8), 32, args={"padding": 1})
    with pytest.raises(error_type, match=f"conv_backward: {message}"):
        run(simt, operands._replace(**change), geometry(case), True, True, True)


def test_a_result_that_is_too_large_for_the_indices(simt):
    """Said before anything is allocated: padding counts as it does in the forward."""
    x, w = torch.zeros(1, 8, 1, 1), torch.zeros(8, 8, 1, 1)
    vector, pad = torch.zeros(8), 2**30
    g = torch.zeros(1, 1, 1, 1).expand(1, 8, 2 * pad + 1, 1)
    with pytest.raises(ValueError, match="conv_backward: "):
        simt.ops.conv_backward(
            g, None, vector, None, None, x, None, None, None, w, None, [1, 1], [pad, 0], [1, 1], 1,
            True, False, False, False,
        )  # fmt: skip
