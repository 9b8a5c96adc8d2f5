"""The children of ``make gpu`` as copies of a process that has imported PyTorch."""

from __future__ import annotations

from pathlib import Path

import pytest
import warm_process

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def start_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on to the end of the test."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu_window import children

    warm_process.instead_of_popen(monkeypatch, children)
