"""What only a device shows: graphs, streams, devices, waiting, large tensors, the same bits.

Each subject is a function of one map, so that all are put through the same.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CONVS, Conv, normal
from on_gpu import DEVICE, bn_operands, called, conv_operands, exact, folded, there, unfused
from tolerances import TOLERANCES, error
from torch import Tensor

import fused_resnet as fr

HALF = torch.float16
DEEP = Conv("deep", (1, 512, 7, 7), 256, args={"padding": 1})  # its sum is split
STEM = Conv("stem", (2, 3, 64, 64), 64, (7, 7), {"stride": 2, "padding": 3})


def conv(case: Conv, dtype: torch.dtype = HALF, **options: Any) -> tuple[Callable, Tensor]:
    operands = there(conv_operands(case, dtype, "channels_last", residual=False))
    x = operands.pop("x")

    def call(x: Tensor) -> Tensor:
        return called("conv_bn_add_relu", {"x": x, **operands}, **case.args, **options)

    return call, x


def stem(_: Any = None) -> tuple[Callable, Tensor]:
    operands = there(conv_operands(STEM, HALF, "channels_last", residual=False))
    x = operands.pop("x")
    return lambda x: called("conv_bn_relu_maxpool", {"x": x, **operands}, **STEM.args), x


def batch_norm(training: bool) -> tuple[Callable, Tensor]:
    shape = (4, 64, 28, 28)
    operands = there(bn_operands(shape, HALF, "channels_last", residual=True))
    x = operands.pop("x")
    return lambda x: called("bn_add_relu", {"x": x, **operands}, training=training), x


def backward() -> tuple[Callable, Tensor]:
    operands = there(bn_operands((4, 64, 28, 28), HALF, "channels_last", residual=True))
    x = operands.pop("x")
    gradient = torch.ones_like(x)

    def call(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        y = called("bn_add_relu", {"x": leaf, **operands}, training=True)
        return torch.autograd.grad(y, leaf, gradient)[0]

    return call, x


def network() -> tuple[Callable, Tensor]:
    torch.manual_seed(0)
    model = fr.resnet18(num_classes=10).eval().to(dtype=HALF)
    frozen = fr.freeze(model.to(DEVICE), graphs=0)  # which have tests of their own
    x = there(normal(2, 3, 64, 64, dtype=HALF)).contiguous(memory_format=torch.channels_last)
    return frozen, x


SUBJECTS: dict[str, Callable[[], tuple[Callable, Tensor]]] = {
    "conv": lambda: conv(CONVS[3]),
    "conv float32": lambda: conv(CONVS[3], torch.float32),
    "conv, no packs": lambda: conv(CONVS[9]),
    "conv, split": lambda: conv(DEEP),
    "conv in training": lambda: conv(CONVS[3], training=True),
    "stem": stem,
    "batch norm": lambda: batch_norm(False),
    "batch norm in training": lambda: batch_norm(True),
    "batch norm backward": backward,
    "frozen network": network,
}
subjects = pytest.mark.parametrize("subject", SUBJECTS)


def other(x: Tensor) -> Tensor:
    """Another map of the same kind."""
    return x.roll(1, -1) * 0.75 + 0.125


@subjects
def test_graphs_replay_with_new_inputs(subject):
    call, x = SUBJECTS[subject]()
    first, second = x.clone(), other(x)
    expected = [call(first).clone(), call(second).clone()]
    static = x.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(static)
    for given, result in zip((second, first, second), (1, 0, 1), strict=True):
        static.copy_(given)
        graph.replay()
        assert torch.equal(y, expected[result])


@subjects
def test_work_goes_to_the_current_stream(subject):
    """The map is filled late on a stream of its own: a kernel elsewhere would read what was there.

    The first call is for what is made once.
    """
    call, x = SUBJECTS[subject]()
    expected = call(x).clone()
    late = torch.full_like(x, float("nan"))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(x)
        result = call(late)
    stream.synchronize()
    assert torch.equal(result, expected)


@subjects
def test_nothing_waits_for_the_device(subject):
    call, x = SUBJECTS[subject]()
    call(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@subjects
def test_the_same_bits_every_time(subject):
    """Also while something else keeps part of the device busy, which changes the schedule."""
    call, x = SUBJECTS[subject]()
    expected = call(x).clone()
    busy = torch.cuda.Stream()
    noise = torch.randn(2048, 2048, device=x.device)
    for _ in range(20):
        with torch.cuda.stream(busy):
            noise @ noise
        assert torch.equal(call(x), expected)


@subjects
def test_memory_that_is_not_initialised_is_not_read(subject):
    """With new memory filled with NaN the result is the same."""
    call, x = SUBJECTS[subject]()
    expected = call(x).clone()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        result = call(x)
    finally:
        torch.use_deterministic_algorithms(before)
    assert torch.equal(result, expected)


@subjects
def test_the_inputs_are_only_read(subject):
    call, x = SUBJECTS[subject]()
    before = x.clone()
    call(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("subject", ["conv", "conv, split", "stem", "batch norm in training"])
def test_the_device_of_the_tensors_is_used(subject):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"{torch.cuda.device_count()} CUDA device; this wants two")
    with torch.cuda.device(1):
        call, x = SUBJECTS[subject]()
    assert x.device.index == 1
    assert torch.cuda.current_device() == 0
    result = call(x)
    assert result.device == x.device
    assert torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        assert torch.equal(call(x), result)


def test_devices_may_not_be_mixed():
    if torch.cuda.device_count() < 2:
        pytest.skip(f"{torch.cuda.device_count()} CUDA device; this wants two")
    operands = there(conv_operands(CONVS[3], HALF, "channels_last", residual=False))
    operands["conv_weight"] = operands["conv_weight"].to("cuda:1")
    with pytest.raises(ValueError, match=r"conv_weight: expected device cuda:0, got cuda:1"):
        called("conv_bn_add_relu", operands, **CONVS[3].args)


@pytest.mark.parametrize("subject", ["conv", "batch norm in training"])
def test_from_another_thread(subject):
    from concurrent.futures import ThreadPoolExecutor

    call, x = SUBJECTS[subject]()
    expected = call(x)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(call, [x] * 16):
            assert torch.equal(result, expected)


# Tensors of more than 2^31 elements

LARGE = 2**31 + 2**22  # elements


def needs_memory(gib: int) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"{free:.0f} GiB of the device are free; this wants {gib}")


def ends(t: Tensor) -> Tensor:
    """The first and the last two images: what an offset that wraps would mix up."""
    return torch.cat([t[:2], t[-2:]])


def large_map(channels: int, size: int) -> Tensor:
    """Zeros, but for its ends."""
    count = LARGE // (channels * size * size) + 1
    x = torch.zeros((count, channels, size, size), dtype=torch.bfloat16, device="cuda").contiguous(
        memory_format=torch.channels_last
    )
    assert x.numel() > 2**31
    for part in (x[:2], x[-2:]):
        part.copy_(normal(*part.shape, dtype=torch.bfloat16))
    return x


def close(result: Tensor, truth: Tensor) -> None:
    rtol, atol = TOLERANCES[result.dtype]
    torch.testing.assert_close(result.cpu().double(), truth, rtol=rtol, atol=atol)


@pytest.mark.parametrize("kernel", [1, 3])
def test_large_convolution(kernel):
    needs_memory(24)
    case = Conv("large", (1, 64, 128, 128), 64, (kernel, kernel), {"padding": kernel // 2})
    operands = there(conv_operands(case, torch.bfloat16, "channels_last", residual=False))
    operands["x"] = large_map(64, 128)
    operands["residual"] = operands["x"]
    y = called("conv_bn_add_relu", operands, **case.args)
    operands["x"] = operands["residual"] = ends(operands["x"])
    close(ends(y), unfused("conv_bn_add_relu", exact(operands), **case.args))
    # An image of zeros gives the shift, everywhere.
    middle = y[y.shape[0] // 2]
    assert torch.equal(middle, middle[:, :1, :1].expand_as(middle))
    close(middle[:, 0, 0], folded(operands)[1].relu().double().cpu())


def test_large_stem():
    needs_memory(24)
    case = Conv("large", (1, 16, 256, 256), 16, (3, 3), {"stride": 1, "padding": 1})
    operands = there(conv_operands(case, torch.bfloat16, "channels_last", residual=False))
    operands["x"] = large_map(16, 256)
    y = called("conv_bn_relu_maxpool", operands, **case.args)
    operands["x"] = ends(operands["x"])
    close(ends(y), unfused("conv_bn_relu_maxpool", exact(operands), **case.args))


@pytest.mark.parametrize("fmt", ["channels_last", "contiguous"])
def test_large_batch_norm(fmt):
    """Training, forward and backward; the sums are those of the ends alone."""
    needs_memory(40)
    x = large_map(64, 128)
    if fmt == "contiguous":
        x = x.contiguous()
    names = ("bn_weight", "bn_bias", "running_mean", "running_var")
    operands = there(bn_operands((1, 64, 1, 1), torch.bfloat16, fmt, residual=False))
    weight, bias, mean, var = (operands[name] for name in names)
    compiled = torch.ops.fused_resnet
    y, batch_mean, batch_var = compiled.bn_add_relu(
        x, weight, bias, mean, var, None, True, 1e-5, False
    )
    count = x.numel() // 64
    wide = ends(x).cpu().double()
    exact_mean = wide.sum((0, 2, 3)) / count
    exact_var = wide.square().sum((0, 2, 3)) / count - exact_mean.square()
    # The mean is next to nothing: float32 has it to a part of the deviation, 0.04.
    assert (batch_mean.cpu().double() - exact_mean).abs().max() < 1e-6
    assert error(batch_var.cpu(), exact_var) < 1e-4

    def along(t: Tensor) -> Tensor:
        return t.cpu().double().view(-1, 1, 1)

    invstd = along((exact_var + 1e-5).rsqrt())
    normalised = (wide - along(exact_mean)) * invstd
    close(ends(y), normalised * along(weight) + along(bias))

    gradient = torch.zeros_like(x)
    part = normal(*wide.shape, dtype=torch.bfloat16)
    gradient[:2], gradient[-2:] = part[:2].cuda(), part[2:].cuda()
    dx, dweight, dbias, _ = compiled.bn_add_relu_backward(
        gradient, x, None, weight, batch_mean, batch_var, True, 1e-5, False, False
    )
    wide_gradient = part.double()
    sums = wide_gradient.sum((0, 2, 3)), (wide_gradient * normalised).sum((0, 2, 3))
    assert error(dbias.cpu(), sums[0]) < 1e-4
    assert error(dweight.cpu(), sums[1]) < 1e-4
    inner = wide_gradient - along(sums[0]) / count - normalised * along(sums[1]) / count
    close(ends(dx), inner * along(weight) * invstd)


def test_a_batch_beyond_the_grids_second_dimension():
    """More images than 65,535, which is where the second and third dimension of a grid end."""
    case = Conv("many", (70_001, 8, 2, 2), 8, (1, 1))
    operands = there(conv_operands(case, torch.float16, "channels_last", residual=True))
    close(called("conv_bn_add_relu", operands), unfused("conv_bn_add_relu", exact(operands)))
    operands = there(bn_operands((70_001, 8, 2, 2), torch.float16, "contiguous", residual=True))
    truth = unfused("bn_add_relu", exact(operands), training=True)
    close(called("bn_add_relu", operands, training=True), truth)
    operands = there(bn_operands((2, 70_001, 2, 2), torch.float16, "contiguous", residual=True))
    close(called("bn_add_relu", operands), unfused("bn_add_relu", exact(operands)))
