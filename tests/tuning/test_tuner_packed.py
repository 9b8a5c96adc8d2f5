"""The tuner and frozen networks: which backend runs an operation on packed weights.

Only on CUDA is there a choice, since all candidates read the same layout there. Here tensors are on
the CPU and are dispatched as if they were on CUDA; the candidates are CUDA's kernels in the
simulator, Triton's in the interpreter and PyTorch's own calls, or stubs where only the choice
matters.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import emulation
import pytest
import torch
from cases import CONVS, Conv, batch_norm, conv_weight, doubled, normal
from graph_recorder import Recorder
from networks import image, randomize
from tolerances import RATIO, error
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import ops, reference
from fused_resnet.backends import aten as library
from fused_resnet.backends.folding import fold
from fused_resnet.cli._choices import calls_of, describe
from fused_resnet.inference import frozen_conv, lowered
from fused_resnet.inference.cuda_graphs import Graphs
from fused_resnet.ops import packed as packed_ops
from fused_resnet.ops import registry
from fused_resnet.ops.registry import OPERATORS
from fused_resnet.tuning import cache as tuning_cache
from fused_resnet.tuning import tuner

NAMES = ["cuda", "library", "triton"]


class Counted:
    """A backend's operators; records the calls."""

    def __init__(self, name: str, operators: Any, ran: list[tuple[str, str]]) -> None:
        self._name, self._operators, self._ran = name, operators, ran

    def __getattr__(self, op: str) -> Any:
        function = getattr(self._operators, op)

        def call(*arguments: Any) -> Any:
            if "pack" not in op.partition("_")[0]:
                self._ran.append((self._name, op))
            return function(*arguments)

        return call


def stand_in(monkeypatch, operators: dict[str, Any]) -> list[tuple[str, str]]:
    """Dispatch calls to these operators as if on CUDA; returns the calls: backend and operator."""
    ran: list[tuple[str, str]] = []
    for name, own in operators.items():
        monkeypatch.setitem(OPERATORS, name, Counted(name, own, ran))
    for module in (packed_ops, lowered):
        monkeypatch.setattr(module, "resolve_backend", lambda op, x: "cuda")
    registry.candidates.cache_clear()
    return ran


@pytest.fixture
def real(monkeypatch) -> Iterator[list[tuple[str, str]]]:
    """Every candidate's own kernels."""
    for backend in ("cuda", "triton"):
        reason = emulation.missing(backend)
        if reason:
            pytest.skip(reason)
    with emulation.operators("cuda") as cuda, emulation.operators("triton") as triton:
        torch.use_deterministic_algorithms(False)  # under which nothing is timed
        with monkeypatch.context() as patch:
            patch.setattr(frozen_conv, "packed_dtype", lambda dtype, device: dtype)
            yield stand_in(patch, {"cuda": cuda, "library": library, "triton": triton})
    registry.candidates.cache_clear()


@pytest.fixture
def fakes(monkeypatch) -> Iterator[list[tuple[str, str]]]:
    """Three names for the CPU's kernels, so that all choices give the same result."""
    with monkeypatch.context() as patch:
        yield stand_in(patch, dict.fromkeys(NAMES, torch.ops.fused_resnet))
    registry.candidates.cache_clear()


@pytest.fixture
def timed(monkeypatch) -> dict[str, Any]:
    """Candidates run as usual, but their measured times come from ``times``."""
    state: dict[str, Any] = {"times": {}, "calls": []}
    measure = tuner.measure

    def told(op: str, candidates: Any, arguments: Any, rounds: int) -> dict[str, float]:
        found = measure(op, candidates, arguments, 0)
        state["calls"].append((op, sorted(found)))
        return {name: state["times"].get(name, 2.0) for name in found}

    monkeypatch.setattr(tuner, "measure", told)
    return state


# The operations

STEM = Conv("stem", (1, 3, 18, 16), 16, (7, 7), {"stride": 2, "padding": 3})


def packed_conv(case: Conv, dtype: torch.dtype) -> tuple[Tensor, Tensor, Any, Any]:
    x = normal(*case.x, dtype=dtype).contiguous(memory_format=torch.channels_last)
    w, bn = conv_weight(case, dtype), batch_norm(case.k, torch.float32)
    return x, w, bn, fold(None, *bn, 1e-5, torch.float32)


def conv_call(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Result, PyTorch's own, the truth."""
    case = CONVS[3]
    x, w, bn, affine = packed_conv(case, dtype)
    own = reference.conv_bn_add_relu(x, w, *bn, **case.args)
    r = normal(*own.shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    y = ops.conv_bn_add_relu_packed(
        x, ops.pack_conv_weight(w), *affine, r, weight_shape=tuple(w.shape), **case.args
    )
    return (
        y,
        reference.conv_bn_add_relu(x, w, *bn, r, **case.args),
        reference.conv_bn_add_relu(*doubled((x, w)), *doubled(bn), doubled(r), **case.args),
    )


def stem_call(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x, w, bn, affine = packed_conv(STEM, dtype)
    y = ops.conv_bn_relu_maxpool_packed(
        x, ops.pack_conv_weight(w), *affine, weight_shape=tuple(w.shape), **STEM.args
    )
    return (
        y,
        reference.conv_bn_relu_maxpool(x, w, *bn, **STEM.args),
        reference.conv_bn_relu_maxpool(*doubled((x, w)), *doubled(bn), **STEM.args),
    )


def block_call(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A bottleneck with a shortcut and a stride, frozen."""
    torch.manual_seed(0)
    shortcut = nn.Sequential(nn.Conv2d(16, 64, 1, 2, bias=False), nn.BatchNorm2d(64))
    block = fr.nn.Bottleneck(16, 16, 2, shortcut)
    block = randomize(block).eval().to(dtype)
    x = normal(1, 16, 7, 6, dtype=dtype).contiguous(memory_format=torch.channels_last)
    frozen = fr.freeze(block, graphs=0)
    with fr.use_backend("reference"), torch.no_grad():
        own, truth = block(x), copy.deepcopy(block).double()(x.double())
    return frozen(x), own, truth


CALLS = {
    "conv_bn_add_relu_packed": conv_call,
    "conv_bn_relu_maxpool_packed": stem_call,
    "residual_block": block_call,
}


@pytest.mark.parametrize("winner", NAMES)
@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_each_candidate_runs_and_the_chosen_result_is_right(real, timed, op, winner, dtype):
    timed["times"] = {winner: 1.0}
    y, own, truth = CALLS[op](dtype)
    assert timed["calls"] == [(op, NAMES)]
    # Each once for the timing, and then the fastest.
    assert [name for name, ran in real if ran == op] == [*NAMES, winner]
    assert y.dtype is dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert error(y, truth) <= RATIO * error(own, truth)


def test_a_candidate_that_fails_is_dropped(real, timed, monkeypatch):
    def fails(*arguments: Any) -> None:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(library, "conv_bn_add_relu_packed", fails)
    timed["times"] = {"library": 1.0, "triton": 1.5}
    with pytest.warns(UserWarning, match="conv_bn_add_relu_packed: library fails and is left out"):
        y, own, truth = conv_call(torch.float16)
    assert timed["calls"] == [("conv_bn_add_relu_packed", ["cuda", "triton"])]
    assert real[-1] == ("triton", "conv_bn_add_relu_packed")
    assert error(y, truth) <= RATIO * error(own, truth)


def test_candidates_read_the_same_packed_weight(real):
    """CUDA's and Triton's packed layouts are equal; PyTorch's calls read them as a view."""
    w = conv_weight(CONVS[3], torch.float16)
    cuda, triton = (OPERATORS[name].pack_conv_weight(w, 1) for name in ("cuda", "triton"))
    assert torch.equal(cuda, triton)
    view = cuda.view(w.shape[0], *w.shape[2:], w.shape[1]).permute(0, 3, 1, 2)
    assert torch.equal(view, w)


def test_cudnn_runs_what_it_supports(monkeypatch):
    """With a stub, since its operator exists on CUDA only. Not for 7x7, nor without ReLU."""
    fused: list[bool] = []

    def cudnn(x, weight, bias, residual, *geometry):
        fused.append(residual is not None)
        y = torch.nn.functional.conv2d(x, weight, bias, *geometry)
        return torch.relu(y if residual is None else y + residual)

    monkeypatch.setattr(library, "_has_cudnn", lambda: True)
    monkeypatch.setattr(library, "_cudnn", cudnn)
    case = CONVS[3]
    x, w, bn, affine = packed_conv(case, torch.float32)
    packed = w.permute(0, 2, 3, 1).reshape(-1)
    r = normal(*reference.conv_bn_add_relu(x, w, *bn, **case.args).shape, dtype=torch.float32)
    geometry = ((1, 1), (1, 1), (1, 1), 1)
    for residual in (None, r):
        y = library.conv_bn_add_relu_packed(
            x, packed, *affine, residual, list(w.shape), *geometry, True
        )
        truth = reference.conv_bn_add_relu(x, w, *bn, residual, padding=1)
        torch.testing.assert_close(y, truth, rtol=1e-4, atol=1e-4)
    assert fused == [False, True]
    library.conv_bn_add_relu_packed(x, packed, *affine, r, list(w.shape), *geometry, False)
    x, w, bn, affine = packed_conv(STEM, torch.float32)
    y = library.conv_bn_relu_maxpool_packed(
        x, w.permute(0, 2, 3, 1).reshape(-1), *affine, list(w.shape), (2, 2), (3, 3), (1, 1), 1,
        [3, 3], [2, 2], [1, 1],
    )  # fmt: skip
    truth = reference.conv_bn_relu_maxpool(x, w, *bn, **STEM.args)
    torch.testing.assert_close(y, truth, rtol=1e-4, atol=1e-4)
    assert len(fused) == 2


# A frozen network

BLOCK_OPS = {"conv_bn_relu_maxpool_packed", "residual_block"}


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return randomize(fr.resnet18(num_classes=5)).eval()


@pytest.fixture
def frozen(fakes, network) -> nn.Module:
    return fr.freeze(network, graphs=0)


def answer(model: nn.Module, batch: int = 1) -> Tensor:
    with torch.no_grad():
        return model(image(batch, 3, 32, 32, dtype=torch.float32))


def test_each_operation_of_a_frozen_network_is_decided_once(fakes, timed, frozen):
    timed["times"] = {"triton": 1.0}
    expected = answer(frozen)
    assert {op for op, _ in timed["calls"]} == BLOCK_OPS
    assert len(timed["calls"]) == len(tuning_cache.load(tuner.machine_of(torch.device("cpu"))))
    del fakes[:], timed["calls"][:]
    torch.testing.assert_close(answer(frozen), expected, rtol=0, atol=0)
    assert timed["calls"] == []
    # The stem and eight blocks.
    assert [name for name, _ in fakes] == ["triton"] * 9
    tuner.forget()  # a later process
    answer(frozen)
    assert timed["calls"] == []


@pytest.mark.parametrize("why", ["FUSED_RESNET_TUNE=0", "deterministic", "asked for", "compiled"])
def test_nothing_is_timed_when_timing_is_off(fakes, timed, frozen, monkeypatch, why):
    context: Any = contextlib.nullcontext()
    model: Any = frozen
    x = image(1, 3, 32, 32, dtype=torch.float32)
    if why == "FUSED_RESNET_TUNE=0":
        monkeypatch.setenv("FUSED_RESNET_TUNE", "0")
    elif why == "asked for":
        context = fr.use_backend("cpu")
    elif why == "compiled":
        monkeypatch.setitem(OPERATORS, "cuda", torch.ops.fused_resnet)
        block = fr.freeze(fr.nn.BasicBlock(8, 8).eval(), graphs=0)
        model = torch.compile(block, fullgraph=True, backend="eager")
        x = image(1, 8, 6, 6, dtype=torch.float32)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(why == "deterministic")
    try:
        with context, torch.no_grad():
            model(x)
    finally:
        torch.use_deterministic_algorithms(before)
    assert timed["calls"] == []
    assert {name for name, _ in fakes} <= {"cuda"}
    assert not tuning_cache.path().exists()


def test_the_choice_is_made_before_a_graph_is_recorded(fakes, timed, network, monkeypatch):
    """At a shape's first call; its second is captured, when nothing may be timed."""
    timed["times"] = {"triton": 1.0}
    inside: list[int] = []

    class Watched(Recorder):
        def capture(self, forward: Any, x: Tensor) -> Any:
            inside.append(1)
            try:
                return super().capture(forward, x)
            finally:
                inside.pop()

    monkeypatch.setattr(tuner, "may_time", lambda x: not inside)
    frozen = fr.freeze(network, graphs=2)
    frozen.cuda_graphs = Graphs(2, Watched())
    first = answer(frozen)
    known = len(timed["calls"])
    del fakes[:]
    second = answer(frozen)
    assert frozen.cuda_graphs._recorder.recorded == [(1, 3, 32, 32)]
    assert len(timed["calls"]) == known
    assert {name for name, _ in fakes} == {"triton"}
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    # A new shape during the capture of the user's own graph: the device's kernels, not cached.
    inside.append(1)
    frozen.cuda_graphs.size = 0
    del fakes[:]
    answer(frozen, batch=2)
    assert {name for name, _ in fakes} == {"cuda"}
    inside.pop()
    answer(frozen, batch=2)
    assert len(timed["calls"]) == 2 * known


def test_calls_of_a_frozen_network_in_words(fakes, frozen):
    calls = calls_of(frozen, image(1, 3, 64, 64, dtype=torch.float32))
    assert sum(count for _, count in calls) == 9
    words = [describe(call) for call, _ in calls]
    assert words[0] == "1x3x64x64, 64 of 7x7, stride 2, max-pool, packed"
    assert words[1] == "1x64x16x16, basic block of 64, 64"
    assert words[2] == "1x64x16x16, basic block of 128, 128, 128, stride 2"
    for call, _ in calls:
        assert set(call.decide()[1]) == set(NAMES)


def test_a_decision_holds_no_weights(fakes, timed, frozen):
    """Keys have shapes only; otherwise weights would never be freed."""
    answer(frozen)
    held = [part for call in tuner._decided for part in call[-1]]
    assert not any(isinstance(part, Tensor) for part in held)
    assert not any(isinstance(p, Tensor) for part in held if isinstance(part, tuple) for p in part)
    # The same shapes with other weights are the same call.
    other = fr.freeze(randomize(fr.resnet18(num_classes=5)).eval(), graphs=0)
    del timed["calls"][:]
    answer(other)
    assert timed["calls"] == []
