"""Blocks and whole ResNets trained by the primitives in CUDA C++, in the simulator."""

from __future__ import annotations

import emulation
import pytest
import simulator
import torch
from networks import image, randomize
from torch import nn
from trained_models import assert_trained_as_exactly

import fused_resnet as fr
from fused_resnet.backends import availability
from fused_resnet.nn import BasicBlock, Bottleneck
from fused_resnet.ops import training, training_tuned
from fused_resnet.ops.registry import OPERATORS, primitives_of
from fused_resnet.ops.training_spec import Layer, LayerTensors, Unit
from fused_resnet.ops.training_unit import training_unit
from fused_resnet.tuning import tuner

if simulator.missing():
    pytest.skip(str(simulator.missing()), allow_module_level=True)

HALVES = [torch.bfloat16, torch.float16]
slow = pytest.mark.slow


def counts(kernels: list[str]) -> dict[str, int]:
    return {name: kernels.count(name) for name in kernels if name != "conv_split_finish_kernel"}


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("make", [BasicBlock, Bottleneck])
def test_a_block(make, stride):
    """Both halves take turns; identity and projection; all passes are ours."""
    torch.manual_seed(0)
    width = 16 * make.expansion
    side = None
    if stride == 2:
        conv = nn.Conv2d(width, 2 * width, 1, 2, bias=False)
        side = nn.Sequential(conv, nn.BatchNorm2d(2 * width))
    block = make(width, 16 * stride, stride, side)
    dtype = HALVES[stride - 1]
    x = image(2, width, 9, 7, dtype=dtype)
    kernels = assert_trained_as_exactly("cuda", randomize(block), x, dtype)
    convs = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    prologues = len(convs) - (2 if stride == 2 else 1)
    ours = sum(conv.stride == (1, 1) for conv in convs)
    added = stride == 2  # the shortcut's gradient, behind PyTorch's data gradient
    sums = 1 + (stride == 2) + prologues  # of the end, of the projection, of each prologue
    assert counts(kernels) == {
        "conv_bn_add_relu_kernel": len(convs) + ours,
        "conv_statistics_kernel": len(convs),
        "bn_coefficients_kernel": len(convs),
        "bn_update_running_kernel": len(convs),
        "bn_backward_coefficients_kernel": len(convs),
        "bn_backward_kernel": len(convs),
        "bn_backward_reduce_kernel": sums,
        "bn_backward_finish_kernel": sums,
        "block_end_kernel": 1 + 2 * prologues + (added if make is BasicBlock else 0),
    }


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@slow
def test_a_network(name, dtype):
    torch.manual_seed(0)
    model = randomize(getattr(fr, name)(num_classes=10))
    x = image(2, 3, 64, 64, dtype=torch.float32)
    kernels = assert_trained_as_exactly("cuda", model, x, dtype)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    ours = sum(conv.stride == (1, 1) for conv in convs)
    assert kernels.count("conv_bn_add_relu_kernel") == len(convs) + ours
    assert kernels.count("bn_backward_kernel") == len(convs)


def test_the_primitives_as_functions():
    """Where the backend is forced they are CUDA's, the stem's ends PyTorch's."""
    x, w = image(1, 8, 5, 5, dtype=torch.float32), image(8, 8, 3, 3, dtype=torch.float32)
    ones = torch.ones(8)
    with emulation.emulated("cuda"):
        found = primitives_of("cuda")
        assert found.conv_forward is OPERATORS["cuda"].conv_forward.default
        assert found.stem_end is OPERATORS["library"].stem_end.default
        z, mean, _ = training.conv_forward(x, None, None, w, (1, 1), (1, 1), (1, 1), 1, True, False)
        training.stem_end(z, ones, ones, (3, 3), (2, 2), (1, 1))
        kernels = [launch.kernel for launch in emulation._simulator().launches()]
    assert len(kernels) == 2  # the convolution, and the end of its statistics
    torch.testing.assert_close(mean, z.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)


def test_a_forced_unit_needs_no_times(monkeypatch):
    """Under auto it is one of three, and only where Triton runs; forced it is all of it."""
    x = torch.zeros(1, 1, 1, 1)
    monkeypatch.setattr(training_tuned, "resolve_backend", lambda op, x: "cuda")
    monkeypatch.setattr(training_tuned, "_triton_runs", lambda device: True)
    for mode, expected in (("1", training_tuned.TUNED), ("0", "")):
        monkeypatch.setenv("FUSED_RESNET_TUNE", mode)
        assert training_tuned.unit_backend(x) == expected
        with availability._forced("cuda"):
            assert training_tuned.unit_backend(x) == "cuda"


def test_the_candidate_of_auto(monkeypatch):
    """Its convolutions beside PyTorch's passes: the numbers of a unit that is all CUDA's."""
    pytest.importorskip("triton.language", reason="Triton is not installed")
    ones = (1, 1)
    layer = Layer(ones, ones, ones, 1, 2.0**-10, 0.25, True)

    def step(backend: str) -> list[torch.Tensor]:
        x = image(2, 16, 6, 5, dtype=torch.float32).requires_grad_()
        leaves = [
            (image(16, 16, 3, 3, seed=i, dtype=torch.float32) / 12).requires_grad_() for i in (1, 2)
        ]
        held = [
            LayerTensors(w, torch.ones(16), None, torch.zeros(16), torch.ones(16), torch.tensor(3))
            for w in leaves
        ]
        y = training_unit(Unit((layer, layer), "identity", backend=backend), x, None, held)
        y.square().sum().backward()
        return [y.detach(), *(t.grad for t in (x, *leaves)), *held[0][3:], *held[1][3:]]

    with emulation.emulated("cuda"), torch.backends.cudnn.flags(allow_tf32=False):
        expected = step("cuda")
    caches = (training_tuned._tuned, training_tuned._candidates)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(tuner, "choose", lambda *_: "cuda")
    try:
        with (
            emulation.operators("triton"),
            emulation.emulated("cuda"),
            torch.backends.cudnn.flags(allow_tf32=False),
        ):
            found = step(training_tuned.TUNED)
            kernels = [launch.kernel for launch in emulation._simulator().launches()]
    finally:
        for cache in caches:
            cache.cache_clear()
    assert sum("conv_bn_add_relu_kernel" in name for name in kernels) == 4
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
