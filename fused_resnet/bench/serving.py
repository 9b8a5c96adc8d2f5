"""The network of a frozen file as a provider of a comparison."""

from __future__ import annotations

from pathlib import Path

import torch

from ..inference.archive import load_frozen
from .harness import Entry
from .networks import LIMITS, relative_error
from .problem import read_problem
from .subject import Subject

#: Its name in tables.
NAME = "file"


def build(file: str, dtype: str, folder: str) -> Subject:
    """Prepare the file's network in a worker process.

    Args:
        file: The frozen file.
        dtype: Storage type, without ``torch.``.
        folder: The problem's folder.
    """
    problem = read_problem(Path(folder))
    network = load_frozen(file)
    images = problem.images.to(getattr(torch, dtype), memory_format=torch.channels_last)

    def call() -> torch.Tensor:
        answer: torch.Tensor = network(images)
        return answer

    return Subject(call, lambda: relative_error(call(), problem.truth))


def entry(file: Path, dtype: str, folder: Path) -> Entry:
    """The entry for :func:`fused_resnet.bench.harness.compare`.

    Args:
        file: The frozen file.
        dtype: Storage type, without ``torch.``.
        folder: The problem's folder.
    """
    case = {"file": str(file.absolute()), "dtype": dtype, "folder": str(folder)}
    return Entry(NAME, f"{__name__}:build", case, LIMITS[dtype])
