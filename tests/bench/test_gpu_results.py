"""The results file of ``make gpu``: its summary, and how the roofline reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_documents import document, layer, network

from fused_resnet.bench import gpu_results
from fused_resnet.bench.gpu import layers, roofline_layers
from fused_resnet.bench.gpu.cases import Target

ROOT = Path(__file__).resolve().parents[2]


def test_summary() -> None:
    text = gpu_results.summary(document())
    assert "A Card 80GB, capability 9.0, 79 GiB, 132 multiprocessors, driver 1.2" in text
    assert "torch 2\n" in text
    assert "Layers, batch 256, bfloat16, fusion conv: microseconds" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["conv", "1x1", "61.4", "200.0", "99.9"] in lines
    assert ["resnet50", "256", "bfloat16", "frozen,", "graph", "12.500", "20480", "1.25"] in lines
    assert "Training" not in text
    assert "Not passed" not in text


def test_summary_says_what_was_not_passed_and_where() -> None:
    log = ["FAILED tests/gpu/test_gpu_runtime.py::test_x", "the end"]
    phase = {"name": "tests: x", "status": "failed", "seconds": 1.0, "summary": "1 failed"}
    found = document(
        phases=[{**phase, "command": "pytest x", "log": log}],
        layers=[layer("packed", status="wrong", reason="relative error 2e-1")],
        networks=[network("compile", status="skipped", reason="the time was up", ratio=None)],
    )
    text = gpu_results.summary(found)
    tail = text[text.index("Not passed") :]
    for line in (
        "tests: x: failed: pytest x",
        "    FAILED tests/gpu/test_gpu_runtime.py::test_x",
        "conv 1x1, batch 256, bfloat16, packed: wrong: relative error 2e-1",
        "resnet50, batch 256, bfloat16, compile: skipped: the time was up",
    ):
        assert line in tail
    assert not gpu_results.passed(found)


@pytest.mark.parametrize(
    ("parts", "passed"),
    [
        ({}, True),
        ({"networks": [network("compile", status="skipped")]}, True),
        ({"networks": [network("compile", status="unavailable")]}, True),
        ({"training": [network("fused", status="failed")]}, False),
        ({"layers": [layer("packed", status="wrong")]}, False),
    ],
)
def test_passed(parts: dict[str, Any], passed: bool) -> None:
    assert gpu_results.passed(document(**parts)) == passed


def test_files(tmp_path: Path) -> None:
    name = gpu_results.file_name("NVIDIA H100 80GB HBM3")
    assert name == "gpu-nvidia-h100-80gb-hbm3.json"
    gpu_results.save(tmp_path / name, document())
    assert gpu_results.load(tmp_path / name) == document()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_measured_times_are_ours_with_fusion_and_pytorchs_without() -> None:
    found = document(
        layers=[
            layer("eager", median_us=5.0),
            layer("live", median_us=2.0),
            layer("packed", median_us=1.0),
            layer("packed", batch=1, median_us=7.0),
            layer("eager", what="maxpool 3x3/2", median_us=3.0),
            layer("eager", what="conv + bn", median_us=4.0),
            layer("eager", fusion="none", what="bn", median_us=6.0),
        ]
    )
    shape = {"batch": 256, "precision": "bfloat16"}
    times = gpu_results.measured_us(found, fusion="conv", **shape)
    assert times["conv 1x1"] == 1.0
    assert times["maxpool 3x3/2"] == 3.0
    assert "conv + bn" not in times
    assert gpu_results.measured_us(found, fusion="none", **shape) == {"bn": 6.0}


def test_the_roofline_reads_what_the_bench_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same kernels have the same names in both."""
    from fused_resnet.cli import main

    def none(backend: str) -> Any:
        raise AssertionError(backend)

    target = Target(torch.device("cpu"), False, none, none)
    cases = [*layers.cases(target), *roofline_layers.cases(target)]
    # A case of a convolution also times it without what follows it.
    convs = {c.about["what"].partition(" + ")[0] for c in cases if c.about["fusion"] == "conv"}
    alone = [{**cases[0].about, "fusion": "none", "what": conv} for conv in convs]
    rows = [
        {"provider": "eager" if about["fusion"] == "none" else "cuda", **about}
        for about in [*(case.about for case in cases), *alone]
    ]
    rows = [{**row, "status": "ok", "reason": "", "median_us": 7.0} for row in rows]
    path = tmp_path / "gpu-x.json"
    device = {**document()["device"], "name": "NVIDIA H100 80GB HBM3"}
    path.write_text(json.dumps(document(layers=rows, device=device)))
    arguments = ["roofline", "resnet50", "--device", "H100", "--results", str(path), "--json"]
    for fusion in ("conv", "block", "none"):
        assert main([*arguments, "--fusion", fusion]) == 0
        found = json.loads(capsys.readouterr().out)["kernels"]
        missing = {k["path"] for k in found if k["cards"]["H100"]["measured_us"] is None}
        assert missing == {"avgpool", "fc"}
