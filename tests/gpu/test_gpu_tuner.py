"""The tuner on a GPU: it times what can run, remembers it, and keeps out of graphs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cases import CONVS
from on_gpu import conv_operands, exact, there, unfused
from tolerances import RATIO, error

from fused_resnet import ops, tuner

CASE = CONVS[3]


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "tuning.json"
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(path))
    monkeypatch.setenv("FUSED_RESNET_TUNE", "1")
    tuner.forget()
    yield path
    tuner.forget()


def operands():
    return there(conv_operands(CASE, torch.float16, "channels_last", residual=True))


def test_a_new_call_is_timed_once_and_remembered(cache):
    given = operands()
    result = ops.conv_bn_add_relu(**given, **CASE.args)
    truth = unfused("conv_bn_add_relu", exact(given), **CASE.args)
    eager = unfused("conv_bn_add_relu", given, **CASE.args)
    assert error(result.cpu(), truth) <= RATIO * error(eager.cpu(), truth)
    text = cache.read_text()
    (machine,) = json.loads(text)["machines"].items()
    assert torch.cuda.get_device_name() in machine[0]
    ((key, times),) = machine[1].items()
    assert key.startswith("conv_bn_add_relu(")
    assert "cuda" in times
    assert all(0 < milliseconds < 1e3 for milliseconds in times.values())
    assert torch.equal(ops.conv_bn_add_relu(**given, **CASE.args), result)
    assert cache.read_text() == text


def test_nothing_is_timed_while_a_graph_is_captured(cache, monkeypatch):
    given = operands()
    with monkeypatch.context() as patch:
        patch.setenv("FUSED_RESNET_TUNE", "0")
        ops.conv_bn_add_relu(**given, **CASE.args)  # loads the kernel
    tuner.forget()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.conv_bn_add_relu(**given, **CASE.args)
    graph.replay()
    truth = unfused("conv_bn_add_relu", exact(given), **CASE.args)
    assert error(y.cpu(), truth) < 1e-2
    assert not cache.exists()
