"""The strides of results with a single channel, row or column, where two formats are one memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from cases import normal
from torch import Tensor

import fused_resnet as fr

DOUBLE = torch.float64

#: Dimensions of one element in every place where they make a format ambiguous, and none.
SHAPES = [(2, 8, 1, 1), (2, 8, 5, 1), (2, 8, 1, 5), (2, 1, 5, 1), (2, 1, 5, 5), (1, 8, 5, 1),
          (2, 8, 3, 3)]  # fmt: skip


def layouts(n: int, c: int, h: int, w: int) -> Iterator[tuple[str, Tensor]]:
    last = torch.channels_last
    yield "contiguous", normal(n, c, h, w, dtype=DOUBLE)
    yield "channels_last", normal(n, c, h, w, dtype=DOUBLE).contiguous(memory_format=last)
    yield "from NHWC", normal(n, h, w, c, dtype=DOUBLE).permute(0, 3, 1, 2)
    yield "from NWHC", normal(n, w, h, c, dtype=DOUBLE).permute(0, 3, 2, 1)
    yield "from NCWH", normal(n, c, w, h, dtype=DOUBLE).transpose(2, 3)
    yield "from CNHW", normal(c, n, h, w, dtype=DOUBLE).transpose(0, 1)
    yield "channels sliced", normal(n, 2 * c, h, w, dtype=DOUBLE)[:, ::2]
    yield (
        "channels sliced, last",
        normal(n, 2 * c, h, w, dtype=DOUBLE).contiguous(memory_format=last)[:, ::2],
    )


def fresh_norm(channels: int) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(v, dtype=DOUBLE).repeat(channels) for v in (1.0, 0.0, 0.0, 1.0))


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_strides_are_those_of_batch_norm(shape, training) -> None:
    c = shape[1]
    for name, x in layouts(*shape):
        bn = fresh_norm(c)
        expected = F.relu(F.batch_norm(x, bn[2].clone(), bn[3].clone(), *bn[:2], training))
        with fr.use_backend("cpu"):
            y = fr.ops.bn_add_relu(x, *bn, training=training)
        torch.testing.assert_close(y, expected)
        assert y.stride() == expected.stride(), (name, x.stride())


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_strides_are_those_of_convolution_and_batch_norm(shape, kernel, training) -> None:
    c = shape[1]
    for name, x in layouts(*shape):
        weight = normal(6, c, kernel, kernel, dtype=DOUBLE)
        bn = fresh_norm(6)
        z = F.conv2d(x, weight, padding=kernel // 2)
        expected = F.relu(F.batch_norm(z, bn[2].clone(), bn[3].clone(), *bn[:2], training))
        with fr.use_backend("cpu"):
            y = fr.ops.conv_bn_add_relu(x, weight, *bn, padding=kernel // 2, training=training)
        torch.testing.assert_close(y, expected)
        assert y.stride() == expected.stride(), (name, x.stride())


def test_gradients_pass_through_the_strides() -> None:
    bn = fresh_norm(8)
    x = normal(2, 5, 1, 8, dtype=DOUBLE).permute(0, 3, 1, 2)[..., :1].requires_grad_()
    with fr.use_backend("cpu"):
        assert torch.autograd.gradcheck(
            lambda x: fr.ops.bn_add_relu(x, *(t.clone() for t in bn), training=True), (x,)
        )
