"""The roofline's layers as ``make gpu`` times them, as far as they run without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import warm_process

from fused_resnet.bench import gpu_cells, gpu_layers
from fused_resnet.bench.clock import Clock, alternating
from fused_resnet.bench.subject import Subject, UnavailableError

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


# Cells: providers measured together


def subject(error: float = 0.0, work: Any = lambda: None) -> Subject:
    return Subject(work, lambda: error)


def measured(providers: dict[str, Any]) -> dict[str, Any]:
    return gpu_cells.measure(
        providers, Clock(CPU), limit=0.1, scale=1e3, unit="ms", rounds=2, round_seconds=1e-4
    )


def test_a_wrong_answer_is_not_timed() -> None:
    def unavailable() -> Subject:
        raise UnavailableError("no such package")

    def failing() -> Subject:
        raise ValueError("broken\nsecond line")

    answer = measured(
        {
            "good": subject,
            "wrong": lambda: subject(0.2),
            "nan": lambda: subject(float("nan")),
            "unavailable": unavailable,
            "failing": failing,
        }
    )
    assert not answer["lost"]
    rows = answer["rows"]
    assert {name: row["status"] for name, row in rows.items()} == {
        "good": "ok",
        "wrong": "wrong",
        "nan": "wrong",
        "unavailable": "unavailable",
        "failing": "failed",
    }
    assert rows["failing"]["reason"] == "ValueError: broken"
    assert rows["nan"]["error"] is None
    assert "nan" in rows["nan"]["reason"]
    assert rows["unavailable"]["reason"] == "no such package"
    assert 0 < rows["good"]["p20_ms"] <= rows["good"]["median_ms"] <= rows["good"]["p80_ms"]
    assert "median_ms" not in rows["wrong"]


def test_an_error_during_timing_fails_a_provider_only_if_there_is_one() -> None:
    def breaks() -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    both = {"good": subject, "breaks": lambda: subject(work=breaks), "wrong": lambda: subject(1.0)}
    assert set(measured(both)["rows"]) == {"wrong"}
    rows = measured({"breaks": lambda: subject(work=breaks)})["rows"]
    assert rows["breaks"]["status"] == "failed"
    assert "while timed: RuntimeError: CUDA error" in rows["breaks"]["reason"]


def test_turns_alternate() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = alternating(Clock(CPU), calls, rounds=2, round_seconds=1e-9)
    assert set(times) == set("abc")
    assert all(len(values) == 6 for values in times.values())
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert "".join(turns) == "abc" + "abc" + "bca"


def test_settings_come_back() -> None:
    backends = torch.backends
    before = backends.cudnn.benchmark, backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32
    with gpu_cells.settings("tf32"):
        assert backends.cudnn.allow_tf32
        assert backends.cudnn.benchmark
    with gpu_cells.settings("float32"):
        assert not backends.cudnn.allow_tf32
    assert before == (
        backends.cudnn.benchmark,
        backends.cudnn.allow_tf32,
        backends.cuda.matmul.allow_tf32,
    )


# What is measured, on this processor


def test_layers_are_the_rooflines_kernels() -> None:
    cells = gpu_layers.cells("resnet50", 256, "bfloat16")
    by_fusion = {f: [c for c in cells if c["fusion"] == f] for f in ("block", "none")}
    assert {c["what"].split()[0] for c in by_fusion["block"]} == {"bottleneck", "bottleneck/2"}
    assert {c["what"].split()[0] for c in by_fusion["none"]} == {"bn", "relu", "add", "maxpool"}
    assert all(c["providers"] == ["eager", "cudnn", "frozen"] for c in by_fusion["block"])
    assert all(c["providers"] == ["eager"] for c in by_fusion["none"])
    assert len({(c["fusion"], c["what"]) for c in cells}) == len(cells)


@pytest.mark.parametrize(
    ("fusion", "part", "ok"),
    [
        ("block", "bottleneck/2 256 to 128-128-512", {"eager", "frozen"}),
        ("none", "relu", {"eager"}),
        ("none", "bn", {"eager"}),
        ("none", "add", {"eager"}),
        ("none", "maxpool", {"eager"}),
    ],
)
def test_every_kind_of_layer_gives_the_right_answer(fusion: str, part: str, ok: set[str]) -> None:
    """Held against float64 by the cell itself; cuDNN is not here."""
    cells = gpu_layers.cells("resnet50", 3, "float32", 48)
    cell = next(c for c in cells if c["fusion"] == fusion and part in c["what"])
    rows = gpu_layers.run(**cell, device="cpu", rounds=1)["rows"]
    found = {row["provider"]: row for row in rows}
    assert {name for name, row in found.items() if row["status"] == "ok"} == ok
    assert set(found) - ok <= {"cudnn"}
    for name in ok:
        assert found[name]["error"] < 1e-5
        assert found[name]["median_us"] > 0
        assert found[name]["what"] == cell["what"]


def test_nothing_of_it_needs_rich_or_torchvision() -> None:
    """A bare machine has torch and pytest."""
    names = ["autotune", "check_conv", "check_others", "check_training", "layers", "machine"]
    names += ["layers_training", "networks", "precompile", "roofline_layers", "sweep", "training"]
    modules = ["clock", "gpu_cells", "gpu_layers", *(f"gpu.{name}" for name in names)]
    code = "import sys; sys.modules.update(rich=None, torchvision=None, matplotlib=None)\n"
    code += "import fused_resnet.verify.networks\n"
    code += "".join(f"import fused_resnet.bench.{name}\n" for name in modules)
    done = warm_process.run(["-c", code])
    assert done.returncode == 0, done.stderr
