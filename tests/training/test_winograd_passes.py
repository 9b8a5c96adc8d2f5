"""Winograd's algorithm in a training step's three directions, against plain PyTorch in float64."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import pytest
import torch
import warm_process
from torch import Tensor
from torch.nn import functional

import fused_resnet as fr

OPS = torch.ops.fused_resnet

#: Relative root mean square, of the storage type's own rounding where that is larger.
FORWARD, DATA_GRADIENT, WEIGHT_GRADIENT = 3e-6, 5e-6, 3e-6
STORED = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

#: (N, C, H, W), K
SHAPES = {
    # ResNet's and CIFAR's, whose maps are whole tiles and not.
    "64@56": ((2, 64, 56, 56), 64),
    "128@28": ((4, 128, 28, 28), 128),
    "256@14": ((8, 256, 14, 14), 256),
    "512@7": ((8, 512, 7, 7), 512),
    "16@32": ((8, 16, 32, 32), 16),
    "32@16": ((8, 32, 16, 16), 32),
    "64@8": ((16, 64, 8, 8), 64),
    # Sides of one tile and of none whole; a last panel of one vector on AVX-512; K more and less.
    "5x9": ((32, 48, 5, 9), 48),
    "two-rows": ((16, 128, 2, 29), 128),
    "3x3": ((32, 64, 3, 3), 48),
    "widening": ((3, 16, 19, 21), 80),
    "narrowing": ((3, 80, 19, 21), 16),
}
shapes = pytest.mark.parametrize("shape", SHAPES)


class Operands(NamedTuple):
    """Of one convolution, as conv_forward and conv_backward name them."""

    x: Tensor
    scale: Tensor
    shift: Tensor
    mean: Tensor
    w: Tensor
    g: Tensor
    z: Tensor
    a: Tensor
    b: Tensor
    c: Tensor

    def forward(self, prologue: bool, statistics: bool = True, winograd: bool = True) -> Any:
        scale, shift = (self.scale, self.shift) if prologue else (None, None)
        return OPS.conv_forward(
            self.x, scale, shift, self.w, [1, 1], [1, 1], [1, 1], 1, statistics, winograd
        )

    def backward(self, prologue: bool, add: Tensor | None = None, winograd: bool = True) -> Any:
        bn = (self.scale, self.shift, self.mean) if prologue else (None, None, None)
        gradient = (self.g, self.z, self.a, self.b, self.c)
        if not prologue:  # a batch norm in eval mode
            gradient = (self.g, None, self.a, None, None)
        geometry = ([1, 1], [1, 1], [1, 1], 1)
        return OPS.conv_backward(
            *gradient, self.x, *bn, self.w, add, *geometry, True, True, prologue, winograd
        )

    def map_input(self, prologue: bool) -> Tensor:
        """p(x) in float64."""
        x = self.x.double()
        return functional.relu(x * wide(self.scale) + wide(self.shift)) if prologue else x

    def map_gradient(self, prologue: bool) -> Tensor:
        """dz in float64."""
        dz = self.g.double() * wide(self.a)
        return dz + self.z.double() * wide(self.b) + wide(self.c) if prologue else dz


def wide(v: Tensor) -> Tensor:
    return v.double()[:, None, None]


def operands(shape: str, dtype: torch.dtype = torch.float32, fmt: Any = None) -> Operands:
    (n, c, h, w), k = SHAPES[shape]
    fmt = fmt or torch.channels_last

    def normal(*size: int) -> Tensor:
        return torch.randn(*size).to(dtype).contiguous(memory_format=fmt)

    # Eighths and halves, whose products are exact: ReLU then decides alike in float32 and float64.
    x = (torch.randn(n, c, h, w) * 8).round() / 8
    bn = torch.randint(1, 4, (c,)) / 2, torch.randint(-8, 9, (c,)) / 16, torch.randn(c)
    weight = normal(k, c, 3, 3) / (3 * c**0.5)
    return Operands(
        x.to(dtype).contiguous(memory_format=torch.channels_last), *bn, weight,
        *(normal(n, k, h, w).contiguous(memory_format=torch.channels_last) for _ in range(2)),
        *(torch.randn(3, k)),
    )  # fmt: skip


def distance(result: Tensor, exact: Tensor) -> float:
    return ((result.double() - exact).norm() / exact.norm()).item()


def assert_forward(o: Operands, prologue: bool) -> None:
    z, mean, var = o.forward(prologue)
    exact = functional.conv2d(o.map_input(prologue), o.w.double(), padding=1)
    assert distance(z, exact) < FORWARD + STORED[z.dtype]
    assert z.is_contiguous(memory_format=torch.channels_last)
    stored_var, stored_mean = torch.var_mean(z.double(), (0, 2, 3), correction=0)
    assert ((mean - stored_mean).abs() < 1e-6 * (stored_var.sqrt() + stored_mean.abs())).all()
    assert ((var - stored_var).abs() < 2e-6 * stored_var).all()


def assert_backward(o: Operands, prologue: bool) -> None:
    add = None if prologue else torch.randn_like(o.x)
    g_x, dw, sum_g, sum_g_xc = o.backward(prologue, add)
    x, dz = o.map_input(prologue), o.map_gradient(prologue)
    exact_x, exact_w, _ = torch.ops.aten.convolution_backward(
        dz, x, o.w.double(), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]
    )
    exact_x = exact_x.where(x > 0, 0) if prologue else exact_x + add.double()
    assert distance(g_x, exact_x) < DATA_GRADIENT + STORED[g_x.dtype]
    assert distance(dw, exact_w) < WEIGHT_GRADIENT + STORED[dw.dtype]
    assert dw.dtype == o.w.dtype
    assert dw.stride() == o.w.stride()
    if not prologue:
        return
    for result, factor in ((sum_g, 1), (sum_g_xc, o.x.double() - wide(o.mean))):
        terms = g_x.double() * factor
        size = terms.abs().sum((0, 2, 3))
        assert ((result - terms.sum((0, 2, 3))).abs() <= 5e-7 * size).all()


@shapes
@pytest.mark.parametrize("prologue", [True, False])
def test_forward(shape, prologue):
    assert_forward(operands(shape), prologue)


@shapes
@pytest.mark.parametrize("prologue", [True, False])
def test_backward(shape, prologue):
    assert_backward(operands(shape), prologue)


#: Weights that are kept transformed for the call and not; a last panel of one vector.
FEW = ("128@28", "512@7", "5x9")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("shape", FEW)
def test_narrow_storage(shape, dtype):
    assert_forward(operands(shape, dtype), True)
    assert_backward(operands(shape, dtype), True)


@pytest.mark.parametrize("shape", FEW)
def test_contiguous_weight(shape):
    o = operands(shape, fmt=torch.contiguous_format)
    assert_forward(o, True)
    assert_backward(o, True)


@pytest.mark.parametrize("shape", ["64@56", "256@14", "512@7", "5x9"])
def test_bits_do_not_depend_on_threads(shape):
    """Nor on what is in the scratch: the second call finds the first one's."""
    o = operands(shape)
    results = []
    for count in (1, 2, 3, 1):
        torch.set_num_threads(count)
        results.append((*o.forward(True), *o.backward(True)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@shapes
def test_winograd_is_taken_where_it_is_allowed(shape):
    """The two algorithms round differently, so equal bits would mean that one ran for both."""
    o = operands(shape)
    assert not torch.equal(o.forward(True)[0], o.forward(True, winograd=False)[0])
    mine, direct = o.backward(True), o.backward(True, winograd=False)
    assert not torch.equal(mine[0], direct[0])
    assert not torch.equal(mine[1], direct[1])


def test_statistics_of_a_large_mean():
    """A mean of a thousand deviations: without a pivot float32 sums of squares would cancel."""
    o = operands("64@8")
    o.x.fill_(1.0).add_(torch.randn_like(o.x) * 1e-3)
    assert_forward(o, False)


def test_no_statistics():
    o = operands("64@8")
    z, mean, var = o.forward(True, statistics=False)
    assert torch.equal(z, o.forward(True)[0])
    assert mean.numel() == var.numel() == 0


def test_nan_passes():
    """Into its tile, through ReLU and its mask; other images stay as they are."""
    o = operands("64@8")
    before = (o.forward(True)[0], o.backward(True)[0])
    o.x[3, 5, 4, 4] = float("nan")
    o.g[7, 9, 2, 2] = float("nan")
    z, g_x = o.forward(True)[0], o.backward(True)[0]
    assert z[3, :, 3:6, 3:6].isnan().all()
    assert g_x[7].isnan().any()
    others = torch.arange(o.x.size(0)) != 3
    assert torch.equal(z[others], before[0][others])
    assert torch.equal(g_x[3, 6:], before[1][3, 6:])
    # Where x is NaN the gradient is what it would be with the ReLU open.
    assert not g_x[3, 5, 4, 4].isnan()


@pytest.mark.thorough
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_instruction_sets(isa):
    """Chosen once in a process, so each has its own."""
    if isa not in fr.build_info()["isa_supported"]:
        pytest.skip(f"this machine does not support {isa}")
    script = (
        "import sys, torch; sys.path[:0] = ['tests', 'tests/training']\n"
        "import test_winograd_passes as t\n"
        "torch.manual_seed(0)\n"
        "for shape in ('64@8', '5x9', 'widening', '512@7'):\n"
        "    for prologue in (True, False):\n"
        "        t.assert_forward(t.operands(shape), prologue)\n"
        "        t.assert_backward(t.operands(shape), prologue)\n"
        "t.assert_forward(t.operands('5x9', torch.float16), True)\n"
        "t.assert_backward(t.operands('5x9', torch.bfloat16), True)\n"
    )
    run = warm_process.run(["-c", script], env=os.environ | {"FUSED_RESNET_ISA": isa}, timeout=600)
    assert run.returncode == 0, run.stderr
