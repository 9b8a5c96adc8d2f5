"""CUDA graphs of frozen networks on a device; the policy is tests/inference/test_cuda_graphs.py."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import normal
from on_gpu import DEVICE, there
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.inference import graph_capture


@pytest.fixture(params=["resnet18", "resnet50"])
def frozen(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    model = getattr(fr, request.param)(num_classes=10).eval().to(DEVICE, torch.float16)
    return fr.freeze(model, graphs=2)


def images(seed: int = 0, batch: int = 2, size: int = 64) -> Tensor:
    torch.manual_seed(seed)
    return there(normal(batch, 3, size, size, dtype=torch.float16))


def without(frozen: nn.Module, x: Tensor) -> Tensor:
    size, frozen.cuda_graphs.size = frozen.cuda_graphs.size, 0
    y = frozen(x)
    frozen.cuda_graphs.size = size
    return y


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry a replay."""
    seen: list[int] = []
    replay = graph_capture.CudaGraph.replay

    def counted(self: graph_capture.CudaGraph) -> None:
        seen.append(1)
        replay(self)

    monkeypatch.setattr(graph_capture.CudaGraph, "replay", counted)
    return seen


def test_replays_have_the_same_bits(frozen, replays):
    for seed in range(5):
        x = images(seed)
        expected = without(frozen, x)
        assert torch.equal(frozen(x), expected)
    assert len(replays) == 4
    assert len(frozen.cuda_graphs) == 1


def test_answers_stay(frozen):
    given = [images(seed) for seed in range(4)]
    expected = [without(frozen, x) for x in given]
    answers = [frozen(x) for x in given]
    for answer, truth in zip(answers, expected, strict=True):
        assert torch.equal(answer, truth)


def test_answers_are_overwritten_if_that_was_asked_for(frozen):
    frozen.cuda_graphs.reuse_outputs = True
    frozen(images())
    one, two = frozen(images(1)), frozen(images(2))
    assert one.data_ptr() == two.data_ptr()
    assert torch.equal(two, without(frozen, images(2)))


def test_shapes_take_turns_in_shared_memory(frozen, replays):
    given = [images(seed, batch) for seed, batch in enumerate((1, 4, 1, 4, 1, 4, 1, 4))]
    expected = [without(frozen, x) for x in given]
    for _ in range(2):
        answers = [frozen(x) for x in given]
        assert all(torch.equal(a, e) for a, e in zip(answers, expected, strict=True))
    assert set(frozen.cuda_graphs.memory) == {"1x3x64x64 float16", "4x3x64x64 float16"}
    assert all(taken > 0 for taken in frozen.cuda_graphs.memory.values())
    # A third shape: one of the two gives way, and the memory of both is still right.
    third = images(9, 3)
    expected.append(without(frozen, third))
    for x, truth in [*zip(given, expected, strict=False), (third, expected[-1])] * 3:
        assert torch.equal(frozen(x), truth)
    assert len(frozen.cuda_graphs) == 2
    assert replays


def test_the_current_stream_is_respected(frozen):
    """The map is filled late on a stream of its own: elsewhere a graph would read too early."""
    x = images()
    expected = without(frozen, x)
    frozen(x), frozen(x)
    late = torch.full_like(x, float("nan"))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(x)
        result = frozen(late)
    stream.synchronize()
    assert torch.equal(result, expected)


def test_streams_take_turns(frozen):
    given = [images(seed) for seed in range(4)]
    expected = [without(frozen, x) for x in given]
    frozen(given[0]), frozen(given[0])
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in given]
    answers = []
    for _ in range(5):
        for stream, x in zip(streams, given, strict=True):
            with torch.cuda.stream(stream):
                answers.append(frozen(x))
    torch.cuda.synchronize()
    assert all(torch.equal(a, e) for a, e in zip(answers, expected * 5, strict=True))


def test_threads(frozen):
    """The first calls record while the other threads compute and allocate."""
    given = [images(seed, batch) for seed in range(8) for batch in (1, 2, 3)]
    expected = [without(frozen, x) for x in given]

    def run(x: Tensor) -> Tensor:
        with torch.cuda.stream(torch.cuda.Stream()):
            y = frozen(x)
            torch.cuda.current_stream().synchronize()
            return y

    torch.cuda.synchronize()
    with ThreadPoolExecutor(4) as pool:
        for answer, truth in zip(pool.map(run, given), expected, strict=True):
            assert torch.equal(answer, truth)


def test_the_callers_own_graph_holds_the_model(frozen, replays):
    """While the caller records, the model's kernels are recorded and no graph is replayed."""
    x = images()
    expected = without(frozen, images(1))
    frozen(x), frozen(x)
    torch.cuda.synchronize()
    replays.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = frozen(x)
    assert not replays
    x.copy_(images(1))
    graph.replay()
    assert torch.equal(y, expected)


def test_inference_mode_and_back(frozen):
    x = images()
    expected = without(frozen, x)
    with torch.inference_mode():
        frozen(x)
        assert torch.equal(frozen(x), expected)
    assert torch.equal(frozen(x), expected)
    with torch.inference_mode():
        assert torch.equal(frozen(x.clone()), expected)


def test_new_weights_drop_the_graphs(frozen):
    x = images()
    frozen(x), frozen(x)
    state = {name: t * 0.5 for name, t in frozen.state_dict().items()}
    frozen.load_state_dict(state)
    assert torch.equal(frozen(x), without(frozen, x))
    assert len(frozen.cuda_graphs) == 0


def test_copies_record_their_own(frozen, replays):
    x = images()
    expected = frozen(x)
    frozen(x)
    other = copy.deepcopy(frozen)
    assert len(other.cuda_graphs) == 0
    for _ in range(3):
        assert torch.equal(other(x), expected)
    assert len(other.cuda_graphs) == 1


def test_dropping_them_gives_the_memory_back(frozen):
    x = images()
    without(frozen, x)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    frozen(x), frozen(x)
    assert torch.cuda.memory_reserved() > before
    frozen.cuda_graphs.clear()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


def test_a_forward_that_waits_runs_without_one():
    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.sum().item()

    frozen = fr.freeze(Waits().to(DEVICE), graphs=1)
    x = images().float()
    expected = frozen(x)
    with pytest.warns(UserWarning, match="no CUDA graph"):
        assert torch.equal(frozen(x), expected)
    assert torch.equal(frozen(x), expected)
    assert len(frozen.cuda_graphs) == 0
