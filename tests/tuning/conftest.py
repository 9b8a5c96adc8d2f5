"""Fixtures of the tuner's tests."""

from __future__ import annotations

import pytest

from fused_resnet.tuning import cache as tuning_cache
from fused_resnet.tuning import tuner


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(tmp_path / "cache" / "tuning.json"))
    monkeypatch.setenv("FUSED_RESNET_TUNE", "1")
    monkeypatch.setattr(tuning_cache, "_warned", set())
    # These ask what is timed and stored, also on a busy machine and for candidates that sleep.
    monkeypatch.setattr(tuner, "QUIET", 0)
    tuner.forget()
    yield
    tuner.forget()
