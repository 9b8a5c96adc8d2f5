"""The benchmarks of ``make gpu`` as far as they run without a GPU: cells and sessions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_resnet.bench import gpu_cells, gpu_layers, gpu_networks
from fused_resnet.bench.clock import Clock, alternating
from fused_resnet.bench.gpu_session import measure_cells, with_ratios
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
    by_fusion = {f: [c for c in cells if c["fusion"] == f] for f in ("block", "conv", "none")}
    assert [len(c) for c in by_fusion.values()] == [5, 25, 52]
    assert cells[0]["what"] == "conv 7x7/2 3 to 64, 224x224 + bn + relu + maxpool"
    assert cells[0]["providers"] == ["eager", "cudnn", "live", "packed"]
    assert all(c["providers"] == ["eager"] for c in by_fusion["none"])
    assert len({(c["fusion"], c["what"]) for c in cells}) == len(cells)


@pytest.mark.parametrize(
    ("fusion", "part", "ok"),
    [
        ("block", "maxpool", {"eager", "live", "packed"}),
        ("block", "bottleneck/2 256 to 128-128-512", {"eager", "frozen"}),
        ("conv", "add", {"eager", "live", "packed"}),
        ("conv", "conv 1x1/2", {"eager", "live", "packed"}),
        ("none", "conv 3x3", {"eager"}),
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


def test_networks_and_training_steps() -> None:
    shape = {"model": "resnet18", "batch": 2, "precision": "bfloat16", "size": 32}
    cells = gpu_networks.cells()
    assert (cells[0]["model"], cells[0]["batch"]) == ("resnet50", 256)
    assert len([c for c in cells if c["providers"] == ["compile"]]) == 18
    rows = gpu_networks.run(
        **shape, providers=["fused", "frozen", "frozen+graph"], device="cpu", rounds=1
    )["rows"]
    assert [row["status"] for row in rows] == ["ok", "ok", "failed"]  # graphs are CUDA's
    assert [row["graph"] for row in rows] == [False, False, True]
    assert all(row["images_per_s"] > 0 for row in rows[:2])
    answer = gpu_networks.run_training(**shape, providers=["fused"], device="cpu", rounds=1)
    assert [row["status"] for row in answer["rows"]] == ["ok"]
    assert answer["rows"][0]["error"] < 0.1


def test_without_torchvision_the_unfused_network_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = gpu_networks._parameters("resnet18", 32)
    theirs = gpu_networks.unfused("resnet18")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    ours = gpu_networks.unfused("resnet18")
    x = torch.randn(2, 3, 64, 64)
    for model in (theirs, ours):
        model.load_state_dict(state)
    assert type(theirs).__module__ != type(ours).__module__
    with torch.no_grad():
        assert torch.equal(theirs.eval()(x), ours.eval()(x))


# Sessions: many cells, whatever single ones break


@pytest.fixture
def _targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))


def session(*cells: list[str], **how: Any) -> list[dict[str, Any]]:
    about = {"model": "m", "batch": 1, "precision": "p", "size": 8}
    return measure_cells(
        "gpu_targets:cell",
        [{**about, "number": i, "providers": names} for i, names in enumerate(cells)],
        **{"seconds": 100.0, "threads": 1, **how},
    )


def outcome(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {row["provider"] + ("+graph" if row["graph"] else ""): row["status"] for row in rows}


@pytest.mark.usefixtures("_targets")
def test_cells_share_a_process_until_one_breaks_it() -> None:
    rows = session(["a", "b"], ["c", "loses", "d"], ["e+graph"])
    assert outcome(rows) == {
        "a": "ok", "b": "ok", "loses": "failed", "c": "ok", "d": "ok", "e+graph": "ok",
    }  # fmt: skip
    pids = {row["provider"]: row.get("pid") for row in rows}
    assert pids["a"] == pids["b"]
    assert pids["a"] != pids["c"] == pids["d"] == pids["e"]


@pytest.mark.usefixtures("_targets")
def test_the_one_at_fault_is_found() -> None:
    rows = session(["a", "raises", "dies"], ["b"])
    assert outcome(rows) == {"a": "ok", "raises": "failed", "dies": "failed", "b": "ok"}
    reasons = {row["provider"]: row["reason"] for row in rows}
    assert "the whole cell failed" in reasons["raises"]
    assert "SIGKILL" in reasons["dies"]


@pytest.mark.usefixtures("_targets")
def test_one_that_does_not_end_is_ended() -> None:
    (row,) = session(["hangs"], cell_seconds=4.0)
    assert (row["status"], row["reason"]) == ("failed", "no answer within 4 s")


@pytest.mark.usefixtures("_targets")
def test_what_there_is_no_time_for_says_so() -> None:
    rows = session(["a", "b+graph"], seconds=1.0)
    assert outcome(rows) == {"a": "skipped", "b+graph": "skipped"}
    assert {row["reason"] for row in rows} == {"the time was up"}
    assert with_ratios(rows)[0]["ratio"] is None


@pytest.mark.usefixtures("_targets")
def test_ratios_are_to_eager() -> None:
    rows = with_ratios(session(["eager", "fused", "fused+graph"]))
    assert [row["ratio"] for row in rows] == [1.0, 2.5, 2.5]


def test_nothing_of_it_needs_rich_or_torchvision() -> None:
    """A bare machine has torch and pytest."""
    modules = ["clock", "gpu_cells", "gpu_layers", "gpu_networks", "gpu_session", "worker"]
    code = "import sys; sys.modules.update(rich=None, torchvision=None, matplotlib=None)\n"
    code += "import fused_resnet.verify.networks\n"
    code += "".join(f"import fused_resnet.bench.{name}\n" for name in modules)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
