"""torchvision's networks with random parameters, and how an answer of theirs is judged."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..models.sources import torchvision_model
from .calibration import calibrate, randomise

#: Relative L2 error of the logits beyond which a provider is not timed. Wide on purpose: it tells a
#: wrong answer from a rounded one; ``fused-resnet verify`` is the sharp test.
LIMITS = {"float32": 1e-4, "float64": 1e-10, "bfloat16": 1e-1, "float16": 2e-2}


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
