"""The window of ``make gpu``: its budget, its variables, its files, and a second one's."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_resnet.bench import gpu_results

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
if not (BENCHMARKS / "gpu_window").is_dir():
    pytest.skip(
        "the package is tested without its repository: no benchmarks/gpu_window",
        allow_module_level=True,
    )
sys.path.insert(0, str(BENCHMARKS))

from gpu_window import caches, card, commands, rehearsal, sanitizer, worst  # noqa: E402
from gpu_window.arguments import parse  # noqa: E402
from gpu_window.budget import FIRST, LIMIT, RESERVE, SECOND, Budget, Share  # noqa: E402
from gpu_window.document import document  # noqa: E402
from gpu_window.environment import environment  # noqa: E402
from gpu_window.steps import Steps  # noqa: E402
from gpu_window.window import Window  # noqa: E402

# The budget


@pytest.mark.parametrize("shares", [FIRST, SECOND], ids=["first", "second"])
@pytest.mark.parametrize("seconds", [LIMIT, 120.0])
def test_a_window_ends_in_time(shares: tuple[Share, ...], seconds: float) -> None:
    assert rehearsal.budget_problems(shares, seconds) == []


def deadlines(spent: list[float]) -> list[float]:
    """The deadlines of steps that use so many seconds each."""
    now = [0.0]
    budget = Budget(FIRST, LIMIT, lambda: now[0])
    found = []
    for share, seconds in zip(FIRST, spent, strict=False):
        found.append(budget.deadline(share.step))
        now[0] += seconds
    return found


def test_the_shares_are_those_of_the_plan() -> None:
    planned = [share.seconds for share in FIRST]
    assert sum(planned) + RESERVE == LIMIT
    ends = [75, 165, 300, 440, 500, 550]
    assert deadlines(planned)[1:] == pytest.approx(ends)


def test_an_early_step_leaves_its_time_and_a_late_one_takes_it_from_all() -> None:
    on_time = deadlines([60, 15, 90, 135])
    early, late = deadlines([20, 15, 90, 135]), deadlines([180, 15, 90, 135])
    assert early[1] < on_time[1]
    assert early[2] - 35 > on_time[2] - 75  # the step has more than its share
    assert 0 < late[2] - 195 < on_time[2] - 75
    assert max(late) <= LIMIT - RESERVE


def test_the_build_may_take_three_times_its_share() -> None:
    assert deadlines([60])[0] == 180


def test_more_than_the_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at most 550 s, got 600"):
        Budget([Share("all", 600)])


# Variables and jobs


def test_the_variables_are_set_before_any_process_starts(tmp_path: Path) -> None:
    """No job changes the tuner's mode but the one that measures it."""
    found = environment("9.0", tmp_path, "/cuda", rehearse=False, inherited={"PATH": "/bin"})
    assert found["FUSED_RESNET_TUNE"] == "0"
    assert found["FUSED_RESNET_ISAS"] == "portable"
    assert (found["FUSED_RESNET_CUDA"], found["TORCH_CUDA_ARCH_LIST"]) == ("1", "9.0")
    assert found["FUSED_RESNET_CACHE"] == str(tmp_path / "tuning.json")
    assert found["PATH"] == "/bin"
    steps = Steps(found, rehearse=False)
    compilers = [*steps.triton(), *steps.inductor()]
    jobs = [*compilers, *steps.machine(), *steps.correctness(), *steps.runtime()]
    jobs += [job for _, job in steps.layers()]
    assert {job.environment["FUSED_RESNET_TUNE"] for job in jobs} == {"0"}
    assert {job.environment["FUSED_RESNET_TUNE"] for _, job in steps.networks()} == {"1"}
    assert found["FUSED_RESNET_TUNE"] == "0"
    assert all(job.stub for job in compilers)
    assert len({(job.step, job.name) for job in jobs}) == len(jobs)


def test_every_test_of_a_gpu_belongs_to_one_step(tmp_path: Path) -> None:
    steps = Steps({}, rehearse=False)
    files = [name for job in [*steps.correctness(), *steps.runtime()] if "files" in job.options
             for name in job.options["files"]]  # fmt: skip
    there = {path.name for path in (ROOT / "tests" / "gpu").glob("test_gpu_*.py")}
    # The sanitizers have a step of their own.
    assert {Path(name).name for name in files if "/gpu/" in name} == there - {
        "test_gpu_sanitizer.py"
    }
    assert len(files) == len(set(files))
    assert all((ROOT / name).is_file() for name in files)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--seconds", "0"], "--seconds"),
        (["--caches", "no-such-file"], "--caches"),
        (["--rehearse", "--caches", __file__], "--rehearse"),
    ],
)
def test_wrong_arguments(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(words)
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err


def test_results_go_where_the_machine_takes_them_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", "/somewhere")
    assert parse([]).out == Path("/somewhere")
    assert parse(["--out", "/else"]).out == Path("/else")
    monkeypatch.delenv("OUT")
    assert parse([]).out == ROOT / "benchmarks" / "results"


def test_what_is_missing_is_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: nothing is missing")
    command = [sys.executable, str(BENCHMARKS / "gpu.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("gpu: missing: ")
    assert done.stderr.count("\n") == 1


# Steps that break


def test_a_step_that_raises_is_a_row_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the build fails: what needs it is not tried, and the archive is still written."""
    arguments = argparse.Namespace(
        out=tmp_path / "out", work=tmp_path / "work", seconds=LIMIT, rehearse=True, caches=None,
        commit="abc", sanitizer=None,
    )  # fmt: skip
    window = Window(arguments, {**card.REHEARSED, **card.processor()})
    for name in ("triton", "inductor"):
        monkeypatch.setattr(window.steps, name, list)

    def fail(end: float) -> bool:
        raise RuntimeError("no such header\nand more")

    monkeypatch.setattr(window, "_build", fail)
    assert window.run() == 1
    steps = {row["step"]: row for row in window.file.rows if row["case"] == "step"}
    assert set(steps) == {"build", "sanitizer"}
    assert steps["build"]["reason"].startswith("RuntimeError: no such header")
    assert window.archive.exists()
    found = gpu_results.load(window.stem.with_suffix(".json"))
    assert not gpu_results.passed(found)
    assert "no such header" in window.stem.with_suffix(".txt").read_text()


def test_commands_are_ended_with_what_they_started() -> None:
    done = commands.run(["bash", "-c", "echo begun; sleep 60 & sleep 60"], os.environ, 2)
    assert (done.status, done.output) == ("cut", "begun\n")
    assert done.note("step", "case")["reason"] == "its time was over"
    done = commands.run(["bash", "-c", "echo error: x; echo last; exit 3"], os.environ, 60)
    row = done.note("step", "case")
    assert (row["status"], row["reason"], row["log"][0]) == ("failed", "last", "error: x")
    done = commands.run(["bash", "-c", "kill -SEGV $$"], os.environ, 60)
    assert done.last_line == "ended by SIGSEGV"


@pytest.mark.parametrize(
    ("code", "output", "status"),
    [
        (0, "x: 1\nall calls were made\n========= ERROR SUMMARY: 0 errors", "ok"),
        (0, "x: 1\nall calls were made\n", "failed"),
        (0, "x: 1\n========= ERROR SUMMARY: 0 errors", "failed"),
        (99, "x: 1\n========= Invalid __global__ read of size 16 bytes\n", "wrong"),
        (None, "x: 1\n", "cut"),
    ],
)
def test_the_result_of_a_sanitizer(code: int | None, output: str, status: str) -> None:
    ended = {None: "cut", 0: "ok"}.get(code, "failed")
    done = commands.Done(("tool",), ended, 1.0, "========= COMPUTE-SANITIZER\n" + output)
    row = sanitizer.result_of(done, "memcheck", "cuda")
    assert row["status"] == status
    assert status == "ok" or row["reason"]


# The archive


def test_caches_come_back(tmp_path: Path) -> None:
    """To another folder, of which Triton's cache then has the paths."""
    work, archive, rows = tmp_path / "work", tmp_path / "a.tar.xz", tmp_path / "r.jsonl"
    kernel = work / "triton" / "key"
    kernel.mkdir(parents=True)
    (kernel / "kernel.cubin").write_bytes(os.urandom(1000))
    (kernel / "kernel.ptx").write_text("for people")
    paths = {name: str(kernel / name) for name in ("kernel.cubin", "kernel.ptx")}
    (kernel / "__grp__kernel.json").write_text(json.dumps({"child_paths": paths}))
    (work / "tuning.json").write_text("{}")
    rows.write_text('{"kind": "note"}\n')
    assert caches.save(work, rows, archive).startswith("2 kernels and files")
    again = tmp_path / "again"
    again.mkdir()
    (again / "old").write_text("is removed")
    found = caches.restore(archive, again)
    assert found is not None
    assert found.read_text() == rows.read_text()
    group = json.loads((again / "triton" / "key" / "__grp__kernel.json").read_text())
    cubin, ptx = (Path(path) for path in group["child_paths"].values())
    assert again in cubin.parents
    assert cubin.read_bytes() == (kernel / "kernel.cubin").read_bytes()
    # It exists, or the kernel would be compiled again, and it takes no room.
    assert ptx.read_bytes() == b""
    assert not (again / "old").exists()


def test_an_archive_keeps_to_its_limit_and_to_its_rows(tmp_path: Path) -> None:
    """Whole kernels are left out, the largest first."""
    work, archive, rows = tmp_path / "work", tmp_path / "a.tar.xz", tmp_path / "r.jsonl"
    for i in range(8):
        folder = work / "triton" / str(i)
        folder.mkdir(parents=True)
        for name in ("a.cubin", "a.json"):
            (folder / name).write_bytes(os.urandom(500 * (i + 1)))
    rows.write_text("rows\n")
    text = caches.save(work, rows, archive, limit=12_000)
    assert archive.stat().st_size <= 12_000
    assert "large ones left out" in text
    with tarfile.open(archive) as tar:
        names = set(tar.getnames())
    assert {"rows.jsonl", "triton/0/a.cubin", "triton/0/a.json"} <= names
    assert not {"triton/7/a.cubin", "triton/7/a.json"} & names
    assert [path.name for path in tmp_path.glob("*.part")] == []


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("no archive")
    with pytest.raises(ValueError, match="expected the caches of a window"):
        caches.restore(tmp_path / "x", tmp_path / "work")


# Rows to results


def row(what: str, provider: str, median: float, **more: Any) -> dict[str, Any]:
    found = {"kind": "time", "step": "layers", "case": what, "status": "ok", "t": 1.0}
    found |= {"what": what, "provider": provider, "batch": 256, "precision": "bfloat16"}
    found |= {"unit": "us", "median": median, "p20": median, "p80": median, "samples": 7}
    return {**found, "fusion": "conv", "error": 0.0, "bound": None, "count": 1, **more}


def test_the_worst_layers_lose_most_in_a_network() -> None:
    rows = [
        row("often", "triton", 30.0, bound=20.0, count=5),
        row("often", "cuda, tile 1, split 1", 28.0, bound=20.0, count=5),
        row("once", "cuda", 50.0, bound=20.0),
        row("unknown card", "cuda", 30.0),
        row("unknown card", "cudnn", 25.0),
        row("good", "cuda", 10.0, bound=9.0),
        row("broken", "cuda", 1e6, status="wrong", reason="x"),
    ]
    assert worst.worst_layers(rows, 3) == ["often", "once", "unknown card"]
    assert len(worst.worst_layers([])) == 5


def test_rows_become_a_document_that_says_what_is_wrong() -> None:
    about = {"step": "correctness", "t": 2.0, "backend": "cuda", "operation": "bn_add_relu"}
    about |= {"kind": "check", "case": "c", "what": "64, 56x56", "plan": "p", "precision": "b"}
    note = {"kind": "note", "step": "build", "case": "extension", "status": "ok", "t": 1.0}
    network = {"unit": "ms", "fusion": None, "images_per_s": 100.0}
    rows = [
        {**note, "summary": "built", "seconds": 50.0},
        {**about, "status": "ok", "error": 1e-3, "limit": 2e-3},
        {**about, "status": "wrong", "reason": "relative error 1"},
        row("conv 1x1", "eager", 9.0),
        row("conv 1x1", "triton, 128x64x64, 4 warps, 4 stages", 5.0),
        row("conv 1x1", "triton, 64x64x64, 4 warps, 4 stages", 4.0),
        row("conv 1x1", "cuda", 6.0, status="failed", reason="no kernel"),
        row("inference of resnet50", "eager", 10.0, **network),
        row("inference of resnet50", "frozen, auto", 4.0, **network),
    ]
    head = {"device": {**card.REHEARSED}, "versions": {}, "commit": "abc", "command": "gpu"}
    found = document(rows, {**head, "started": "now", "seconds": 3.0, "tune": "0"})
    assert not gpu_results.passed(found)
    assert [r["ratio"] for r in found["networks"]] == [1.0, 2.5]
    assert len(found["layers"]) == 4
    text = gpu_results.summary(found)
    assert "4.0 (64x64x64, 4 warps, 4 stages)" in text
    assert "1 ok, 1 wrong" in text
    assert "64, 56x56, b, p: relative error 1" in text
    assert "no kernel" in text
    phases = {phase["name"]: phase["status"] for phase in found["phases"]}
    assert phases == {"build: extension": "passed", "checks: cuda bn_add_relu": "failed"}
