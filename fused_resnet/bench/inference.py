"""Inference of a whole network by each provider, as entries of the harness."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..models.sources import our_model, plain_model
from .harness import Entry
from .networks import LIMITS, relative_error
from .peers import RUNTIMES
from .problem import read_problem
from .providers import OURS, PROVIDERS
from .subject import Subject


def build(provider: str, model: str, dtype: str, folder: str) -> Subject:
    """Prepare one provider in a worker process.

    Args:
        provider: A name of :data:`~fused_resnet.bench.providers.NAMES`.
        model: The network's name.
        dtype: Storage type, without ``torch.``.
        folder: The problem's folder.
    """
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
    """One entry per provider, for :func:`fused_resnet.bench.harness.compare`.

    Args:
        providers: Names of :data:`~fused_resnet.bench.providers.NAMES`.
        model: The network's name.
        dtype: Storage type, without ``torch.``.
        folder: The problem's folder.
    """
    return [
        Entry(
            name,
            f"{__name__}:build",
            {"provider": name, "model": model, "dtype": dtype, "folder": str(folder)},
            LIMITS[dtype],
        )
        for name in providers
    ]
