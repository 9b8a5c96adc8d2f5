"""torchvision's networks with random parameters, and the error of a result."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..models.sources import torchvision_model
from .calibration import calibrate, randomise

#: Relative L2 error of the logits beyond which a provider is not timed. The limits are wide, to
#: tell wrong results from rounded ones; ``fused-resnet verify`` is the sharp test.
LIMITS = {"float32": 1e-4, "float64": 1e-10, "bfloat16": 1e-1, "float16": 2e-2}


def random_model(name: str, *batches: Tensor, seed: int = 0) -> nn.Module:
    """torchvision's network with seeded parameters and calibrated batch norms.

    Args:
        name: torchvision's name of the network.
        batches: Inputs ``(N, 3, H, W)`` whose statistics the batch norms get.
        seed: Seed of the parameters.
    """
    torch.manual_seed(seed)
    return randomised(torchvision_model(name), *batches, seed=seed)


def randomised(model: nn.Module, *batches: Tensor, seed: int = 0) -> nn.Module:
    """Seed and calibrate a network's batch norms in place, and return it.

    Args:
        model: The network.
        batches: Inputs ``(N, 3, H, W)`` whose statistics the batch norms get.
        seed: Seed of their weights and biases.
    """
    randomise(model, torch.Generator().manual_seed(seed))
    calibrate(model, *batches)
    return model


def in_float64(model: nn.Module, images: Tensor) -> Tensor:
    """The logits of a float64 copy, computed a few images at a time to bound the memory.

    Args:
        model: The network.
        images: Batch of images, ``(N, 3, H, W)``.
    """
    exact = copy.deepcopy(model).double().eval()
    with torch.inference_mode():
        return torch.cat([exact(batch.double()) for batch in images.split(8)])


def relative_error(answer: Tensor, truth: Tensor) -> float:
    """Relative L2 error, computed in float64; NaN if the result contains one.

    Args:
        answer: The result.
        truth: The exact result.
    """
    exact = truth.double()
    return float((answer.double() - exact).norm() / exact.norm())
