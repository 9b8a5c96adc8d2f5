"""run_program against single operations, bit for bit."""

from __future__ import annotations

import pytest
import torch
from cases import normal
from programs import Program, basic_block, bottleneck, head
from tolerances import DTYPES

from fused_resnet import _C

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def resnet(p: Program) -> None:
    x = p.conv(0, 16, 7, stride=2, pool=(3, 2, 1))
    x = basic_block(p, basic_block(p, x, 16, winograd=True), 32, 2, winograd=True)
    head(p, bottleneck(p, x, 8, 48, dilation=2, groups=2), 10)


def option_a(p: Program) -> None:
    """A CIFAR network's shortcuts without parameters."""
    x = p.conv(0, 16, winograd=True)
    x = basic_block(p, x, 16, winograd=True)
    r = p.zero_pad(x, 8, 2)
    x = p.conv(p.conv(x, 32, stride=2), 32, residual=r, winograd=True)
    head(p, x, 7)


def resnet_d(p: Program) -> None:
    """A deep stem, and an average pool in the shortcut."""
    x = p.max_pool(p.conv(p.conv(0, 12, stride=2), 20), 3, 2, 1)
    r = p.conv(p.avg_pool(x, 2, 2, 0), 40, 1, relu=False)
    x = p.conv(p.conv(x, 10, stride=2), 40, residual=r)
    p.avg_pool(x, 3, 1, 1)


def additions(p: Program) -> None:
    """An addition by itself, pools of numbers below zero, odd channels."""
    x = p.conv(0, 13, 1, relu=False)
    y = p.max_pool(x, 3, 1, 1)
    z = p.add(y, x, relu=False)
    p.add(p.max_pool(z, 2, 2, 1), p.avg_pool(z, 2, 2, 1))


def mlp(p: Program) -> None:
    """Layers behind the average, one of them with ReLU, none a multiple of a vector."""
    p.linear(p.linear(p.mean(p.conv(0, 37)), 29, relu=True), 5)


NETWORKS = {f.__name__: f for f in (resnet, option_a, resnet_d, additions, mlp)}
networks = pytest.mark.parametrize("network", NETWORKS)


def program(network: str, dtype: torch.dtype = torch.float32) -> Program:
    p = Program(3, dtype)
    NETWORKS[network](p)
    return p


def image(batch: int, dtype: torch.dtype = torch.float32, h: int = 37, w: int = 30):
    x = normal(batch, 3, h, w, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last)


def assert_bits(results, expected) -> None:
    assert len(results) == len(expected)
    for y, truth in zip(results, expected, strict=True):
        assert y.dtype is truth.dtype
        assert y.shape == truth.shape
        assert y.dim() != 4 or y.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(y, truth)


@dtypes
@networks
def test_the_bits_are_those_of_single_operations(network, dtype):
    """Each value as the only output, and all at once, when none may share memory."""
    p = program(network, dtype)
    for batch in (1, 2, 5):
        x = image(batch, dtype)
        given, values = x.clone(), p.one_by_one(x)
        for value in range(1, len(values)):
            assert_bits(p.run(x, [value]), values[value : value + 1])
        assert_bits(p.run(x, range(1, len(values))), values[1:])
        assert_bits(p.run(x, range(len(p), 0, -1)), values[:0:-1])
        assert torch.equal(x, given)


@networks
def test_any_memory_format(network):
    p = program(network)
    x = image(2)
    expected = p.run(x)
    sliced = torch.cat([x, x], 3)[..., : x.shape[3]]
    for other in (x.contiguous(), sliced, x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert_bits(p.run(other), expected)


@networks
def test_no_images(network):
    p = program(network)
    results, shapes = p.run(image(0), range(1, len(p) + 1)), p.one_by_one(image(1))[1:]
    assert [y.shape for y in results] == [(0, *y.shape[1:]) for y in shapes]


@dtypes
@networks
def test_any_number_of_threads_gives_the_same_bits(network, dtype):
    """More of them than processors too, and than there is work for."""
    p = program(network, dtype)
    for batch in (1, 5):
        x, results = image(batch, dtype), []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(p.run(x))
        for other in results[1:]:
            assert_bits(other, results[0])


# Micro-batches: maps of 17 images that fill the cache several times.


def wide(p: Program) -> list[int]:
    """Large maps and few products. Values read at once, late, and twice; two of them outputs."""
    x = p.conv(0, 64, 3)
    early = bottleneck(p, x, 16, 64)
    x = bottleneck(p, early, 16, 64)
    read = bottleneck(p, x, 16, 128, 2)
    x = p.conv(read, 64, 1)
    late = p.conv(early, 64, 1, stride=2, relu=False)
    x = p.add(x, late)
    x = p.zero_pad(p.max_pool(x, 3, 2, 1), 32, 1)
    x = p.conv(p.conv(x, 32, 1), 128, 1, residual=x)
    return [read, p.avg_pool(x, 2, 2, 0), head(p, x, 10)]


@dtypes
def test_micro_batches_do_not_show(dtype):
    p = Program(3, dtype)
    outputs = wide(p)
    side = {8: 48, 4: 64, 2: 96}[dtype.itemsize]
    x = image(17, dtype, side, side)
    report = _C.program_report(p.tensors, p.steps, outputs, list(x.shape), dtype)
    images = [step[2] for step in report]
    assert 1 <= min(images) < 9
    assert min(images) < max(images) <= 17
    values = p.one_by_one(x)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert_bits(p.run(x, outputs), [values[v] for v in outputs])
        assert_bits(p.run(x, [len(p)]), values[-1:])


def test_micro_batches_keep_the_algorithm_of_the_batch():
    """One image at a time, by the tiles of 4x4 that four images of 8x8 choose and one does not.

    What the last convolution reads lies in memory as long as the small map does: to store it for
    the whole batch on both sides of the small map costs more than to go on with one image.
    """
    p = Program(16)
    x = p.conv(0, 16, 1)
    small = p.conv(p.conv(x, 64, 1), 128, stride=32)
    y = p.conv(small, 128, winograd=True)
    p.conv(x, 128, stride=32, residual=y)
    x = normal(4, 16, 256, 256, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    torch.set_num_threads(1)
    alone, together = (
        _C.program_report(p.tensors, p.steps, [len(p)], [n, *x.shape[1:]], torch.float32)[y - 1]
        for n in (1, 4)
    )
    assert alone[2] == together[2] == 1
    assert alone[1] != together[1]
    assert_bits(p.run(x), p.one_by_one(x)[-1:])


def test_a_residual_that_is_the_input():
    """The windows of later pixels read it when the first results have been stored."""
    p = Program(16)
    x = p.conv(0, 16)
    p.conv(x, 16, residual=x)
    x = normal(2, 16, 57, 53, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    assert_bits(p.run(x), p.one_by_one(x)[-1:])


@pytest.mark.parametrize("place", range(1, 6))
def test_a_value_that_is_read_late_keeps_its_memory(place):
    """Of a chain of maps of equal size each is read once more behind the last."""
    p = Program(8)
    for value in range(6):
        p.conv(value, 8, 1)
    p.conv(len(p), 8, 1, residual=place)
    p.conv(len(p), 8, 1)
    x = normal(3, 8, 9, 9, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    assert_bits(p.run(x), p.one_by_one(x)[-1:])


def test_the_input_of_a_convolution_as_its_residual():
    """The result may not lie where it is read."""
    p = Program(8)
    x = p.conv(0, 8)
    x = p.conv(x, 8, residual=x)
    p.add(x, x)
    x = normal(2, 8, 9, 9, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    assert_bits(p.run(x), p.one_by_one(x)[-1:])
