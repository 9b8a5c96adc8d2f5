"""Which stems CUDA's kernel leaves to a convolution and a max-pool."""

from __future__ import annotations

from cases import Conv
from precisions import FLOAT16, FLOAT32
from shapes import STEMS
from stem_operands import check


def test_filters_that_do_not_fit_shared_memory_go_in_two_steps(simt):
    check(simt, Conv("too-deep", (1, 128, 9, 9), 8, (3, 3)), FLOAT16, fused=False)


def test_strict_float32_goes_in_two_steps(simt):
    """It cannot use the tensor cores that the kernel is written for."""
    check(simt, STEMS[2], FLOAT32, fused=False)
