"""``torch.compile(fullgraph=True)`` and ``torch.export`` on a GPU, through our kernels."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import CONVS, normal
from on_gpu import DEVICE, conv_operands, there

import fused_resnet as fr
from fused_resnet import ops

OPERATIONS = ("bn_add_relu", "conv_bn_add_relu", "conv_bn_relu_maxpool")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def call(operation, operands, training):
    x, w, r, *bn = operands
    if operation == "bn_add_relu":
        return ops.bn_add_relu(x, *bn, r, training=training)
    if operation == "conv_bn_add_relu":
        return ops.conv_bn_add_relu(x, w, *bn, r, padding=1, training=training)
    return ops.conv_bn_relu_maxpool(x, w, *bn, padding=1, stride=1, training=training)


def operands(dtype=torch.float32):
    o = there(conv_operands(CONVS[3], dtype, "channels_last", residual=True))
    names = ("x", "conv_weight", "residual", "bn_weight", "bn_bias", "running_mean", "running_var")
    return [o[name] for name in names]


@pytest.mark.parametrize(
    ("operation", "training", "backend"),
    [
        *((operation, training, "aot_eager") for operation in OPERATIONS for training in (0, 1)),
        ("conv_bn_add_relu", 0, "inductor"),
        ("bn_add_relu", 1, "inductor"),
    ],
)
def test_compiled_equals_eager(operation, training, backend):
    """Result, gradients and running statistics."""
    training = bool(training)
    outcomes = []
    given = operands()
    for function in (call, torch.compile(call, fullgraph=True, backend=backend)):
        mine = [t.detach().clone() for t in given]
        leaves = [t.requires_grad_() for t in (mine[0], *mine[3:5])]
        y = function(operation, mine, training)
        gradients = torch.autograd.grad(y.square().sum(), leaves)
        outcomes.append((y.detach(), *gradients, *mine[5:]))
    assert outcomes[0][0].stride() == outcomes[1][0].stride()
    # Sums over thousands of squares, in another order.
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = fr.resnet18(num_classes=10).eval().to(DEVICE, memory_format=torch.channels_last)
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(m.running_mean, std=0.1)
            torch.nn.init.uniform_(m.running_var, 0.5, 1.5)
    return model


@pytest.mark.parametrize("form", ["fused", "frozen"])
def test_compiled_network(network, form):
    dtype = torch.bfloat16
    x = there(normal(2, 3, 64, 64, dtype=dtype)).contiguous(memory_format=torch.channels_last)
    model = copy.deepcopy(network).to(dtype)
    model = model if form == "fused" else fr.freeze(model)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        result, expected = compiled(x), model(x)
    torch.testing.assert_close(result, expected, rtol=3e-2, atol=3e-2)


def test_exported_network(network):
    x = there(normal(2, 3, 64, 64, dtype=torch.float32))
    with torch.no_grad():
        program = torch.export.export(network, (x,))
        named = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
        assert "fused_resnet.conv_bn_add_relu.default" in named
        torch.testing.assert_close(program.module()(x), network(x), rtol=1e-5, atol=1e-5)
