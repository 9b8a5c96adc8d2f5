"""What runs a GPU's kernels, as fixtures: the CUDA simulator, Triton's interpreter, a device.

FR_SIMT_VARIANT=plain|asan|race and FR_SIMT_SEED choose the simulator's build and schedule.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def simulator_library() -> Any:
    """The simulator, loaded once by each process; built if it is not there."""
    import simulator
    from driver import Simt

    variant = os.environ.get("FR_SIMT_VARIANT", "plain")
    given = os.environ.get("FR_SIMT_LIBRARY")
    reason = simulator.missing()
    if reason:
        pytest.skip(reason)
    if variant == "asan" and "libasan" not in os.environ.get("LD_PRELOAD", ""):
        pytest.fail("FR_SIMT_VARIANT=asan wants LD_PRELOAD: see simulator.sanitizer_environment()")
    path = Path(given) if given else simulator.build(variant)
    return Simt(path, variant, int(os.environ.get("FR_SIMT_SEED", "0")))


@pytest.fixture
def simt(simulator_library: Any) -> Iterator[Any]:
    """The simulator. A test whose kernels raced fails; memory that nobody wrote is NaN."""
    simt = simulator_library
    simt.seed(simt.default_seed)
    simt.launches()
    simt.reports()
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # empty tensors are NaN
    yield simt
    torch.use_deterministic_algorithms(before, warn_only=warn_only)
    simt.launches()
    simt.check()


@pytest.fixture
def interpreter() -> Iterator[Any]:
    """The hardened interpreter of Triton's kernels, entered."""
    pytest.importorskip("triton.language", reason="Triton is not installed")
    from interpreter import Interpreter

    with Interpreter() as entered:
        yield entered


@pytest.fixture
def device() -> Iterator[Any]:
    """A GPU behind the interface of the simulator. A kernel's error fails the test that ran it."""
    from device import Device

    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    yield Device()
    torch.cuda.synchronize()
