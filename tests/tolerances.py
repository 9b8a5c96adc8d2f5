"""Tolerances against float64, and the comparison with PyTorch's own error."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

#: (rtol, atol) of single elements against float64, for sums of up to thousands of terms.
TOLERANCES = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (2e-5, 2e-5),
    torch.float16: (4e-3, 4e-3),
    torch.bfloat16: (3e-2, 3e-2),
}

#: The fused error may be this much larger than PyTorch's own, both against float64.
RATIO = 1.5


#: Terms that a tensor core adds to its accumulator at a time, for tf32 (mma.m16n8k8).
TF32_STEP = 8


def tf32_bound(depth: int) -> float:
    """Relative L2 error of a sum of tf32 products, against float64's sum of the same products.

    Products of two 11-bit significands are exact in float32. A tensor core truncates each partial
    sum, where a float32 unit rounds it: up to one unit in the last place, 2^-23 of the partial sum,
    always towards zero, so errors add up over the ``depth / 8`` steps. Partial sums of random terms
    grow with the square root of their number, hence the 2/3: 5.7e-6 at a depth of 576, 4.6e-5 at
    4,608, where about a third of it was seen; rounding the operands wrongly costs 2.4e-4.

    Args:
        depth: Number of products in a sum; 0 for arithmetic that rounds to nearest.
    """
    return 1e-6 + 2 / 3 * depth / TF32_STEP * 2.0**-23


def error(result: Tensor, truth: Tensor) -> float:
    """Relative L2 distance."""
    scale = truth.double().norm().item() or 1.0
    return (result.double() - truth.double()).norm().item() / scale


def assert_as_exact_as_pytorch(result: Tensor, eager: Tensor, truth: Tensor) -> None:
    """``result`` is as near to float64 as PyTorch's own run, and each element is near enough.

    Where a float32 error is within the last place, a single bit decides the ratio and says nothing.
    Half precision rounds but once, which must show: truncation would double its error. In float64
    the truth is PyTorch's own run, and the elements' tolerance alone decides.
    """
    assert result.dtype == eager.dtype
    assert result.shape == truth.shape
    rtol, atol = TOLERANCES[result.dtype]
    torch.testing.assert_close(result.double(), truth.double(), rtol=rtol, atol=atol)
    if result.dtype is torch.float64:
        return
    ours, theirs = error(result, truth), error(eager, truth)
    rounding = torch.finfo(torch.float32).eps if result.dtype is torch.float32 else 0.0
    assert ours <= max(RATIO * theirs, rounding), f"error {ours:.2e}, PyTorch's own {theirs:.2e}"
