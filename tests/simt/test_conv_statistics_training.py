"""Training with the convolution's own statistics: gradients through CUDA's kernels on the CPU."""

from __future__ import annotations

import pytest
import torch
from cases import Conv, batch_norm, conv_weight, normal
from precisions import PRECISIONS
from tolerances import assert_as_exact_as_pytorch, error

from fused_resnet import ops, reference
from fused_resnet.ops import functional

CASES = [
    Conv("3x3", (2, 16, 7, 6), 24, args={"padding": 1}),
    Conv("no-packs-stride2", (2, 5, 7, 6), 7, args={"stride": 2, "padding": 1}),
]


@pytest.fixture
def on_simulator(simt, monkeypatch):
    """The package's own operators, with the simulator in the place of a CUDA device."""
    library = torch.library.Library("fused_resnet", "IMPL")
    library.impl("conv_statistics", simt.ops.conv_statistics.default, "CPU")
    monkeypatch.setattr(functional, "resolve_backend", lambda op, x: "cuda")
    monkeypatch.setattr(functional, "current_backend", lambda: "cuda")
    yield simt
    library._destroy()


@pytest.mark.parametrize("precision", PRECISIONS[:2] + PRECISIONS[3:], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_step(on_simulator, case, precision):
    """Result, running statistics and every gradient, to PyTorch's own error."""
    dtype = precision.dtype
    x, weight = normal(*case.x, dtype=dtype), conv_weight(case, dtype)
    gamma, beta, mean, var = batch_norm(case.k, dtype)

    def step(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        affine = [t.to(wide).requires_grad_() for t in (gamma, beta)]
        running = [t.to(wide, copy=True) for t in (mean, var)]
        y = function(*leaves, *affine, *running, training=True, momentum=0.3, **case.args)
        torch.manual_seed(5)
        y.backward(normal(*y.shape, dtype=dtype))
        return y.detach(), running, [t.grad for t in (*leaves, *affine)]

    truth = step(reference.conv_bn_add_relu, torch.float64)
    eager = step(reference.conv_bn_add_relu, dtype)
    with precision.set():
        ours = step(ops.conv_bn_add_relu, dtype)
    assert_as_exact_as_pytorch(ours[0], eager[0], truth[0])
    for mine, exact in zip(ours[1], truth[1], strict=True):
        # Statistics are those of the rounded convolution.
        assert error(mine, exact) < (1e-6 if dtype is torch.float32 else 2e-2)
    for mine, theirs, exact in zip(ours[2], eager[2], truth[2], strict=True):
        assert error(mine, exact) <= 1.5 * max(error(theirs, exact), 1e-7)
    names = [launch.kernel for launch in on_simulator.launches()]
    assert any("conv_statistics_kernel" in name for name in names)
