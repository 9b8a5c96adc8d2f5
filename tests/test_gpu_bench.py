"""What ``make gpu`` is made of, as far as it goes without a GPU: cells, sessions, results, phases.

The numbers in the results here are made up.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fused_resnet.bench import gpu_cells, gpu_layers, gpu_networks, gpu_results
from fused_resnet.bench.clock import Clock, alternating
from fused_resnet.bench.gpu_session import measure_cells, with_ratios
from fused_resnet.bench.subject import Subject, UnavailableError

ROOT = Path(__file__).resolve().parents[1]
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


def test_an_error_while_timed_blames_nobody_unless_there_is_but_one() -> None:
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


# Results


def layer(provider: str, **more: Any) -> dict[str, Any]:
    row = {"model": "resnet50", "fusion": "conv", "what": "conv 1x1", "batch": 256}
    row |= {"precision": "bfloat16", "provider": provider, "status": "ok", "reason": ""}
    return {**row, "error": 0.0, "median_us": 99.94, "bound_us": 61.4, **more}


def network(provider: str, **more: Any) -> dict[str, Any]:
    row = {"model": "resnet50", "batch": 256, "precision": "bfloat16", "provider": provider}
    row |= {"graph": False, "status": "ok", "reason": "", "error": 0.0, "median_ms": 12.5}
    return {**row, "images_per_s": 20480.0, "ratio": 1.25, **more}


def document(**parts: Any) -> dict[str, Any]:
    device = {"name": "A Card 80GB", "capability": "9.0", "memory_gib": 79.1}
    phase = {"name": "build", "status": "passed", "seconds": 99.0, "summary": "built"}
    return {
        "format": gpu_results.FORMAT,
        "device": {**device, "multiprocessors": 132, "driver": "1.2"},
        "versions": {"torch": "2", "triton": None},
        "commit": "abc",
        "command": "python benchmarks/gpu.py",
        "started": "a day",
        "seconds": 321.0,
        "phases": [{**phase, "command": "python setup.py", "log": []}],
        "layers": [layer("eager", median_us=200.0), layer("packed")],
        "networks": [network("eager"), network("frozen", graph=True)],
        "training": [],
        **parts,
    }


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


# The program


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
    files = sorted(path.name for path in (ROOT / "tests" / "gpu").glob("test_gpu_*.py"))
    assert sorted(Path(name).name for name in seen) == files
    found = gpu_results.load(running.path)
    assert {p["status"] for p in found["phases"][: len(files)]} == {"passed"}
    assert found["phases"][0]["summary"] == "3 passed in 1s"
    assert [p["status"] for p in found["phases"][len(files) :]] == ["passed", "failed", "passed"]
    assert found["networks"][0]["ratio"] == 1.0
    assert found["networks"][0]["model"] == "resnet50"


def test_nothing_of_it_needs_rich_or_torchvision() -> None:
    """A bare machine has torch and pytest."""
    modules = ["clock", "gpu_cells", "gpu_layers", "gpu_networks", "gpu_session", "worker"]
    code = "import sys; sys.modules.update(rich=None, torchvision=None, matplotlib=None)\n"
    code += "import fused_resnet.verify.networks\n"
    code += "".join(f"import fused_resnet.bench.{name}\n" for name in modules)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_roofline_reads_what_the_bench_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same kernels have the same names in both."""
    from fused_resnet.cli import main

    cells = gpu_layers.cells("resnet50", 256, "bfloat16")
    rows = [
        {**cell, "provider": cell["providers"][-1], "status": "ok", "reason": "", "median_us": 7.0}
        for cell in cells
    ]
    path = tmp_path / "gpu-x.json"
    device = {**document()["device"], "name": "NVIDIA H100 80GB HBM3"}
    path.write_text(json.dumps(document(layers=rows, device=device)))
    arguments = ["roofline", "resnet50", "--device", "H100", "--results", str(path), "--json"]
    for fusion in ("conv", "block", "none"):
        assert main([*arguments, "--fusion", fusion]) == 0
        found = json.loads(capsys.readouterr().out)["kernels"]
        missing = {k["path"] for k in found if k["cards"]["H100"]["measured_us"] is None}
        assert missing == {"avgpool", "fc"}
