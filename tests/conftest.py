"""Fixtures that several test files share."""

from __future__ import annotations

import os
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
