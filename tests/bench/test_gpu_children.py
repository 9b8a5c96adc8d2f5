"""The child processes of ``make gpu``: whatever single cases break, every other row is there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_children
import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
if not (BENCHMARKS / "gpu_window").is_dir():
    pytest.skip(
        "the package is tested without its repository: no benchmarks/gpu_window",
        allow_module_level=True,
    )
sys.path.insert(0, str(BENCHMARKS))

from gpu_window import rows  # noqa: E402
from gpu_window.children import Job, Jobs  # noqa: E402

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, BENCHMARKS, ROOT / "tests"))),
}

#: Enough for a process to start on a busy machine.
LONG = 300.0


@pytest.fixture
def _warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most begin with PyTorch imported; those without this start from nothing."""
    gpu_children.start_warm(monkeypatch)


def job(*names: str, **options: Any) -> Job:
    more = {"names": list(names), **options}
    return Job("toys", "toy", "gpu_toys", more, ENVIRONMENT, stub=True, rehearse=True)


def run(tmp_path: Path, *jobs: Job, seconds: float = LONG) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    Jobs(jobs, time.monotonic() + seconds, found.append, tmp_path).wait()
    return found


def outcome(found: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(row["case"], row["status"]) for row in found]


def test_one_process_goes_on_until_it_dies(tmp_path: Path) -> None:
    found = run(tmp_path, job("a", "raises", "lacks", "dies", "b"))
    assert outcome(found) == [
        ("a", "ok"), ("raises", "failed"), ("lacks", "unavailable"), ("dies", "ok"),
        ("dies", "failed"), ("b", "ok"),
    ]  # fmt: skip
    by_case = {row["case"]: row for row in found}
    assert by_case["raises"]["reason"] == "ValueError: first line"
    assert by_case["lacks"]["reason"] == "pip install something"
    assert "SIGKILL" in by_case["dies"]["reason"]
    assert by_case["a"]["pid"] == found[3]["pid"]
    assert by_case["b"]["pid"] != by_case["a"]["pid"]
    assert {row["step"] for row in found} == {"toy"}
    assert not [text for row in found for text in rows.problems({**row, "t": 0.0})]


@pytest.mark.usefixtures("_warm")
def test_a_case_over_its_time_is_cut_and_the_rest_is_named(tmp_path: Path) -> None:
    """The time begins when the process has started, however busy the machine is."""
    found: list[dict[str, Any]] = []
    jobs: list[Jobs] = []

    def sink(row: dict[str, Any]) -> None:
        found.append(row)
        if row["case"] == "hangs":
            jobs[0]._stop.set()

    jobs.append(Jobs([job("a", "hangs", "b", "c")], time.monotonic() + LONG, sink, tmp_path))
    jobs[0].wait()
    assert outcome(found) == [("a", "ok"), ("hangs", "ok"), ("hangs", "cut"), ("", "skipped")]
    assert found[-1]["reason"] == "the time was up for 2: b, c"
    with pytest.raises(ProcessLookupError):
        os.kill(found[0]["pid"], 0)


@pytest.mark.usefixtures("_warm")
def test_a_process_that_cannot_start_is_a_row(tmp_path: Path) -> None:
    wrong = Job("none", "toy", "no_such_module", {}, ENVIRONMENT, stub=True, rehearse=True)
    (row,) = run(tmp_path, wrong)
    assert (row["case"], row["status"]) == ("none", "failed")
    assert "no_such_module" in row["reason"]


@pytest.mark.usefixtures("_warm")
def test_no_time_at_all(tmp_path: Path) -> None:
    """What ends before it has said which cases it has is a row too."""
    (row,) = run(tmp_path, job("a"), seconds=0.0)
    assert row["status"] == "skipped"
    assert "toys" in row["reason"]


@pytest.mark.usefixtures("_warm")
def test_a_pause_stops_and_continues(tmp_path: Path) -> None:
    found: list[dict[str, Any]] = []
    jobs = Jobs([job("a", "hangs")], time.monotonic() + LONG, found.append, tmp_path)
    while len(found) < 2:
        time.sleep(0.05)

    def state() -> str:
        return Path(f"/proc/{found[0]['pid']}/stat").read_text().rsplit(")", 1)[1].split()[0]

    with jobs.paused():
        deadline = time.monotonic() + LONG
        while state() != "T" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert state() == "T"
    assert state() != "T"
    jobs.stop()


def test_a_kill_loses_no_row(tmp_path: Path) -> None:
    """The parent is killed without a warning while a child works; its file has all until then."""
    program = (
        "import json, sys, time\n"
        "from pathlib import Path\n"
        "from gpu_window.children import Job, Jobs\n"
        "from gpu_window.rows import RowFile\n"
        "folder = Path(sys.argv[1])\n"
        "file = RowFile(folder / 'rows.jsonl', time.monotonic)\n"
        "job = Job('toys', 'toy', 'gpu_toys', {'names': ['a', 'b', 'hangs']}, stub=True,"
        " rehearse=True)\n"
        "def sink(row):\n"
        "    file.add(row)\n"
        "    print(row['pid'], row['case'], flush=True)\n"
        "Jobs([job], time.monotonic() + 300, sink, folder).wait()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert parent.stdout is not None
    told = [parent.stdout.readline().split() for _ in range(3)]
    parent.kill()
    parent.wait()
    os.kill(int(told[0][0]), signal.SIGKILL)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"kind": "note", "ste')  # the line that a kill cuts off
    assert [row["case"] for row in rows.read(tmp_path / "rows.jsonl")] == ["a", "b", "hangs"]


@pytest.mark.usefixtures("_warm")
def test_a_malformed_row_is_kept_as_a_failure(tmp_path: Path) -> None:
    file = rows.RowFile(tmp_path / "rows.jsonl", lambda: 1.5)
    for row in run(tmp_path, job("malformed")):
        file.add(row)
    file.close()
    (row,) = rows.read(tmp_path / "rows.jsonl")
    assert row["status"] == "failed"
    assert "what: expected str, got None" in row["reason"]
    assert json.loads((tmp_path / "rows.jsonl").read_text()) == row
    assert not rows.problems(row)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"median": float("nan")}, "median"),
        ({"median": None}, "median"),
        ({"samples": -1}, "samples"),
        ({"batch": "256"}, "batch"),
        ({"status": "fine", "reason": "r"}, "status"),
        ({"status": "wrong"}, "reason"),
        ({"kind": "guess"}, "kind"),
    ],
)
def test_what_a_row_must_have(change: dict[str, Any], said: str) -> None:
    row = {"kind": "time", "step": "s", "case": "c", "status": "ok", "t": 0.0, "what": "w"}
    row |= {"provider": "p", "batch": 1, "precision": "bfloat16", "unit": "us"}
    row |= {"median": 1.0, "p20": 1.0, "p80": 1.0, "samples": 7}
    assert rows.problems(row) == []
    found = rows.problems({**row, **change})
    assert len(found) == 1
    assert found[0].startswith(said)
