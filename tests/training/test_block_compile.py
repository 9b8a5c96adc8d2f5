"""``torch.compile(fullgraph=True)``, ``torch.export``, ``torch.jit.trace`` of a training model."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from networks import assert_same, image, randomize
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

pytest.importorskip("torchvision", reason="torchvision's blocks are what is trained here")
from training_blocks import basic, bottleneck, state

import fused_resnet as fr

SHAPE = (3, 11, 13)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def network() -> nn.Module:
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return randomize(nn.Sequential(*stem, basic(), bottleneck(2))).double().train()


def step(run, model: nn.Module, batch: int) -> dict[str, torch.Tensor]:
    model.zero_grad()
    y = run(image(batch, *SHAPE))
    y.square().sum().backward()
    return {"y": y.detach(), **state(model)}


@pytest.mark.parametrize("recompute", [False, True])
def test_one_graph_for_all_batch_sizes(recompute) -> None:
    """No graph break; the second compilation is of a batch size that changes."""
    model = fr.fuse(network(), recompute=recompute)
    eager = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch in (2, 3, 5):
        assert_same(step(compiled, model, batch), step(eager, eager, batch))
    assert counter.frame_count == 2
    assert not counters["graph_break"]


def test_cumulative_averages() -> None:
    """``momentum=None``: the weight of a batch is a number that the graph computes."""
    block = basic(2, functools.partial(nn.BatchNorm2d, momentum=None))
    model = fr.fuse(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False).double(), block).train())
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        assert_same(step(compiled, model, 2), step(eager, eager, 2))


def test_a_compiled_graph_calls_a_unit_for_each_block() -> None:
    found = []

    def record(graph, _):
        found.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph.forward

    torch.compile(fr.fuse(network()), fullgraph=True, backend=record)(image(2, *SHAPE))
    assert found == ["fused_resnet.training_unit"] * 3


def test_the_default_compiler() -> None:
    model = fr.fuse(network())
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    assert_same(step(compiled, model, 2), step(eager, eager, 2))


@pytest.mark.parametrize("strict", [True, False])
def test_export_of_a_training_model(strict) -> None:
    """The program is made of PyTorch's own operators, and updates its own statistics."""
    model = fr.fuse(network())
    program = torch.export.export(copy.deepcopy(model), (image(2, *SHAPE),), strict=strict)
    assert not [n for n in program.graph.nodes if "fused_resnet" in str(n.target)]
    module = program.module()
    assert_same(step(module, module, 2), step(model, model, 2))


def test_tracing_a_training_model() -> None:
    model = fr.fuse(network())
    traced = torch.jit.trace(copy.deepcopy(model), image(2, *SHAPE), check_trace=False)
    fresh = copy.deepcopy(model)
    y = traced(image(2, *SHAPE))
    torch.testing.assert_close(y, fresh(image(2, *SHAPE)), rtol=1e-9, atol=1e-9)
