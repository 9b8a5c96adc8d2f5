"""Inference of a whole network: the problem that all providers are given.

A problem is a folder with one network's parameters, one batch of inputs and the float64 logits, so
that every process works on the same numbers and each answer is held against the same truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..models.sources import plain_model
from .harness import Entry
from .networks import LIMITS, in_float64, randomised, relative_error
from .subject import Subject


class Problem(NamedTuple):
    """What a folder holds.

    Attributes:
        state: The network's parameters and buffers.
        images: One batch, float32.
        truth: The float64 logits.
    """

    state: dict[str, Tensor]
    images: Tensor
    truth: Tensor


def random_problem(name: str, batch: int, size: int) -> tuple[nn.Module, Tensor]:
    """A seeded network and one batch of images, float32.

    Args:
        name: From :func:`fused_resnet.bench.sources.parse`.
        batch: Images.
        size: Their height and width.
    """
    generator = torch.Generator().manual_seed(batch)
    images = torch.randn(batch, 3, size, size, generator=generator)
    # Not on the images themselves: the statistics of a batch of one make no network.
    others = torch.randn(8, 3, size, size, generator=generator)
    torch.manual_seed(0)
    return randomised(plain_model(name), others), images


def write_problem(folder: Path, model: nn.Module, images: Tensor) -> None:
    """Write parameters, inputs and float64 logits for the workers to read."""
    torch.save(model.state_dict(), folder / "state.pt")
    torch.save(images, folder / "images.pt")
    torch.save(in_float64(model, images), folder / "truth.pt")


def read_problem(folder: Path) -> Problem:
    """What :func:`write_problem` wrote; the parameters are mapped, and read when they are used."""
    return Problem(
        *(
            torch.load(folder / f"{name}.pt", weights_only=True, mmap=name == "state")
            for name in Problem._fields
        )
    )


def build(provider: str, model: str, dtype: str, folder: str) -> Subject:
    """The workers' target: one provider on the problem in ``folder``."""
    from ..models.sources import our_model
    from .peers import RUNTIMES
    from .providers import OURS, PROVIDERS

    problem = read_problem(Path(folder))
    images = problem.images.to(getattr(torch, dtype))
    threads = None
    if provider in RUNTIMES:
        call, threads = RUNTIMES[provider](Path(folder), model, images)
    else:
        make = our_model if provider in OURS else plain_model
        call = PROVIDERS[provider](make(model, problem.state), images)
    truth = problem.truth
    return Subject(call, lambda: relative_error(call(), truth), threads)


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
