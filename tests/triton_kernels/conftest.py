"""Triton's host functions in the hardened interpreter, as a fixture."""

from __future__ import annotations

from typing import Any

import pytest
from backends import Interpreted

try:
    import triton.language  # noqa: F401
except ImportError:
    collect_ignore_glob = ["test_*.py"]
    MISSING = "tests/triton_kernels: not collected, because Triton is not installed"
else:
    MISSING = ""


def pytest_terminal_summary(terminalreporter) -> None:
    if MISSING:
        terminalreporter.write_line(f"SKIPPED {MISSING}")


@pytest.fixture
def interpreted(interpreter: Any) -> Interpreted:
    """The host functions of ``fused_resnet.backends.triton`` on CPU tensors."""
    return Interpreted(interpreter)
