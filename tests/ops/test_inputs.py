"""Views, non-finite values, empty batches, and the same bits on any number of threads."""

from __future__ import annotations

import pytest
import torch
from cases import FORMATS, batch_norm, normal
from operation_cases import (
    dtypes,
    formats,
)

import fused_resnet as fr
from fused_resnet import ops, reference


def views(shape, dtype):
    n, c, h, w = shape
    big = normal(n + 1, c + 3, h + 2, w * 2, dtype=dtype)
    yield "sliced", big[1:, 2:-1, 1:-1, ::2]
    yield "transposed", normal(n, c, w, h, dtype=dtype).transpose(2, 3)
    yield "expanded", normal(1, c, h, w, dtype=dtype).expand(n, c, h, w)
    yield (
        "batch-sliced channels_last",
        normal(2 * n, c, h, w, dtype=dtype).contiguous(memory_format=torch.channels_last)[::2],
    )


@pytest.mark.parametrize("which", range(4), ids=["sliced", "transposed", "expanded", "batch"])
def test_views_give_the_results_of_their_copies(which):
    shape = (2, 12, 6, 5)
    _, x = list(views(shape, torch.float32))[which]
    _, r = list(views(shape, torch.float32))[which]
    w, bn = normal(12, 12, 3, 3, dtype=torch.float32), batch_norm(12, torch.float32)
    assert not x.is_contiguous()
    before = x.clone()
    pairs = [
        (ops.bn_add_relu(x, *bn, r), reference.bn_add_relu(x.clone(), *bn, r.clone())),
        (
            ops.conv_bn_add_relu(x, w, *bn, r, padding=1),
            reference.conv_bn_add_relu(x.clone(), w, *bn, r.clone(), padding=1),
        ),
    ]
    for result, expected in pairs:
        torch.testing.assert_close(result, expected, rtol=2e-5, atol=2e-5)
    assert torch.equal(x, before)


def test_nothing_outside_the_result_is_written():
    """The input is a view of a buffer of sentinels, with odd sizes; the buffer is unchanged."""
    buffer = torch.full((3, 9, 11, 21), 7.0).contiguous(memory_format=torch.channels_last)
    x = buffer[1:2, :, 1:10, 3:18]
    w, bn = normal(33, 9, 3, 3, dtype=torch.float32), batch_norm(33, torch.float32)
    y = ops.conv_bn_add_relu(x, w, *bn, padding=1)
    assert torch.equal(buffer, torch.full_like(buffer, 7.0))
    assert y.shape == (1, 33, 9, 15)


@formats
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_pass_through(fmt, value):
    """A non-finite value reaches the same outputs as in PyTorch, and no others."""
    x = normal(2, 16, 9, 9, dtype=torch.float32)
    x[1, 3, 4, 5] = value
    x = x.contiguous(memory_format=FORMATS[fmt])
    w, bn = normal(20, 16, 3, 3, dtype=torch.float32), batch_norm(20, torch.float32)
    bn16 = batch_norm(16, torch.float32)
    pairs = [
        (ops.bn_add_relu(x, *bn16), reference.bn_add_relu(x, *bn16)),
        (
            ops.bn_add_relu(x, *bn16, training=True),
            reference.bn_add_relu(x, *bn16, training=True),
        ),
        (
            ops.conv_bn_add_relu(x, w, *bn, padding=1),
            reference.conv_bn_add_relu(x, w, *bn, padding=1),
        ),
        (
            ops.conv_bn_relu_maxpool(x, w, *bn, padding=1),
            reference.conv_bn_relu_maxpool(x, w, *bn, padding=1),
        ),
    ]
    for result, expected in pairs:
        torch.testing.assert_close(result, expected, rtol=2e-5, atol=5e-5, equal_nan=True)


@formats
def test_empty_batch(fmt):
    x = torch.empty(0, 8, 6, 6).contiguous(memory_format=FORMATS[fmt])
    w, bn8, bn12 = torch.randn(12, 8, 3, 3), batch_norm(8, torch.float32), batch_norm(12, x.dtype)
    assert ops.bn_add_relu(x, *bn8).shape == (0, 8, 6, 6)
    assert ops.conv_bn_add_relu(x, w, *bn12, padding=1).shape == (0, 12, 6, 6)
    assert ops.conv_bn_relu_maxpool(x, w, *bn12, padding=1).shape == (0, 12, 2, 2)


# Determinism


@dtypes
def test_same_bits_on_any_number_of_threads(dtype):
    x = normal(3, 40, 33, 31, dtype=dtype).contiguous(memory_format=torch.channels_last)
    w, bn = normal(72, 40, 3, 3, dtype=dtype), batch_norm(72, dtype)
    bn40 = batch_norm(40, dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            running = [t.clone() for t in bn40]
            # The shipped table of times may choose another backend for another number of threads.
            with fr.use_backend("cpu"):
                results.append(
                    [
                        ops.conv_bn_add_relu(x, w, *bn, padding=1),
                        ops.conv_bn_relu_maxpool(x, w, *bn, padding=1),
                        ops.bn_add_relu(x, *running, training=True),
                        *running,
                    ]
                )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)
