"""``benchmarks/gpu.py``, the program of ``make gpu``, with its commands replaced."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from gpu_documents import document

from fused_resnet.bench import gpu_results

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    path = ROOT / "benchmarks" / "gpu.py"
    if not path.exists():
        pytest.skip("the package is tested without its repository: no benchmarks/gpu.py")
    spec = importlib.util.spec_from_file_location("gpu", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_missing_is_one_line(gpu: ModuleType) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: nothing is missing")
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("gpu: missing: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--phases", "build,none"], "'none'"), (["--minutes", "0"], "--minutes")],
)
def test_wrong_arguments(
    gpu: ModuleType, arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu.parse(arguments)
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err


def test_commands_are_ended_with_what_they_started(gpu: ModuleType) -> None:
    done = gpu.run(["bash", "-c", "echo begun; sleep 60 & sleep 60"], {}, 0.5)
    assert done.status == "timeout"
    assert done.seconds < 10
    assert done.output.split() == ["begun", "ended", "after", "0", "s"]
    done = gpu.run(["bash", "-c", "echo FAILED a::b; echo last; exit 3"], {}, 10)
    status, _, summary, command, log = done.noted(done.last_line())
    assert (status, summary) == ("failed", "last")
    assert command.startswith("bash -c")
    assert log[0] == "FAILED a::b"
    done = gpu.run(["bash", "-c", "kill -SEGV $$"], {}, 10)
    assert done.last_line() == "ended by SIGSEGV"


def card() -> dict[str, Any]:
    return {**document()["device"], "processor": "x", "cores": 1}


def test_a_run_whose_build_fails(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    """The rest is not tried, and all is written down."""
    commands = []

    def run(command: list[str], environment: dict[str, str], limit: float) -> Any:
        commands.append(command)
        assert environment["TORCH_CUDA_ARCH_LIST"] == "9.0"
        status = "passed" if "simulator.py" in command[1] else "failed"
        return gpu.Run(command, status, 1.0, "error: no such header\n")

    for name, value in {
        "run": run, "describe_device": card, "versions": lambda home: {}, "commit": lambda: "abc",
        "preflight": lambda: ([], ["a note"]),
    }.items():  # fmt: skip
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    assert gpu.main() == 1
    out = capsys.readouterr().out
    assert "gpu: a note" in out
    assert "error: no such header" in out
    found = gpu_results.load(tmp_path / "gpu-a-card-80gb.json")
    assert [(p["name"], p["status"]) for p in found["phases"]] == [
        ("build", "failed"),
        ("import", "failed"),
        ("tests", "skipped"),
        ("layers", "skipped"),
        ("training", "skipped"),
        ("networks", "skipped"),
    ]
    assert (tmp_path / "gpu-a-card-80gb.txt").read_text() == gpu_results.summary(found)


def test_tests_run_file_by_file_and_benches_gather_rows(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[str] = []

    def run(command: list[str], environment: dict[str, str], limit: float) -> Any:
        seen.append(command[-1])
        assert environment["FUSED_RESNET_REQUIRE_GPU"] == "1"
        return gpu.Run(command, "passed", 1.0, "=== 3 passed in 1s ===")

    def measure(target: str, cells: list[dict[str, Any]], **how: Any) -> list[dict[str, Any]]:
        assert target.startswith("fused_resnet.bench.gpu_")
        how["begun"](cells[0], cells[0]["providers"])
        status = "wrong" if target.endswith("training") else "ok"
        row = {**cells[0], "graph": False, "status": status, "reason": "", "median_ms": 1.0}
        return [{**row, "provider": "eager", "bound_us": None, "images_per_s": 1.0}]

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "describe_device", card)
    monkeypatch.setattr(gpu, "versions", lambda home: {})
    monkeypatch.setattr("fused_resnet.bench.gpu_session.measure_cells", measure)
    running = gpu.Session(gpu.parse(["--out", str(tmp_path)]))
    for name in ("tests", "layers", "training", "networks"):
        running.run(name)
    tests = ROOT / "tests"
    paths = [*(tests / "gpu").glob("test_gpu_*.py"), *(tests / "conformance").glob("test_*.py")]
    files = sorted(path.name for path in paths)
    assert sorted(Path(name).name for name in seen) == files
    found = gpu_results.load(running.path)
    assert {p["status"] for p in found["phases"][: len(files)]} == {"passed"}
    assert found["phases"][0]["summary"] == "3 passed in 1s"
    assert [p["status"] for p in found["phases"][len(files) :]] == ["passed", "failed", "passed"]
    assert found["networks"][0]["ratio"] == 1.0
    assert found["networks"][0]["model"] == "resnet50"
