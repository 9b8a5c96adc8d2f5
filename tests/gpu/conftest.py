"""Everything here needs a GPU and a build with CUDA kernels for it; without, all of it is skipped.

Under ``make gpu`` (FUSED_RESNET_REQUIRE_GPU=1) what would be skipped for that reason fails.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fused_resnet as fr

#: The test after which the CUDA context was found unusable.
_lost = ""


class _WithoutGpu(pytest.Module):
    """A file of tests that are not even looked at, so that one line says why for all."""

    def collect(self) -> list[pytest.Item]:
        reason = f"no GPU to test on: {fr.backends()['cuda'].reason}"
        if os.environ.get("FUSED_RESNET_REQUIRE_GPU") == "1":
            raise self.CollectError(reason)
        pytest.skip(reason, allow_module_level=True)


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Module | None:
    return None if fr.backends()["cuda"] else _WithoutGpu.from_parent(parent, path=module_path)


@pytest.fixture(autouse=True, scope="session")
def _nothing_is_remembered(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What was once timed on this machine does not decide which backend is tested."""
    os.environ["FUSED_RESNET_CACHE"] = str(tmp_path_factory.mktemp("tuner") / "tuning.json")


@pytest.fixture(autouse=True)
def _precision() -> None:
    """Exact unless a test chooses otherwise: every fraction of a bit counts in comparisons."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(autouse=True)
def _errors_belong_to_their_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """A kernel's error shows at the next synchronisation: here, before another test is blamed.

    After an illegal access the context is gone, and whatever follows would fail without saying why.
    """
    global _lost
    if _lost:
        pytest.fail(f"not run: {_lost} left the CUDA context unusable", pytrace=False)
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        _lost = request.node.nodeid
        raise
