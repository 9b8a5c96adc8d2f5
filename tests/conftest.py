"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Which backend is faster here is not what the tests ask; those of the tuner say what they want.
os.environ.setdefault("FUSED_RESNET_TUNE", "0")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same numbers in every run, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real data that FUSED_RESNET_TEST_DATA names; skips where there is none."""
    folder = os.environ.get("FUSED_RESNET_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("FUSED_RESNET_TEST_DATA names no folder with the CIFAR-10 slice and weights")
    return Path(folder)


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    """Commands that are run in this process set PyTorch's threads, and sums depend on them."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)
