"""How backends multiply, and how far from float64 each may be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from tolerances import assert_as_exact_as_pytorch, error, tf32_bound
from torch import Tensor


@dataclass(frozen=True)
class Precision:
    """A storage type, and for float32 whether products are tf32's."""

    name: str
    dtype: torch.dtype
    tf32: bool = False

    def __str__(self) -> str:
        return self.name

    @contextlib.contextmanager
    def set(self) -> Iterator[None]:
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = self.tf32
        try:
            yield
        finally:
            torch.backends.cudnn.allow_tf32 = before

    def operand(self, t: Tensor) -> Tensor:
        """What the products are made of, in float64."""
        if not self.tf32:
            return t.double()
        # To nearest, ties away from zero: half of the last bit that is kept is added to all.
        bits = t.contiguous().view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).view_as(t).double()

    def check(self, result: Tensor, eager: Tensor, truth: Tensor, depth: int = 0) -> None:
        """``truth`` is made of :meth:`operand`, ``eager`` is PyTorch's own run on the CPU.

        ``depth`` is that of the sums where a tensor core computes them, and 0 elsewhere.
        """
        if not self.tf32:
            assert_as_exact_as_pytorch(result, eager, truth)
            return
        # PyTorch has no tf32 on the CPU.
        assert result.dtype is torch.float32
        assert result.shape == truth.shape
        assert error(result, truth) < tf32_bound(depth)


def tensor_core_depth(backend, weight: Tensor) -> int:
    """The depth of a convolution's sums on a card; 0 in emulations, which round to nearest."""
    return weight[0].numel() if getattr(backend, "name", "") == "device" else 0


FLOAT16 = Precision("float16", torch.float16)
BFLOAT16 = Precision("bfloat16", torch.bfloat16)
TF32 = Precision("tf32", torch.float32, tf32=True)
FLOAT32 = Precision("float32", torch.float32)
FLOAT64 = Precision("float64", torch.float64)
#: Those of a GPU's kernels.
PRECISIONS = [FLOAT16, BFLOAT16, TF32, FLOAT32]
#: Those of the CPU's.
CPU_PRECISIONS = [FLOAT16, BFLOAT16, FLOAT32, FLOAT64]

precisions = pytest.mark.parametrize("precision", PRECISIONS, ids=str)
half_precisions = pytest.mark.parametrize("precision", PRECISIONS[:2], ids=str)
