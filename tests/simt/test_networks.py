"""Whole ResNets with every convolution run by CUDA's kernels, executed on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import image, randomize
from precisions import PRECISIONS, Precision
from tolerances import RATIO, error
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.inference import frozen_conv, lowered
from fused_resnet.ops import packed as packed_ops
from fused_resnet.ops.registry import OPERATORS

SIZE = 64
FLOAT16, BFLOAT16 = PRECISIONS[:2]


def networks(quick: dict[str, Precision], *others: str) -> pytest.MarkDecorator:
    """Networks in the precision that `make test` runs each in; all else is for `make test-all`."""
    params = [
        pytest.param(
            name, half, id=f"{name}-{half}",
            marks=() if quick.get(name) is half else pytest.mark.slow,
        )
        for name in (*quick, *others)
        for half in (FLOAT16, BFLOAT16)
    ]  # fmt: skip
    return pytest.mark.parametrize(("name", "precision"), params)


@pytest.fixture
def on_simulator(simt, monkeypatch) -> Any:
    """The operations' calls go to the simulator; the package itself knows nothing of it."""
    for backend in ("cpu", "cuda"):
        monkeypatch.setitem(OPERATORS, backend, simt.ops)
    return simt


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomize(getattr(fr, name)(num_classes=100)).eval()


def launched(simt: Any) -> dict[str, int]:
    """How often each kernel ran, by its name without arguments."""
    counts: dict[str, int] = {}
    for launch in simt.launches():
        name = launch.kernel.partition("<")[0].partition("(")[0].rpartition("::")[2].split()[-1]
        counts[name] = counts.get(name, 0) + 1
    return counts


def logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x.contiguous(memory_format=torch.channels_last))


def check(simt: Any, name: str, precision: Precision) -> dict[str, int]:
    """Logits within 1.5 times the error of PyTorch's own run in that dtype."""
    model, x = network(name), image(1, 3, SIZE, SIZE, dtype=precision.dtype)
    with fr.use_backend("reference"):
        # The same rounded weights in all three.
        model.to(precision.dtype)
        eager = logits(model, x)
        truth = logits(copy.deepcopy(model).double(), x.double())
    simt.launches()
    ours = logits(model, x)
    own, theirs = error(ours, truth), error(eager, truth)
    assert own <= RATIO * theirs, f"error {own:.2e}, PyTorch's own {theirs:.2e}"
    return launched(simt)


def convolutions(model: nn.Module) -> int:
    return sum(isinstance(m, nn.Conv2d) for m in model.modules())


# The others repeat the blocks of these two.
@networks({"resnet18": FLOAT16, "resnet50": BFLOAT16}, "resnet34", "resnet101", "resnet152")
def test_every_convolution_of_the_family(on_simulator, name, precision):
    counts = check(on_simulator, name, precision)
    finished = counts.pop("conv_split_finish_kernel", 0)
    assert finished > 0  # maps of 2x2 pixels cannot fill a card without a split
    assert counts.pop("conv_bn_relu_maxpool_kernel") == 1
    assert counts == {"conv_bn_add_relu_kernel": convolutions(network(name)) - 1}


@pytest.fixture
def as_cuda(on_simulator, monkeypatch) -> Any:
    """Frozen modules take the ways that they have for tensors on CUDA."""
    monkeypatch.setattr(frozen_conv, "packed_dtype", lambda dtype, device: dtype)
    for module in (packed_ops, lowered):
        monkeypatch.setattr(module, "resolve_backend", lambda op, x: "cuda")
    # The head is PyTorch's there.
    monkeypatch.setattr(packed_ops, "global_avg_pool", lambda x: F.adaptive_avg_pool2d(x, 1))
    monkeypatch.setattr(packed_ops, "linear", lambda x, w, b: F.linear(x.flatten(1), w, b))
    return on_simulator


#: Kernels of a frozen network: (convolutions alone, ends of blocks on chip). Of ResNet-50's 16
#: bottlenecks 7 are in stages 1 and 2; the first of each stage has a shortcut, which shares a
#: kernel with the last 1x1 instead.
FROZEN = {"resnet18": (16, 0), "resnet50": (38, 5)}


@networks({"resnet18": BFLOAT16, "resnet50": FLOAT16})
def test_frozen(as_cuda, name, precision):
    model, x = network(name), image(1, 3, SIZE, SIZE, dtype=precision.dtype)
    frozen = fr.freeze(model, precision.dtype)
    as_cuda.launches()
    ours = logits(frozen, x)
    with fr.use_backend("reference"):
        truth = logits(copy.deepcopy(model).double(), x.double())
        eager = logits(model.to(precision.dtype), x)
    own, theirs = error(ours, truth), error(eager, truth)
    assert own <= RATIO * theirs, f"error {own:.2e}, PyTorch's own {theirs:.2e}"
    counts = launched(as_cuda)
    counts.pop("conv_split_finish_kernel", 0)
    alone, on_chip = FROZEN[name]
    expected = {"conv_bn_relu_maxpool_kernel": 1, "conv_bn_add_relu_kernel": alone}
    assert counts == expected | ({"residual_block_kernel": on_chip} if on_chip else {})


def test_frozen_float32_is_strict_where_tf32_is_off(as_cuda):
    model, x = network("resnet18"), image(1, 3, SIZE, SIZE, dtype=torch.float32)
    frozen = fr.freeze(model)
    with fr.use_backend("reference"):
        truth = logits(copy.deepcopy(model).double(), x.double())
    errors = {}
    for precision in PRECISIONS[2:]:
        with precision.set():
            errors[precision.name] = error(logits(frozen, x), truth)
    assert errors["float32"] < 5e-6
    assert 1e-4 < errors["tf32"] < 5e-3
