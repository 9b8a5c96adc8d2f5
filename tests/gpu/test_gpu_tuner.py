"""The tuner on a GPU: it times what can run, remembers it, and keeps out of graphs."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cases import CONVS
from networks import image, randomize
from on_gpu import DEVICE, conv_operands, exact, there, unfused
from tolerances import RATIO, error

import fused_resnet as fr
from fused_resnet import ops
from fused_resnet.tuning import tuner

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


def test_a_frozen_network_is_timed_at_its_first_call_and_recorded_at_its_second(cache):
    """Each packed call by all candidates; the answer is right whatever was chosen."""
    torch.manual_seed(0)
    model = randomize(fr.resnet18(num_classes=10)).eval().half()
    x = image(2, 3, 64, 64, dtype=torch.float16)
    with torch.no_grad(), fr.use_backend("reference"):
        own, truth = model.to(DEVICE)(x.to(DEVICE)), copy.deepcopy(model).cpu().double()(x.double())
    frozen = fr.freeze(model)
    first = frozen(x.to(DEVICE))
    (calls,) = json.loads(cache.read_text())["machines"].values()
    assert {key.partition("(")[0] for key in calls} == {
        "conv_bn_relu_maxpool_packed",
        "residual_block",
    }
    wanted = {"cuda", "library"} | ({"triton"} if fr.backends()["triton"] else set())
    for key, times in calls.items():
        assert set(times) == wanted, key
    text = cache.read_text()
    second = frozen(x.to(DEVICE))
    assert len(frozen.cuda_graphs) == 1
    assert cache.read_text() == text
    for answer in (first, second):
        assert error(answer.cpu(), truth) <= RATIO * error(own.cpu(), truth)
