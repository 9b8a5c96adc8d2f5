"""The simulator as a fixture. FR_SIMT_VARIANT=plain|asan|race and FR_SIMT_SEED choose which."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import launch_record
import pytest
import simulator
import torch
from driver import Simt


@pytest.fixture(scope="session")
def simt() -> Iterator[Simt]:
    variant = os.environ.get("FR_SIMT_VARIANT", "plain")
    given = os.environ.get("FR_SIMT_LIBRARY")
    reason = simulator.missing()
    if reason:
        pytest.skip(reason)
    if variant == "asan" and "libasan" not in os.environ.get("LD_PRELOAD", ""):
        pytest.fail("FR_SIMT_VARIANT=asan wants LD_PRELOAD: see simulator.sanitizer_environment()")
    path = Path(given) if given else simulator.build(variant)
    launch_record.begin(path)
    yield Simt(path, variant, int(os.environ.get("FR_SIMT_SEED", "0")))
    launch_record.save()


@pytest.fixture(autouse=True)
def _simulator_is_content(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test whose kernels raced, and lets memory that nobody wrote show up as NaN."""
    if "simt" not in request.fixturenames:
        yield
        return
    simt: Simt = request.getfixturevalue("simt")
    simt.seed(simt.default_seed)
    simt.reports()
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # at::empty then fills with NaN
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)
    simt.launches()
    launch_record.add(request.node.path.name, simt.launched)
    simt.launched = []
    simt.check()
