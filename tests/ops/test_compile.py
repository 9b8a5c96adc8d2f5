"""``torch.compile(fullgraph=True)`` and ``torch.export`` over every operation and a network."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import FORMATS, batch_norm, normal
from networks import randomize
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import fused_resnet as fr
from fused_resnet import ops, reference
from fused_resnet.models.resnet import ResNet


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def operands(fmt: str = "channels_last", grad: bool = False):
    x = normal(2, 8, 6, 6, dtype=torch.float32).contiguous(memory_format=FORMATS[fmt])
    w = normal(8, 8, 3, 3, dtype=torch.float32, scale=0.1)
    bn = batch_norm(8, torch.float32)
    if grad:
        for t in (x, w, *bn[:2]):
            t.requires_grad_()
    return x, w, bn


def call_bn(x, w, bn, training):
    return ops.bn_add_relu(x, *bn, x, training=training)


def call_conv(x, w, bn, training):
    return ops.conv_bn_add_relu(x, w, *bn, x, padding=1, training=training)


def call_stem(x, w, bn, training):
    return ops.conv_bn_relu_maxpool(x, w, *bn, padding=1, training=training)


CALLS = [call_bn, call_conv, call_stem]


@pytest.mark.parametrize("call", CALLS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("training", [True, False])
def test_compiled_equals_eager(call, fmt, training):
    """Result, gradients and running statistics of the compiled function."""
    x, w, bn = operands(fmt, grad=True)
    outcomes = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        running = (bn[0], bn[1], bn[2].clone(), bn[3].clone())
        y = function(x, w, running, training)
        grads = torch.autograd.grad(y.square().sum(), (x, *bn[:2]))
        outcomes.append((y.detach(), *grads, *running[2:]))
    assert outcomes[0][0].stride() == outcomes[1][0].stride()
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-5, atol=1e-5)


def test_inductor_on_a_training_step():
    """The default compiler, forward and backward, once."""
    x, w, bn = operands(grad=True)
    compiled = torch.compile(call_conv, fullgraph=True)
    running = (bn[0], bn[1], bn[2].clone(), bn[3].clone())
    expected = call_conv(x, w, running, True)
    result = compiled(x, w, bn, True)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bn[2:], running[2:], rtol=1e-5, atol=1e-5)
    (g,) = torch.autograd.grad(result.sum(), w)
    (e,) = torch.autograd.grad(expected.sum(), w)
    torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)


def test_the_backend_choice_is_guarded():
    """A function compiled under one backend is recompiled under another."""
    x, w, bn = operands()
    targets: list[set[str]] = []

    def record(graph, _):
        targets.append({str(n.target) for n in graph.graph.nodes if n.op == "call_function"})
        return graph.forward

    compiled = torch.compile(call_conv, fullgraph=True, backend=record)
    compiled(x, w, bn, False)
    with fr.use_backend("reference"):
        compiled(x, w, bn, False)
    compiled(x, w, bn, False)
    assert len(targets) == 2, "one graph for each backend"
    assert any("fused_resnet" in t for t in targets[0])
    assert not any("fused_resnet" in t for t in targets[1])


def test_one_recompilation_for_all_batch_sizes():
    """After the first change of batch size torch makes it dynamic, and so do our fakes."""
    compiled_frames = []

    def count(graph, _):
        compiled_frames.append(graph)
        return graph.forward

    compiled = torch.compile(call_conv, fullgraph=True, backend=count)
    _, w, bn = operands()
    for n in (2, 3, 5, 7):
        x = normal(n, 8, 6, 6, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
        expected = reference.conv_bn_add_relu(x, w, *bn, x, padding=1)
        torch.testing.assert_close(compiled(x, w, bn, False), expected, rtol=2e-5, atol=2e-5)
    assert len(compiled_frames) == 2


slow = pytest.mark.slow


def four_blocks(num_classes: int) -> ResNet:
    """A stem, a block of each stage, and the head: each graph that a ResNet-18 repeats."""
    return ResNet(fr.nn.BasicBlock, [1, 1, 1, 1], num_classes=num_classes)


#: On every backend that runs on a CPU; whole networks, which are slow to compile, in
#: `make test-all`.
NETWORKS = [
    pytest.param(make, backend, training, marks=[slow] if late else [], id=identity)
    for make in (four_blocks, fr.resnet18, fr.resnet50)
    for name in [make.__name__]
    for backend in ("reference", "cpu", "library", "auto")
    for training in (False, True)
    for late in [make is not four_blocks or (training and backend != "auto")]
    for identity in [f"{name}-{backend}-{'training' if training else 'eval'}"]
]


@pytest.mark.parametrize(("make", "backend", "training"), NETWORKS)
def test_networks_are_one_graph_for_all_batch_sizes(make, backend, training):
    """No graph breaks; one compilation for the first batch size and one for all others.

    That is torch's own rule for shapes that turn out to change. Compiled and eager agree in the
    logits, and after a training step in every gradient and running statistic. In float64, where
    nothing that rounding does can turn a ReLU.
    """
    torch.manual_seed(0)
    model = randomize(make(num_classes=10)).double().train(training)
    model = fr.fuse(model).to(memory_format=torch.channels_last)
    eager = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend=counter)

    def answer(run, owner, x):
        owner.zero_grad()
        with torch.set_grad_enabled(training), fr.use_backend(backend):
            y = run(x)
        if training:
            y.square().mean().backward()
        grads = {n: p.grad for n, p in owner.named_parameters() if training}
        return y.detach(), grads, dict(owner.named_buffers())

    for batch in (2, 3, 5):
        x = normal(batch, 3, 32, 32, dtype=torch.float64)
        got, expected = answer(compiled, model, x), answer(eager, eager, x)
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)
    assert counter.frame_count == 2
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = four_blocks(num_classes=10).eval().to(memory_format=torch.channels_last)
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(m.running_mean, std=0.1)
            torch.nn.init.uniform_(m.running_var, 0.5, 1.5)
    return model


def test_compiled_network(network):
    x = normal(2, 3, 64, 64, dtype=torch.float32)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), network(x), rtol=1e-5, atol=1e-5)


def test_compiled_frozen_network(network):
    x = normal(2, 3, 64, 64, dtype=torch.float32)
    frozen = fr.freeze(network)
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), frozen(x), rtol=1e-5, atol=1e-5)


def test_exported_network(network):
    x = normal(2, 3, 64, 64, dtype=torch.float32)
    batch = torch.export.Dim("batch", min=1, max=16)
    with torch.no_grad():
        program = torch.export.export(network, (x,), dynamic_shapes=({0: batch},))
        operators = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
        assert "fused_resnet.conv_bn_add_relu.default" in operators
        more = normal(5, 3, 64, 64, dtype=torch.float32)
        torch.testing.assert_close(program.module()(more), network(more), rtol=1e-5, atol=1e-5)
