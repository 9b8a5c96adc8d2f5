"""Triton's training kernels with activations other than ReLU, against float64.

Inference and ``bn_add_relu`` are in tests/conformance.
"""

from __future__ import annotations

import pytest
import torch
from cases import Conv
from precisions import BFLOAT16, FLOAT32
from tolerances import error
from training_cases import affine, coarse, geometry, weight_of, widened

from fused_resnet.backends import reference_training as reference
from fused_resnet.backends.activation import Activation

#: One that the gradients' kernels take, and one that is left to PyTorch's convolution.
CASES = [
    Conv("ours", (2, 24, 9, 8), 40, args={"stride": 2, "padding": 1}),
    Conv("theirs", (2, 16, 7, 6), 16, args={"padding": 1, "groups": 4}),
]
others = pytest.mark.parametrize("activation", [Activation.NONE, Activation.LEAKY_RELU])
precisions = pytest.mark.parametrize("precision", [FLOAT32, BFLOAT16], ids=str)


def near(results, truths, precision) -> None:
    """Within the rounding of sums in float32, or of operands and results in the storage type."""
    limit = 2e-6 if precision is FLOAT32 else 4e-3
    for result, truth in zip(results, truths, strict=True):
        assert result.shape == truth.shape
        assert not truth.numel() or error(result, truth) < limit


def last(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return coarse(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


@others
@precisions
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("pytorch", [True, False])
def test_convolutions(interpreted, case, precision, activation, pytorch):
    dtype, args = precision.dtype, list(geometry(case).values())
    x, w, bn = last(*case.x, dtype=dtype), weight_of(case, dtype), affine(case.x[1], dtype)
    forward = (x, *bn[:2], w, *args, True, False, activation)
    with precision.set():
        z, mean, var = interpreted.ops.conv_forward(*forward, pytorch=pytorch)
        truth = reference.conv_forward(*widened(forward))
        near((z, mean, var), (truth[0], *truth[1:]), precision)
        g, (a, b, c) = last(*z.shape, dtype=dtype), affine(case.k, dtype)
        backward = (g, z, a, b / 4, c / 4, x, *bn, w, None, *args, True, True, True, False)
        found = interpreted.ops.conv_backward(*backward, activation, pytorch=pytorch)
        near(found, reference.conv_backward(*widened(backward), activation), precision)


@others
@precisions
def test_the_end_of_a_block(interpreted, precision, activation):
    dtype, shape = precision.dtype, (2, 24, 5, 7)
    z, s, dy = (last(*shape, dtype=dtype) for _ in range(3))
    bn, side = affine(24, dtype), affine(24, dtype)
    forward = (z, *bn[:2], s, *side[:2], activation)
    y = interpreted.ops.block_end(*forward)
    near([y], [reference.block_end(*widened(forward))], precision)
    if not activation:
        return
    sums = (z, bn.mean, s, side.mean, True, activation)
    truth = reference.block_end_backward(*widened((dy, y, *sums)))
    near(interpreted.ops.block_end_backward(dy, y, *sums), truth, precision)
    again = interpreted.ops.block_end_backward_recomputed(
        dy, z, bn.mean, *bn[:2], s, side.mean, *side[:2], True, activation
    )
    near(again, truth, precision)


@others
@precisions
def test_the_end_of_a_stem(interpreted, precision, activation):
    dtype, pool = precision.dtype, ((3, 3), (2, 2), (1, 1))
    z, bn = last(2, 24, 9, 8, dtype=dtype), affine(24, dtype)
    y, index = interpreted.ops.stem_end(z, *bn[:2], *pool, activation)
    truth, places = reference.stem_end(*widened((z, *bn[:2])), *pool, activation)
    near([y], [truth], precision)
    if precision is FLOAT32:  # else values that differ may round to a tie
        assert torch.equal(index, places)
    dy = last(*y.shape, dtype=dtype)
    found = interpreted.ops.stem_end_backward(dy, index, z, *bn, *pool, True, activation)
    backward = (*widened((z, *bn)), *pool, True, activation)
    near(found, reference.stem_end_backward(dy.double(), index, *backward), precision)
