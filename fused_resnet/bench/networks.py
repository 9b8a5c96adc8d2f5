"""Inference of a whole network: the problem that all providers are given.

A problem is a folder with one network's parameters, one batch of inputs and the float64 logits, so
that every process works on the same numbers and each answer is held against the same truth.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .._calibration import calibrate, randomise
from ..models.weights import load_into
from .environment import MissingPackageError
from .harness import Entry
from .subject import Subject

#: torchvision's residual networks, which are also ours.
MODELS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)

#: Relative L2 error of the logits beyond which a provider is not timed. Wide on purpose: it tells a
#: wrong answer from a rounded one; ``fused-resnet verify`` is the sharp test.
LIMITS = {"float32": 1e-4, "float64": 1e-10, "bfloat16": 1e-1, "float16": 2e-2}


def torchvision_model(name: str, state: dict[str, Tensor] | None = None) -> nn.Module:
    """torchvision's network of that name, in eval.

    Args:
        name: One of :data:`MODELS`.
        state: Its state dict, which also tells the number of classes; None leaves the initial
            parameters.

    Raises:
        ValueError: The state dict is not that network's.
        MissingPackageError: torchvision is not installed.
    """
    try:
        import torchvision
    except ImportError:
        raise MissingPackageError("torchvision") from None
    classes = state["fc.bias"].numel() if state is not None and "fc.bias" in state else 1000
    model: nn.Module = getattr(torchvision.models, name)(num_classes=classes)
    if state is not None:
        load_into(model, state, name=name)
    return model.eval()


def random_model(name: str, *batches: Tensor, seed: int = 0) -> nn.Module:
    """torchvision's network with seeded parameters and batch norms calibrated on the batches."""
    torch.manual_seed(seed)
    model = torchvision_model(name)
    randomise(model, torch.Generator().manual_seed(seed))
    calibrate(model, *batches)
    return model


def in_float64(model: nn.Module, images: Tensor) -> Tensor:
    """The logits of a float64 copy, a few images at a time to bound the memory."""
    exact = copy.deepcopy(model).double().eval()
    with torch.inference_mode():
        return torch.cat([exact(part.double()) for part in images.split(8)])


def relative_error(answer: Tensor, truth: Tensor) -> float:
    """Relative L2 distance, in float64; not a number if the answer holds one."""
    exact = truth.double()
    return float((answer.double() - exact).norm() / exact.norm())


def write_problem(folder: Path, model: nn.Module, images: Tensor) -> None:
    """Write parameters, inputs and float64 logits for the workers to read."""
    torch.save(model.state_dict(), folder / "state.pt")
    torch.save(images, folder / "images.pt")
    torch.save(in_float64(model, images), folder / "truth.pt")


def build(provider: str, model: str, dtype: str, folder: str) -> Subject:
    """The workers' target: one provider on the problem in ``folder``."""
    from .providers import PROVIDERS

    state, images, truth = (
        torch.load(Path(folder) / name, weights_only=True)
        for name in ("state.pt", "images.pt", "truth.pt")
    )
    network = torchvision_model(model, state)
    call = PROVIDERS[provider](network, images.to(getattr(torch, dtype)))
    return Subject(call, lambda: relative_error(call(), truth))


def entries(providers: Sequence[str], model: str, dtype: str, folder: Path) -> list[Entry]:
    """One entry a provider, for :func:`fused_resnet.bench.harness.compare`."""
    return [
        Entry(
            name,
            f"{__name__}:build",
            {"provider": name, "model": model, "dtype": dtype, "folder": str(folder)},
            LIMITS[dtype],
        )
        for name in providers
    ]
