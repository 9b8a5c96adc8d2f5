"""Whole ResNets with every operation run by Triton's kernels, in the hardened interpreter."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import image, randomize
from precisions import PRECISIONS, Precision
from tolerances import RATIO, error
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.ops.registry import OPERATORS

SIZE = 32
FLOAT16, BFLOAT16, TF32, FLOAT32 = PRECISIONS
slow = pytest.mark.slow


@pytest.fixture
def everywhere(interpreted, monkeypatch):
    """The operations' calls go to the interpreter; the package itself knows nothing of it."""
    monkeypatch.setitem(OPERATORS, "cpu", interpreted.ops)
    return interpreted


def logits(model: nn.Module, x: Tensor, backend: str) -> Tensor:
    with torch.no_grad(), fr.use_backend(backend):
        return model(x.contiguous(memory_format=torch.channels_last))


def check(interpreted, name: str, precision: Precision) -> dict[str, int]:
    """Logits within 1.5 times the error of PyTorch's own run. How often each kernel ran."""
    torch.manual_seed(0)
    model = randomize(getattr(fr, name)(num_classes=100)).eval().to(precision.dtype)
    x = image(1, 3, SIZE, SIZE, dtype=precision.dtype)
    eager = logits(model, x, "reference")
    truth = logits(copy.deepcopy(model).double(), x.double(), "reference")
    with precision.set():
        ours = logits(model, x, "cpu")
    own, theirs = error(ours, truth), error(eager, truth)
    rounding = 2e-3 if precision.tf32 else torch.finfo(torch.float32).eps
    assert own <= max(RATIO * theirs, rounding), f"error {own:.2e}, PyTorch's own {theirs:.2e}"
    counts: dict[str, int] = {}
    for launch in interpreted.launches():
        counts[launch.kernel] = counts.get(launch.kernel, 0) + 1
    counts.pop("conv_split_finish_kernel", None)
    return counts


@pytest.mark.parametrize(
    ("name", "precision", "convolutions"),
    [
        pytest.param("resnet18", BFLOAT16, 19, id="resnet18-bfloat16"),
        pytest.param("resnet18", FLOAT16, 19, id="resnet18-float16", marks=slow),
        pytest.param("resnet18", TF32, 19, id="resnet18-tf32", marks=slow),
        pytest.param("resnet18", FLOAT32, 19, id="resnet18-float32", marks=slow),
        pytest.param("resnet50", BFLOAT16, 52, id="resnet50-bfloat16", marks=slow),
    ],
)
def test_every_operation_of_a_network(everywhere, name, precision, convolutions):
    counts = check(everywhere, name, precision)
    assert counts == {
        "conv_bn_relu_maxpool_kernel": 1,
        "conv_bn_add_relu_kernel": convolutions,
    }
