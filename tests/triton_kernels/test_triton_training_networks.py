"""Blocks and whole ResNets trained by Triton's primitives, in the hardened interpreter.

Maps are in half precision by autocast, parameters and statistics in float32. A gradient may be 1.5
times as far from float64 as PyTorch's own, over all parameters together: which element's ReLU turns
by rounding is chance, and alike for both.
"""

from __future__ import annotations

import copy

import emulation
import pytest
import torch
from networks import image, randomize
from tolerances import RATIO
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.nn import BasicBlock, Bottleneck

HALVES = [torch.bfloat16, torch.float16]
slow = pytest.mark.slow


def gradients(model: nn.Module, x: Tensor, backend: str, autocast: torch.dtype | None) -> dict:
    """The result, all gradients, and the running statistics after a step."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    with (
        fr.use_backend(backend) if backend != "triton" else emulation.emulated("triton"),
        torch.autocast("cpu", autocast, enabled=autocast is not None),
    ):
        y = model(x)
        (y.double() * image(*y.shape, seed=3)).sum().backward()
        kernels = [n.kernel for n in emulation._interpreter().launches()]
    found = {"y": y.detach(), "x": x.grad}
    found |= {k: p.grad for k, p in model.named_parameters()}
    found |= {k: b.clone() for k, b in model.named_buffers() if "running" in k}
    counters = {k: int(b) for k, b in model.named_buffers() if not b.is_floating_point()}
    return {"found": found, "kernels": kernels, "counters": counters}


def distance(found: dict, truth: dict, names: list[str]) -> float:
    """Root mean square of the relative errors."""
    errors = [
        ((found[k].double() - truth[k]).norm() / truth[k].norm().clamp(min=1e-12)).item()
        for k in names
    ]
    return sum(e * e for e in errors) ** 0.5 / len(errors) ** 0.5


def assert_as_exact_as_pytorch(exact: nn.Module, x: Tensor, dtype: torch.dtype) -> list[str]:
    """Trains three copies of a model one step; the kernels that ran."""
    with torch.no_grad():
        for p in exact.parameters():  # so that casting them is no part of the error
            p.copy_(p.to(dtype))
    exact = exact.double().train()
    eager, ours = (copy.deepcopy(exact).float() for _ in range(2))
    x = x.contiguous(memory_format=torch.channels_last)
    truth = gradients(exact, x.double(), "reference", None)
    theirs = gradients(eager, x, "reference", dtype)
    found = gradients(ours, x, "triton", dtype)
    assert found["counters"] == truth["counters"]
    for name, value in theirs["found"].items():
        assert found["found"][name].dtype is value.dtype, name
    for part in ("statistics", "gradients"):
        names = [k for k in truth["found"] if ("running" in k) == (part == "statistics")]
        a, b = (distance(run["found"], truth["found"], names) for run in (found, theirs))
        print(f"{part}: {a:.2e}, PyTorch's own {b:.2e}")
        assert a <= RATIO * b, f"{part}: error {a:.2e}, PyTorch's own {b:.2e}"
    return found["kernels"]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("make", [BasicBlock, Bottleneck])
def test_a_block(make, stride):
    """Both halves take turns; identity and projection; no kernel of PyTorch's between them."""
    torch.manual_seed(0)
    width = 16 * make.expansion
    side = None
    if stride == 2:
        conv = nn.Conv2d(width, 2 * width, 1, 2, bias=False)
        side = nn.Sequential(conv, nn.BatchNorm2d(2 * width))
    block = make(width, 16 * stride, stride, side)
    dtype = HALVES[stride - 1]
    kernels = assert_as_exact_as_pytorch(
        randomize(block), image(2, width, 9, 7, dtype=dtype), dtype
    )
    convs = sum(isinstance(module, nn.Conv2d) for module in block.modules())
    assert kernels.count("conv_data_gradient_kernel") == convs
    assert kernels.count("conv_weight_gradient_kernel") == convs
    # Batch norm's numbers: none beside the kernel that finishes the statistics, one in backward.
    assert kernels.count("conv_statistics_kernel") == convs
    assert kernels.count("bn_coefficients_kernel") == 0
    assert kernels.count("bn_update_running_kernel") == 0
    assert kernels.count("bn_backward_coefficients_kernel") == convs
    assert kernels.count("block_end_kernel") == 1
    assert kernels.count("block_end_backward_kernel") == 1


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param("resnet18", torch.bfloat16, id="resnet18-bfloat16", marks=slow),
        pytest.param("resnet18", torch.float16, id="resnet18-float16", marks=slow),
        pytest.param("resnet50", torch.bfloat16, id="resnet50-bfloat16", marks=slow),
        pytest.param("resnet50", torch.float16, id="resnet50-float16", marks=slow),
    ],
)
def test_a_network(name, dtype):
    torch.manual_seed(0)
    model = randomize(getattr(fr, name)(num_classes=10))
    kernels = assert_as_exact_as_pytorch(model, image(2, 3, 64, 64, dtype=torch.float32), dtype)
    convs = 20 if name == "resnet18" else 53
    assert kernels.count("conv_bn_add_relu_kernel") == convs
    # The stem's weight has three channels: its gradient is PyTorch's, between passes.
    assert kernels.count("conv_weight_gradient_kernel") == convs - 1
    assert kernels.count("conv_data_gradient_kernel") == convs - 1
    assert kernels.count("stem_end_kernel") == kernels.count("stem_end_backward_kernel") == 1
