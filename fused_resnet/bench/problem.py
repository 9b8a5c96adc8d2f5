"""The problem of an inference benchmark: one network, one batch, and the float64 logits.

It is a folder, so that every process works on the same numbers and each result is compared with
the same truth.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..models.sources import plain_model
from .networks import in_float64, randomised


class Problem(NamedTuple):
    """The contents of a folder.

    Attributes:
        state: The network's parameters and buffers.
        images: One batch, float32.
        truth: The float64 logits.
    """

    state: dict[str, Tensor]
    images: Tensor
    truth: Tensor


def random_problem(
    name: str, batch: int, size: int, state: dict[str, Tensor] | None = None
) -> tuple[nn.Module, Tensor]:
    """A seeded network and one batch of images, float32.

    Args:
        name: A network's name from :func:`fused_resnet.models.sources.parse`.
        batch: Number of images.
        size: Height and width of the images.
        state: The network's own ``state_dict``; None for random weights.
    """
    generator = torch.Generator().manual_seed(batch)
    images = torch.randn(batch, 3, size, size, generator=generator)
    if state is not None:
        return plain_model(name, state).float(), images
    # Other images for the statistics: those of a batch of one would be degenerate.
    others = torch.randn(8, 3, size, size, generator=generator)
    torch.manual_seed(0)
    return randomised(plain_model(name), others), images


def write_problem(folder: Path, model: nn.Module, images: Tensor) -> None:
    """Write parameters, inputs and float64 logits for the worker processes.

    Args:
        folder: An existing folder.
        model: The network, float32, in eval mode.
        images: Batch of images, ``(N, 3, H, W)``, float32.
    """
    torch.save(model.state_dict(), folder / "state.pt")
    torch.save(images, folder / "images.pt")
    torch.save(in_float64(model, images), folder / "truth.pt")


def read_problem(folder: Path) -> Problem:
    """Read a problem; the parameters are memory-mapped.

    Args:
        folder: A folder of :func:`write_problem`.
    """
    return Problem(
        *(
            torch.load(folder / f"{name}.pt", weights_only=True, mmap=name == "state")
            for name in Problem._fields
        )
    )
