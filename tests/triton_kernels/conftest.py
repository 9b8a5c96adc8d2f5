"""The hardened interpreter as a fixture."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

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


class Interpreted:
    """The host functions of the Triton backend on CPU tensors, by the names of operators."""

    def __init__(self, interpreter) -> None:
        from fused_resnet.backends import triton as kernels

        self._interpreter = interpreter
        self.ops = SimpleNamespace(**{name: getattr(kernels, name) for name in kernels.__all__})

    def launches(self) -> list:
        """Kernels that ran since the last call."""
        return self._interpreter.launches()

    def seed(self, seed: int) -> None:
        """In which order programs run."""
        self._interpreter.seed = seed


@pytest.fixture
def interpreted() -> Iterator[Interpreted]:
    from interpreter import Interpreter

    with Interpreter() as interpreter:
        yield Interpreted(interpreter)
