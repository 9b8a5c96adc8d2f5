"""torchvision's networks with random parameters, and how an answer of theirs is judged."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .._calibration import calibrate, randomise
from ..models.weights import load_into
from .environment import MissingPackageError

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
    return randomised(torchvision_model(name), *batches, seed=seed)


def randomised(model: nn.Module, *batches: Tensor, seed: int = 0) -> nn.Module:
    """The network itself, its batch norms seeded and calibrated on the batches."""
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
