"""Gradients: double-precision gradcheck, opcheck, and fused against autograd's own."""

from __future__ import annotations

import pytest
import torch
from cases import CONVS, FORMATS, MAPS, Conv, batch_norm, conv_weight, doubled, normal
from tolerances import DTYPES, assert_as_exact_as_pytorch
from torch import Tensor

from fused_resnet import ops, reference

compiled = torch.ops.fused_resnet
formats = pytest.mark.parametrize("fmt", FORMATS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
SMALL = [
    Conv("3x3", (2, 3, 4, 4), 4, args={"padding": 1}),
    Conv("1x1-stride2", (2, 4, 4, 4), 3, (1, 1), {"stride": 2}),
    Conv("groups-dilated", (1, 4, 6, 5), 4, args={"padding": 2, "dilation": 2, "groups": 2}),
]


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


@formats
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("relu", "residual"), [(True, True), (True, False), (False, True), (False, False)]
)
def test_bn_add_relu_gradcheck(fmt, training, relu, residual):
    # The second derivative is PyTorch's of a formula, for which two channels are as good as five.
    for shape, check in (
        ((3, 5, 3, 2), torch.autograd.gradcheck),
        ((2, 2, 3, 1), torch.autograd.gradgradcheck),
    ):
        x = normal(*shape, dtype=torch.float64).contiguous(memory_format=FORMATS[fmt])
        weight, bias, mean, var = batch_norm(shape[1], torch.float64)
        inputs = leaves(x, weight, bias, *([normal(*shape, dtype=torch.float64)] * residual))

        def call(x, weight, bias, r=None, mean=mean, var=var):
            running = (mean.clone(), var.clone())
            return ops.bn_add_relu(x, weight, bias, *running, r, training=training, relu=relu)

        assert check(call, inputs)


@formats
@pytest.mark.parametrize(
    ("relu", "residual"), [(True, True), (True, False), (False, True), (False, False)]
)
def test_bn_add_relu_apply_gradcheck(fmt, relu, residual):
    """The statistics are arguments, but the gradient treats them as functions of x."""
    x = normal(3, 5, 3, 2, dtype=torch.float64).contiguous(memory_format=FORMATS[fmt])
    weight, bias, _, _ = batch_norm(5, torch.float64)
    inputs = leaves(x, weight, bias, *([normal(3, 5, 3, 2, dtype=torch.float64)] * residual))

    def call(x, weight, bias, r=None):
        mean, var = x.detach().mean((0, 2, 3)), x.detach().var((0, 2, 3), correction=0)
        return compiled.bn_add_relu_apply(x, weight, bias, mean, var, r, 1e-5, relu)

    assert torch.autograd.gradcheck(call, inputs)


def conv_call(case, training, relu):
    """The operation as a function of all that it is differentiated by, and these."""
    x, w = normal(*case.x, dtype=torch.float64), conv_weight(case, torch.float64)
    weight, bias, mean, var = batch_norm(case.k, torch.float64)
    shape = reference.conv_bn_add_relu(x, w, weight, bias, mean, var, **case.args).shape
    conv_bias, r = normal(case.k, dtype=x.dtype), normal(*shape, dtype=x.dtype)

    def call(x, w, conv_bias, weight, bias, r):
        running = (mean.clone(), var.clone())
        return ops.conv_bn_add_relu(
            x, w, weight, bias, *running, r, conv_bias=conv_bias, training=training, relu=relu,
            **case.args,
        )  # fmt: skip

    return call, leaves(x, w, conv_bias, weight, bias, r)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_conv_bn_add_relu_gradcheck(case, training, relu):
    call, inputs = conv_call(case, training, relu)
    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_conv_bn_add_relu_second_derivative(training, relu):
    """PyTorch's of a formula: small, since its time grows with the square of all elements."""
    case = Conv("3x3", (2, 2, 3, 2), 2, args={"padding": 1})
    assert torch.autograd.gradgradcheck(*conv_call(case, training, relu))


@pytest.mark.parametrize("training", [True, False])
def test_conv_bn_relu_maxpool_gradcheck(training):
    x, w = normal(2, 2, 7, 7, dtype=torch.float64), normal(3, 2, 3, 3, dtype=torch.float64)
    weight, bias, mean, var = batch_norm(3, torch.float64)

    def call(x, w, weight, bias):
        running = (mean.clone(), var.clone())
        return ops.conv_bn_relu_maxpool(x, w, weight, bias, *running, padding=1, training=training)

    assert torch.autograd.gradcheck(call, leaves(x, w, weight, bias))


def gradients(function, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(function(*inputs), inputs, grad))


@dtypes
@formats
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", MAPS.values(), ids=MAPS)
def test_bn_add_relu_gradients(dtype, fmt, training, shape):
    x = normal(*shape, dtype=dtype, shift=0.5).contiguous(memory_format=FORMATS[fmt])
    r, grad = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype)
    weight, bias, mean, var = batch_norm(shape[1], dtype)
    # Keep all results away from zero, where rounding would decide whether ReLU masks them.
    y = reference.bn_add_relu(
        doubled(x), *doubled((weight, bias, mean, var)), doubled(r), training=training, relu=False
    )
    r = (r.double() + 0.2 * y.sign()).to(dtype)

    def call(function, *running):
        return lambda x, w, b, r: function(x, w, b, *running, r, training=training)

    inputs = (x, weight, bias, r)
    truth = gradients(
        call(reference.bn_add_relu, *doubled((mean, var))), leaves(*doubled(inputs)), doubled(grad)
    )
    eager = gradients(call(reference.bn_add_relu, mean.clone(), var.clone()), leaves(*inputs), grad)
    result = gradients(call(ops.bn_add_relu, mean.clone(), var.clone()), leaves(*inputs), grad)
    for ours, theirs, exact in zip(result, eager, truth, strict=True):
        assert_as_exact_as_pytorch(ours, theirs, exact)


@formats
@pytest.mark.parametrize("case", [c for c in CONVS if "many" not in c.why], ids=str)
def test_conv_gradients_without_the_stored_convolution(case, fmt):
    """Frozen batch norm, where the result of the convolution is not stored."""
    dtype = torch.float64
    x = normal(*case.x, dtype=dtype).contiguous(memory_format=FORMATS[fmt])
    w, (weight, bias, mean, var) = conv_weight(case, dtype), batch_norm(case.k, dtype)

    def call(function):
        return lambda x, w, weight, bias: function(x, w, weight, bias, mean, var, **case.args)

    inputs = (x, w, weight, bias)
    grad = normal(*call(reference.conv_bn_add_relu)(*inputs).shape, dtype=dtype)
    truth = gradients(call(reference.conv_bn_add_relu), leaves(*inputs), grad)
    result = gradients(call(ops.conv_bn_add_relu), leaves(*inputs), grad)
    torch.testing.assert_close(result, truth, rtol=1e-10, atol=1e-10)


def test_only_required_gradients_are_computed():
    x = normal(2, 4, 5, 5, dtype=torch.float64)
    w, (weight, bias, mean, var) = normal(4, 4, 3, 3, dtype=x.dtype), batch_norm(4, x.dtype)
    (w,) = leaves(w)
    y = ops.conv_bn_add_relu(x, w, weight, bias, mean, var)
    expected = reference.conv_bn_add_relu(x, w, weight, bias, mean, var)
    (g,) = torch.autograd.grad(y.sum(), w)
    (e,) = torch.autograd.grad(expected.sum(), w)
    torch.testing.assert_close(g, e, rtol=1e-11, atol=1e-11)


# opcheck: schema, fake, autograd registration, AOT dispatch


def flat(dtype: torch.dtype, fmt: str, *, grad: bool = True) -> tuple[Tensor, ...]:
    x = normal(2, 5, 4, 4, dtype=dtype).contiguous(memory_format=FORMATS[fmt])
    weight, bias, mean, var = batch_norm(5, dtype)
    inputs = (x, weight, bias, normal(2, 5, 4, 4, dtype=dtype))
    x, weight, bias, r = leaves(*inputs) if grad else inputs
    return x, weight, bias, mean, var, r


@dtypes
@formats
@pytest.mark.parametrize("training", [True, False])
def test_opcheck_bn_add_relu(dtype, fmt, training):
    x, weight, bias, mean, var, r = flat(dtype, fmt)
    arguments = (x, weight, bias, mean, var, r, training, 1e-5, True)
    torch.library.opcheck(compiled.bn_add_relu.default, arguments)


@formats
@pytest.mark.parametrize("training", [True, False])
def test_opcheck_bn_add_relu_backward(fmt, training):
    x, weight, _, mean, var, r = flat(torch.float64, fmt)
    y = reference.bn_add_relu(x, weight, None, mean.clone(), var.clone(), r).detach()
    arguments = (r, x, y, weight, mean, var, training, 1e-5, True, True)
    torch.library.opcheck(compiled.bn_add_relu_backward.default, arguments)


@dtypes
@formats
def test_opcheck_conv_bn_add_relu(dtype, fmt):
    x, weight, bias, mean, var, r = flat(dtype, fmt)
    (w,) = leaves(normal(5, 5, 3, 3, dtype=dtype))
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    arguments = (x, w, None, weight, bias, mean, var, r, *geometry, 1e-5, True)
    torch.library.opcheck(compiled.conv_bn_add_relu.default, arguments)


@formats
def test_opcheck_conv_bn_relu_maxpool(fmt):
    x, weight, bias, mean, var, _ = flat(torch.float32, fmt, grad=False)
    w = normal(5, 5, 3, 3, dtype=torch.float32)
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    arguments = (x, w, None, weight, bias, mean, var, *geometry, 1e-5, [3, 3], [2, 2], [1, 1])
    torch.library.opcheck(compiled.conv_bn_relu_maxpool.default, arguments)


@formats
@dtypes
def test_opcheck_packed(fmt, dtype):
    x, *_, r = flat(dtype, fmt, grad=False)
    w = normal(5, 5, 3, 3, dtype=dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    scale, shift = normal(5, dtype=wide), normal(5, dtype=wide)
    packed = ops.pack_conv_weight(w)
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    check = torch.library.opcheck
    check(compiled.pack_conv_weight.default, (w, 1))
    check(compiled.unpack_conv_weight.default, (packed, list(w.shape), 1))
    operands = (x, packed, scale, shift)
    check(
        compiled.conv_bn_add_relu_packed.default,
        (*operands, r, list(w.shape), *geometry, True),
    )
    check(
        compiled.conv_bn_relu_maxpool_packed.default,
        (*operands, list(w.shape), *geometry, [3, 3], [2, 2], [1, 1]),
    )
