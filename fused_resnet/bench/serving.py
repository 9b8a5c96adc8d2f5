"""The network of a frozen file as a provider of a comparison."""

from __future__ import annotations

from pathlib import Path

import torch

from ..inference.archive import load_frozen
from .harness import Entry
from .networks import LIMITS, relative_error
from .problem import read_problem
from .subject import Subject

#: What tables call it.
NAME = "file"


def build(file: str, dtype: str, folder: str) -> Subject:
    """The workers' target: the file's network on the problem in ``folder``."""
    problem = read_problem(Path(folder))
    network = load_frozen(file)
    images = problem.images.to(getattr(torch, dtype), memory_format=torch.channels_last)

    def call() -> torch.Tensor:
        answer: torch.Tensor = network(images)
        return answer

    return Subject(call, lambda: relative_error(call(), problem.truth))


def entry(file: Path, dtype: str, folder: Path) -> Entry:
    """For :func:`fused_resnet.bench.harness.compare`."""
    case = {"file": str(file.absolute()), "dtype": dtype, "folder": str(folder)}
    return Entry(NAME, f"{__name__}:build", case, LIMITS[dtype])
