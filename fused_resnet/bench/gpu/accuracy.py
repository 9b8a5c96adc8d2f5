"""How far from float64 a result may be: as PyTorch's own, and element by element.

Needs no built extension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cases import Row

#: The fused error may be this much larger than PyTorch's own, both against float64.
RATIO = 1.5

#: A relative error that is never held against a result: a bit in the last place of float32 decides
#: nothing, and sums over a batch are added in another order than PyTorch's. Tensor cores truncate
#: partial sums, by up to 2^-23 of each, 8 products at a time; for half precision that is below the
#: one rounding at the end.
FLOOR = {torch.float32: 2e-6, torch.float16: 1e-5, torch.bfloat16: 1e-5}

#: Of single elements, relative to themselves and to the root mean square of all: a few wrong ones
#: hardly change the error of millions.
ELEMENT = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def relative(result: Tensor, truth: Tensor) -> float:
    """Relative L2 distance, infinite where a result is not finite.

    Args:
        result: Any dtype.
        truth: float64, shape of ``result``.
    """
    scale = float(truth.norm()) or 1.0
    distance = float((result.double() - truth).norm()) / scale
    return distance if distance == distance else float("inf")


def worst(result: Tensor, truth: Tensor) -> float:
    """The largest distance of an element, over its size plus the root mean square of all.

    Args:
        result: Any dtype.
        truth: float64, shape of ``result``.
    """
    if not truth.numel():
        return 0.0
    typical = truth.square().mean().sqrt()
    distance = (result.double() - truth).abs() / (truth.abs() + typical + 1e-30)
    largest = float(distance.max())
    return largest if largest == largest else float("inf")


def check(
    results: Sequence[Tensor],
    eager: Sequence[Tensor],
    truths: Sequence[Tensor],
    dtype: torch.dtype,
    about: Row,
) -> Row:
    """A row of the kind ``check``: the worst of several results of one call.

    Args:
        results: Results of a backend.
        eager: Results of PyTorch in the same dtype, in the same order.
        truths: Results in float64, in the same order.
        dtype: Storage type of the maps.
        about: Keys of the row.
    """
    row: Row = {"kind": "check", **about, "status": "ok"}
    shares: list[tuple[float, float, float]] = []
    for i, (result, own, truth) in enumerate(zip(results, eager, truths, strict=True)):
        if result.shape != truth.shape:
            shapes = f"{list(result.shape)}, expected {list(truth.shape)}"
            return row | _wrong(f"result {i} has the shape {shapes}")
        limit = max(RATIO * relative(own, truth), FLOOR[dtype])
        shares.append((relative(result, truth), limit, worst(result, truth)))
    found, limit, _ = max(shares, key=lambda one: one[0] / one[1])
    largest = max(one[2] for one in shares)
    finite = found != float("inf")
    row |= {"error": found if finite else None, "limit": limit}
    row["worst"] = largest if largest != float("inf") else None
    if not found <= limit:
        row |= _wrong(f"relative error {found:.2e}, limit {limit:.2e}")
    elif not largest <= ELEMENT[dtype]:
        row |= _wrong(f"an element is off by {largest:.2e} of its size, limit {ELEMENT[dtype]:.0e}")
    return row


def _wrong(reason: str) -> dict[str, Any]:
    return {"status": "wrong", "reason": reason}
