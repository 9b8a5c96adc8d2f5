"""The weights of training convolutions in every layout, and in float32 beside maps of 16 bits."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import Conv
from networks import image
from test_convolutions import FEW
from torch import Tensor
from training_blocks import basic
from training_cases import Backward, backward_of, coarse, convolve, geometry, vectors_of

import fused_resnet as fr

OPS = torch.ops.fused_resnet
LAYOUTS = {
    "contiguous": lambda w: w.contiguous(),
    "channels_last": lambda w: w.contiguous(memory_format=torch.channels_last),
    "of its transpose": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    "with gaps": lambda w: torch.cat([w, w], 3)[..., : w.shape[3]],
}
WINOGRAD = next(case for case in FEW if str(case) == "cifar-3x3")
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
cases = pytest.mark.parametrize("case", FEW, ids=str)


def results(operands: Backward, w: Tensor, args: dict) -> list[Tensor]:
    """What does not depend on the layout of the weight: z, then both gradients."""
    z, _, _ = OPS.conv_forward(operands.x, *operands.bn[:2], w, *args.values(), False, True)
    found = operands._replace(w=w).run(winograd=True, **args)
    return [z, found.g_x, found.dw]


@layouts
@cases
def test_layouts(case, layout) -> None:
    operands, args = backward_of(case, torch.float32, "prologue"), geometry(case)
    w = layout(operands.w)
    found = results(operands, w, args)
    assert found[2].stride() == torch.empty_like(w).stride()
    for ours, theirs in zip(found, results(operands, operands.w, args), strict=True):
        torch.testing.assert_close(ours, theirs)


# Squares of every instruction set, and what is left of them: in channels, in taps, in both,
# and behind the last filter.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", [(3, 3), (1, 3), (5, 5), (7, 7)], ids=str)
@pytest.mark.parametrize("channels", [3, 16, 24, 37])
def test_filters_and_gradients_of_every_size(channels, kernel, dtype) -> None:
    g = torch.Generator().manual_seed(3)
    x = coarse(2, channels, 8, 8, dtype=dtype).contiguous(memory_format=torch.channels_last)
    w = torch.randn(5, channels, *kernel, generator=g).to(vectors_of(dtype))
    args = geometry(Conv("", x.shape, 5, kernel, {"padding": (kernel[0] // 2, kernel[1] // 2)}))
    dz = coarse(2, 5, 8, 8, dtype=dtype).contiguous(memory_format=torch.channels_last)
    ones = torch.ones(5, dtype=vectors_of(dtype))

    def run(w: Tensor) -> tuple[Tensor, Tensor]:
        z = OPS.conv_forward(x, None, None, w, *args.values(), False, False)[0]
        wanted = (False, True, False, False)
        found = OPS.conv_backward(
            dz, None, ones, None, None, x, None, None, None, w, None, *args.values(), *wanted
        )
        return z, found[1]

    z, dw = run(w)
    expected, of_weight = run(w.contiguous(memory_format=torch.channels_last))
    assert torch.equal(z, expected)
    assert torch.equal(dw, of_weight)
    truth = convolve(x.double(), w.to(dtype).double(), None, **args)
    assert (z - truth).norm() / truth.norm() < 1e-2  # filters in another order are not near


@layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@cases
def test_a_float32_weight_is_rounded_and_its_gradient_is_not(case, dtype, layout) -> None:
    operands, args = backward_of(case, dtype, "prologue"), geometry(case)
    g = torch.Generator().manual_seed(7)
    w = layout(operands.w.float() * (1 + torch.rand(operands.w.shape, generator=g) / 64))
    z, g_x, dw = results(operands, w, args)
    rounded = results(operands, layout(w.to(dtype)), args)
    assert torch.equal(z, rounded[0])
    assert torch.equal(g_x, rounded[1])
    assert dw.dtype is torch.float32
    assert torch.equal(dw.to(dtype), rounded[2])
    if case is WINOGRAD:  # whose gradient is PyTorch's in no dtype and on no instruction set
        assert not torch.equal(dw.to(dtype).float(), dw)


def test_autocast_keeps_no_rounded_weight() -> None:
    """What is saved of a weight is the parameter."""
    block = basic().float()
    fused = fr.fuse(copy.deepcopy(block))
    kept: list[torch.dtype] = []

    def pack(t: Tensor) -> Tensor:
        if t.dim() == 4 and t.shape[2] == 3:
            kept.append(t.dtype)
        return t

    x = image(3, 8, 16, 16, dtype=torch.bfloat16)
    watch = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with torch.autocast("cpu", torch.bfloat16), watch:
        y = fused(x)
    assert kept == [torch.float32] * 2  # the parameters themselves
    y.float().square().sum().backward()
    assert fused.conv1.weight.grad.dtype is torch.float32
