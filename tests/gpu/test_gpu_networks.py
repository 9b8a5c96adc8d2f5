"""Whole networks on a GPU, fused and frozen, against float64 on the CPU.

The unfused network is torchvision's, module for module: batch norms of a class that is not fused.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from cases import FORMATS
from on_gpu import BACKEND, DEVICE
from precisions import Precision, precisions
from tolerances import RATIO, error
from torch import nn

import fused_resnet as fr
from fused_resnet.bench.calibration import calibrate, randomise
from fused_resnet.verify.networks import _clear_of_kinks

NAMES = ("resnet18", "resnet50")
names = pytest.mark.parametrize("name", NAMES)


class UnfusedBatchNorm(nn.BatchNorm2d):
    """Runs as its base does; being another class, it is left alone."""


def images(count: int, size: int = 224) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@functools.cache
def unfused(name: str) -> nn.Module:
    """Seeded, its statistics those of images like the ones that it will see. Float32, CPU."""
    torch.manual_seed(0)
    model = getattr(fr, name)(norm_layer=UnfusedBatchNorm)
    randomise(model, torch.Generator().manual_seed(0))
    calibrate(model, torch.randn(8, 3, 128, 128, generator=torch.Generator().manual_seed(2)))
    return model


@functools.cache
def stored(name: str, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(unfused(name)).to(dtype=dtype, memory_format=torch.channels_last)


@functools.cache
def truth(name: str, dtype: torch.dtype) -> torch.Tensor:
    """Float64 logits with parameters and images as the storage type rounds them."""
    with torch.inference_mode():
        return copy.deepcopy(stored(name, dtype)).double()(images(4).to(dtype).double())


def fusible(name: str, dtype: torch.dtype) -> nn.Module:
    """The same network with plain batch norms."""
    model = getattr(fr, name)()
    model.load_state_dict(unfused(name).state_dict())
    return model.eval().to(dtype=dtype, memory_format=torch.channels_last)


def check_logits(logits, eager, name, precision):
    expected = truth(name, precision.dtype)
    ours, theirs = error(logits.cpu(), expected), error(eager.cpu(), expected)
    # Where cuDNN does not take tf32 its error is float32's: what is allowed then is tf32's own,
    # half a unit in the last of its 10 bits for each product.
    floor = 2.0**-11 if precision.tf32 else 0.0
    assert ours <= max(RATIO * theirs, floor), f"error {ours:.2e}, PyTorch's own {theirs:.2e}"


@precisions
@names
@pytest.mark.parametrize("form", ["fused", "frozen"])
def test_logits(name, precision, form):
    with precision.set(), torch.inference_mode():
        eager = copy.deepcopy(stored(name, precision.dtype)).to(DEVICE)
        x = images(4).to(DEVICE, precision.dtype).contiguous(memory_format=torch.channels_last)
        model = fusible(name, precision.dtype).to(DEVICE)
        model = fr.fuse(model) if form == "fused" else fr.freeze(model)
        with fr.use_backend(BACKEND):
            logits = model(x)
        check_logits(logits, eager(x), name, precision)


@names
@pytest.mark.parametrize("fmt", FORMATS)
def test_either_memory_format(name, fmt):
    precision = Precision("bfloat16", torch.bfloat16)
    x = images(4).to(DEVICE, precision.dtype).contiguous(memory_format=FORMATS[fmt])
    model = fusible(name, precision.dtype).to(DEVICE, memory_format=FORMATS[fmt])
    eager = copy.deepcopy(stored(name, precision.dtype)).to(DEVICE)
    with torch.inference_mode():
        check_logits(fr.fuse(model)(x), eager(x), name, precision)


@names
def test_a_frozen_network_is_what_its_parts_are(name):
    """Frozen on the CPU in float32 and on the device: the same function."""
    x, model = images(2, 96), fusible(name, torch.float32)
    with torch.inference_mode():
        expected = fr.freeze(model, winograd=False)(x)
        result = fr.freeze(model.to(DEVICE))(x.to(DEVICE))
    assert error(result.cpu(), expected) < 1e-5


@names
def test_freezing_to_half_precision_takes_float32_images(name):
    model = fusible(name, torch.float32).to(DEVICE)
    frozen = fr.freeze(model, dtype=torch.float16)
    x = images(4).to(DEVICE)
    logits = frozen(x)
    assert logits.dtype is torch.float32
    expected = truth(name, torch.float32)
    assert error(logits.cpu(), expected) < 2e-2


@pytest.mark.parametrize("name", ["resnext50_32x4d", "wide_resnet50_2", "resnet152"])
def test_the_rest_of_the_family(name):
    precision = Precision("bfloat16", torch.bfloat16)
    x = images(2, 128).to(DEVICE, precision.dtype).contiguous(memory_format=torch.channels_last)
    eager = copy.deepcopy(stored(name, precision.dtype))
    with torch.inference_mode():
        expected = copy.deepcopy(eager).double()(x.cpu().double())
        theirs = error(eager.to(DEVICE)(x).cpu(), expected)
        frozen = fr.freeze(fusible(name, precision.dtype).to(DEVICE))
        for model in (fr.fuse(fusible(name, precision.dtype).to(DEVICE)), frozen):
            assert error(model(x).cpu(), expected) <= RATIO * theirs


def test_cifar_network():
    model = fr.cifar_resnet(20).eval()
    randomise(model, torch.Generator().manual_seed(0))
    x = images(8, 32)
    calibrate(model, x)
    with torch.inference_mode(), fr.use_backend("reference"):
        expected = copy.deepcopy(model).double()(x.double())
    with torch.inference_mode():
        result = fr.freeze(model.to(DEVICE))(x.to(DEVICE))
    assert error(result.cpu(), expected) < 1e-5


# Training


def step(model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Loss, gradients and statistics of one step, by kind."""
    model.train().zero_grad()
    loss = F.cross_entropy(model(x), labels, reduction="none")
    loss.mean().backward()
    found = {"loss": [loss.detach()]}
    for name, parameter in model.named_parameters():
        kind = {1: name.rpartition(".")[2], 2: "weight of fc", 4: "convolutions"}[parameter.dim()]
        found.setdefault(f"gradients: {kind}", []).append(parameter.grad)
    for name, buffer in model.named_buffers():
        found.setdefault(f"statistics: {name.rpartition('.')[2]}", []).append(buffer)
    return {k: torch.cat([t.double().cpu().flatten() for t in v]) for k, v in found.items()}


@names
@pytest.mark.parametrize("backend", ["auto", BACKEND])
def test_a_training_step(name, backend):
    """Activations clear of zero, so that the errors are those of arithmetic alone."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(8, 3, 64, 64, generator=generator)
    labels = torch.randint(0, 1000, (8,), generator=generator)
    model = fusible(name, torch.float32)
    calibrate(model, x)
    _clear_of_kinks(model, generator)
    plain = copy.deepcopy(unfused(name))
    plain.load_state_dict(model.state_dict())
    expected = step(copy.deepcopy(plain).double(), x.double(), labels)
    x, labels = x.to(DEVICE).contiguous(memory_format=torch.channels_last), labels.to(DEVICE)
    eager = step(plain.to(DEVICE, memory_format=torch.channels_last), x, labels)
    with fr.use_backend(backend):
        result = step(fr.fuse(model.to(DEVICE)), x, labels)
    eps = torch.finfo(torch.float32).eps
    for what, wide in expected.items():
        ours, theirs = error(result[what], wide), error(eager[what], wide)
        assert ours <= max(RATIO * theirs, 2 * eps), f"{what}: {ours:.2e}, PyTorch's {theirs:.2e}"


def test_training_under_autocast():
    """Ten steps of mixed precision with a gradient scaler: the loss falls as PyTorch's does."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(16, 3, 64, 64, generator=generator).to(DEVICE)
    x = x.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (16,), generator=generator).to(DEVICE)
    losses = {}
    for form in ("unfused", "fused"):
        model = copy.deepcopy(unfused("resnet18")) if form == "unfused" else None
        model = (model or fr.fuse(fusible("resnet18", torch.float32))).to(DEVICE)
        model = model.to(memory_format=torch.channels_last).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        scaler = torch.amp.GradScaler(DEVICE.type)
        for _ in range(10):
            with torch.autocast(DEVICE.type, torch.float16):
                loss = F.cross_entropy(model(x), labels)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.setdefault(form, []).append(loss.item())
    ours, theirs = losses["fused"], losses["unfused"]
    assert ours[0] == pytest.approx(theirs[0], rel=1e-2)
    assert ours[-1] < 0.7 * ours[0]
    assert ours[-1] == pytest.approx(theirs[-1], rel=0.25)
