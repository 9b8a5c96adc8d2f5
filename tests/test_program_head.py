"""The head of a program: the average over all pixels and fully connected layers, on their own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import doubled, normal
from programs import Program
from tolerances import DTYPES, assert_as_exact_as_pytorch, error

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

#: Channels and map: vectors by fours, alone, a rest; more channels than a thread takes at a time.
MAPS = [(64, 7, 7), (37, 5, 3), (1, 4, 4), (100, 1, 1), (2048, 7, 7), (300, 41, 40)]
maps = pytest.mark.parametrize("shape", MAPS, ids=str)

#: Features and classes: whole vectors, a rest, less than a vector, several chains of additions on
#: every instruction set, rows that are no multiple of what a microkernel takes.
LAYERS = [(2048, 1000), (512, 10), (37, 29), (3, 5), (1, 1), (4101, 33)]
layers = pytest.mark.parametrize("sizes", LAYERS, ids=str)


def channels_last(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return normal(*shape, dtype=dtype, shift=0.1).contiguous(memory_format=torch.channels_last)


def mean(x: torch.Tensor) -> torch.Tensor:
    p = Program(x.shape[1], x.dtype)
    p.mean(0)
    return p.run(x)[0]


def layer(features: int, classes: int, dtype: torch.dtype, *, relu: bool = False) -> Program:
    p = Program(features, dtype)
    p.linear(0, classes, relu=relu)
    return p


@dtypes
@maps
def test_global_avg_pool(shape, dtype):
    x = channels_last(3, *shape, dtype=dtype)
    y = mean(x)
    assert y.shape == (3, shape[0], 1, 1)
    assert_as_exact_as_pytorch(y, F.adaptive_avg_pool2d(x, 1), doubled(x).mean((2, 3), True))


@dtypes
@pytest.mark.parametrize("batch", [1, 2, 13])
@layers
def test_linear(sizes, dtype, batch):
    p, x = layer(*sizes, dtype), normal(batch, sizes[0], 1, 1, dtype=dtype)
    y, rows = p.run(x)[0], x.flatten(1)
    truth = F.linear(*doubled((rows, *p.tensors)))
    assert y.shape == (batch, sizes[1])
    assert_as_exact_as_pytorch(y, F.linear(rows, *p.tensors), truth)


@dtypes
@layers
def test_a_result_does_not_depend_on_the_batch(sizes, dtype):
    """Nor on the threads: 70 images of 2048 features are in several blocks."""
    p, x = layer(*sizes, dtype), normal(70, sizes[0], 1, 1, dtype=dtype)
    alone = torch.cat([p.run(image)[0] for image in x.split(1)])
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        for batch in (1, 2, 5, 7, 17, 70):
            assert torch.equal(p.run(x[:batch])[0], alone[:batch]), (threads, batch)


@dtypes
def test_an_average_does_not_depend_on_the_batch(dtype):
    x = channels_last(17, 300, 7, 6, dtype=dtype)
    alone = torch.cat([mean(image) for image in x.split(1)])
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        for batch in (1, 2, 5, 17):
            assert torch.equal(mean(x[:batch]), alone[:batch]), (threads, batch)


def test_a_long_average_keeps_float32s_accuracy():
    """A single chain of 40000 additions would lose three digits."""
    x = channels_last(1, 32, 200, 200, dtype=torch.float32) + 100
    assert error(mean(x), doubled(x).mean((2, 3), True)) < 2e-7


@dtypes
def test_relu(dtype):
    p = layer(37, 29, dtype, relu=True)
    x = normal(3, 37, 1, 1, dtype=dtype)
    y = p.run(x)[0]
    p.steps[4] = 0
    without = p.run(x)[0]
    assert (without < 0).any()
    assert torch.equal(y, without.relu())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_image(value):
    p = layer(40, 33, torch.float32)
    x = normal(9, 40, 1, 1, dtype=torch.float32)
    clean = p.run(x)[0]
    x[4, 39] = value
    y = p.run(x)[0]
    assert torch.equal(y[:4], clean[:4])
    assert torch.equal(y[5:], clean[5:])
    assert not y[4].isfinite().any()


@dtypes
@pytest.mark.parametrize("pool", ["max_pool", "avg_pool"])
def test_a_pool_passes_what_is_not_a_number(pool, dtype):
    p = Program(21, dtype)
    getattr(p, pool)(0, 3, 2, 1)
    x = channels_last(2, 21, 9, 8, dtype=dtype)
    x[1, 20, 3, 3] = torch.nan
    y, expected = p.run(x)[0], p.one_by_one(x)[1]
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(), expected.nan_to_num())
