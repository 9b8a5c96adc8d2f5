"""Our convolution or PyTorch's in a training step on the CPU: what the tuner's timings decide."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from networks import image
from operator_calls import OperatorCalls
from test_convolutions import FEW, assert_as_exact_as_pytorch
from torch import Tensor, nn
from training_blocks import basic
from training_cases import affine, backward_of, coarse, convolve, geometry, weight_of

import fused_resnet as fr
from fused_resnet.cli import main
from fused_resnet.cli._choices import training_calls
from fused_resnet.models import sources
from fused_resnet.tuning import cache, tuner

OPS = torch.ops.fused_resnet


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch) -> Iterator[None]:
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(tmp_path / "tuning.json"))
    monkeypatch.setenv("FUSED_RESNET_TUNE", "1")
    monkeypatch.setattr(tuner, "QUIET", 0)  # these ask what is stored, on a busy machine too
    tuner.forget()
    yield
    tuner.forget()


def step(block: nn.Module, x: Tensor) -> OperatorCalls:
    """A training step, and the operators that it called."""
    with OperatorCalls() as calls:
        block(x).square().sum().backward()
    return calls


def store(network: nn.Module, batch: int, size: int, **faster: str) -> None:
    """Timings of a network's calls as an earlier process leaves them.

    Args:
        network: The network.
        batch: Number of images.
        size: Height and width of the images.
        faster: The faster candidate, by the operator's name; no other is timed.
    """
    calls = training_calls(network, batch, size, torch.float32)
    times = {
        call.key: {name: 1.0 + (name != faster[call.op]) for name in call.candidates}
        for call, _ in calls
        if call.op in faster
    }
    cache.add(tuner.machine_of(torch.device("cpu")), times)
    tuner.forget()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_pytorchs_convolution_between_the_same_passes(case, dtype) -> None:
    x = coarse(*case.x, dtype=dtype).contiguous(memory_format=torch.channels_last)
    w, bn, args = weight_of(case, dtype), affine(case.x[1], dtype), geometry(case)
    operands = (x, bn.scale, bn.shift, w, *args.values(), True, True)
    z, mean, var = OPS.conv_forward_library(*operands)
    truth = convolve(x.double(), w.double(), bn.double(), **args)
    assert_as_exact_as_pytorch(z, convolve(x, w, bn, **args), truth)
    torch.testing.assert_close(mean.double(), z.double().mean((0, 2, 3)), rtol=0, atol=1e-4)
    expected = z.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(var.double(), expected, rtol=1e-5, atol=0)

    given = backward_of(case, dtype, "prologue")
    sides = (given.g, given.z, given.a, given.b, given.c, given.x, *given.bn[:2], given.bn.mean)
    found = OPS.conv_backward_library(*sides, given.w, None, *args.values(), True, True, True, True)
    exact, pytorch = given.to(torch.float64).plain(**args), given.plain(**args)
    for ours, theirs, truth in zip(found[:2], pytorch[:2], exact[:2], strict=True):
        assert (ours - truth).norm() <= 1.5 * (theirs - truth).norm() + 1e-7 * truth.norm()
    for ours, truth in zip(found[2:], exact[2:], strict=True):
        bound = 1e-5 if dtype is torch.float32 else 2e-2
        assert (ours - truth).abs().max() <= bound * exact.g_x.abs().sum((0, 2, 3)).max()


def test_a_step_without_timings_asks_nobody(monkeypatch) -> None:
    monkeypatch.setattr(tuner, "measure", lambda *_: pytest.fail("timed in a training step"))
    monkeypatch.setattr(tuner, "choose", lambda *_, **__: pytest.fail("asked"))
    step(fr.fuse(basic().float()), image(3, 8, 9, 7, dtype=torch.float32))


@pytest.mark.parametrize("direction", ["conv_forward", "conv_backward"])
def test_timings_decide_each_direction(direction, monkeypatch) -> None:
    network = fr.cifar_resnet(20)
    directions = ("conv_forward", "conv_backward")
    x = image(2, 3, 32, 32, dtype=torch.float32)
    monkeypatch.setattr(tuner, "measure", lambda *_: pytest.fail("timed in a training step"))

    def convolutions() -> dict[str, int]:
        model = fr.fuse(copy.deepcopy(network)).to(memory_format=torch.channels_last).train()
        calls = step(model, x.to(memory_format=torch.channels_last)).counts("fused_resnet")
        return {name: calls[f"{name}_library"] for name in directions}

    store(network, 2, 32, **dict.fromkeys(directions, "cpu"))
    assert sum(convolutions().values()) == 0
    cache.remove(tuner.machine_of(torch.device("cpu")))
    store(network, 2, 32, **{direction: "library"})
    other = next(name for name in directions if name != direction)
    found = convolutions()
    assert found[direction] >= 18  # those of the blocks
    assert found[other] == 0
    torch.use_deterministic_algorithms(True)
    try:
        assert sum(convolutions().values()) == 0
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_command_times_a_step(capsys) -> None:
    line = "tune cifar_resnet20 --training --batch 2 --size 32 --threads 1"
    threads = torch.get_num_threads()
    try:
        assert main(line.split()) == 0
        out = capsys.readouterr().out
        assert "cifar_resnet20, batch 2, float32, cpu, training" in out
        assert "backward" in out
        known = cache.load(tuner.machine_of(torch.device("cpu")))
        calls = training_calls(sources.our_model("cifar_resnet20", None), 2, 32, torch.float32)
        assert {call.key for call, _ in calls} <= set(known)
        assert sum(count for call, count in calls if call.op == "conv_forward") == 19
    finally:
        torch.set_num_threads(threads)
