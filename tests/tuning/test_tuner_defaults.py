"""The shipped table of timings."""

from __future__ import annotations

import json

import pytest
import torch
from candidates import FAST, choose

from fused_resnet.tuning import defaults as tuning_defaults
from fused_resnet.tuning import tuner

CONV = (
    "conv_bn_add_relu(1x64x56x56 float32 channels_last, 64x64x3x3 float32 channels_last, None, "
    "64 float32, 64 float32, 64 float32, 64 float32, None, (1, 1), (1, 1), (1, 1), 1, 1e-05, relu)"
)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table with one entry, of a separate instruction set."""
    file = tmp_path / "defaults.json"
    some = {"calls": {CONV: {"cpu": 2.0, "library": 1.0}}}
    file.write_text(json.dumps({"devices": {"cpu": {"some": some}, "cuda": {}}}))
    monkeypatch.setattr(tuning_defaults, "FILE", file)
    entries = tuning_defaults._entries
    entries.cache_clear()
    yield
    entries.cache_clear()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, True),
        ({"1x64x56x56": "2x64x56x56"}, True),  # twice the pixels
        ({"1x64x56x56": "1x64x40x40"}, True),
        ({"1x64x56x56": "4x64x56x56"}, False),  # four times
        ({"64x64x3x3": "128x64x3x3", "1x64x56x56": "2x64x56x56"}, False),  # twice, twice
        ({"1x64x56x56": "4x64x28x28"}, False),  # as many pixels, in other images
        ({"64x64x3x3": "128x64x3x3"}, True),
        ({"64x64x3x3": "64x64x1x1"}, False),
        ({"float32": "bfloat16"}, False),
        ({"56 float32 channels_last": "56 float32 contiguous"}, False),
        ({"None, (1, 1), (1, 1)": "None, (2, 2), (1, 1)"}, False),
        ({"64 float32, None, (1": "64 float32, 1x64x56x56 float32 channels_last, (1"}, False),
        ({", relu)": ", none)"}, False),
        ({"conv_bn_add_relu": "bn_add_relu"}, False),
    ],
    ids=str,
)
def test_the_nearest_entry(table, change, found):
    key = CONV
    for old, new in change.items():
        assert old in key
        key = key.replace(old, new)
    assert bool(tuning_defaults.nearest("cpu", "some", key)) == found
    assert bool(tuning_defaults.nearest("cpu", "some_bf16", key)) == found  # as it is float32
    assert tuning_defaults.nearest("cpu", "another", key) == {}
    assert tuning_defaults.nearest("cuda", "some", key) == {}


def test_a_nearer_entry_wins(table, monkeypatch):
    far, near = CONV.replace("1x64x56x56", "1x64x44x44"), CONV.replace("1x64x56x56", "1x64x54x54")
    entries = [
        (tuning_defaults.read_key(key), {"cpu": ms}) for key, ms in ((near, 1.0), (far, 2.0))
    ]
    for order in (entries, entries[::-1]):
        monkeypatch.setattr(tuning_defaults, "_entries", lambda device, isa, order=order: order)
        assert tuning_defaults.nearest("cpu", "some", CONV) == {"cpu": 1.0}


def test_the_shipped_table_agrees_with_its_description():
    document = json.loads(tuning_defaults.FILE.read_text())
    assert document["made by"] == "python benchmarks/tuning_defaults.py"
    assert "at most 1." in document["rule"]
    assert document["devices"]["cuda"] == {}
    assert "no GPU has measured" in document["about"]
    assert set(document["devices"]["cpu"]) == {"avx2", "avx512"}
    for isa, table in document["devices"]["cpu"].items():
        for key, times in table["calls"].items():
            assert tuning_defaults.read_key(key) is not None
            assert set(times) == {"cpu", "library"}
            assert tuning_defaults.nearest("cpu", isa, key) == times


@pytest.mark.parametrize("isa", ["avx512", "avx512_bf16", "amx", "avx2"])
def test_instruction_sets_with_the_same_kernels_share_a_table(isa):
    assert tuning_defaults.table_of(isa, "bfloat16") == isa
    assert tuning_defaults.table_of(isa, "float32") == ("avx2" if isa == "avx2" else "avx512")


@pytest.mark.parametrize("off", ["FUSED_RESNET_TUNE=0", "deterministic"])
def test_the_table_decides_where_nothing_is_timed(off, monkeypatch):
    monkeypatch.setattr(tuner, "measure", lambda *arguments: pytest.fail("timed"))
    asked = []

    def nearest(device, isa, key):
        asked.append((device, key))
        return {"cpu": 2.0, "library": 1.0}

    monkeypatch.setattr(tuning_defaults, "nearest", nearest)
    if off == "deterministic":
        torch.use_deterministic_algorithms(True)
    else:
        monkeypatch.setenv("FUSED_RESNET_TUNE", "0")
    try:
        assert choose(cpu=FAST, library=FAST) == "library"
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [("cpu", "op(2x3 float32)")]


def test_no_table_for_empty_or_traced_calls(monkeypatch):
    monkeypatch.setattr(tuning_defaults, "nearest", lambda *arguments: pytest.fail("asked"))
    monkeypatch.setenv("FUSED_RESNET_TUNE", "0")
    candidates = {"cpu": FAST, "library": FAST}
    assert tuner.choose("op", "cpu", candidates, (torch.zeros(0, 3, 4, 4),)) == "cpu"

    def call(x):
        assert tuner.choose("op", "cpu", candidates, (x,)) == "cpu"
        return x + 1

    torch.jit.trace(call, torch.zeros(1, 3, 4, 4), check_trace=False)
