"""README: its examples run as printed, and its numbers, and those of docs/, were recorded."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
import warm_process

from fused_resnet.bench import results
from fused_resnet.bench.harness import Measurement

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"

pytestmark = pytest.mark.skipif(
    not README.exists(), reason="the package is tested without its repository: no README.md"
)


def examples() -> list[str]:
    """README's two, and the one of training by one command."""
    pages = (README, ROOT / "docs" / "train-command.md")
    texts = [page.read_text() for page in pages if README.exists()]
    pattern = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [code for text in texts for code in pattern.findall(text)]


def test_there_are_three_examples_of_about_ten_lines() -> None:
    assert len(examples()) == 3
    for code in examples():
        assert len(code.strip().splitlines()) <= 15


@pytest.mark.parametrize("number", [0, 1, 2], ids=["serving", "training", "a run"])
def test_example_runs(number: int, tmp_path: Path) -> None:
    done = warm_process.run(["-c", examples()[number]], cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def readme_table() -> Iterator[ModuleType]:
    path = ROOT / "benchmarks" / "readme_table.py"
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location("readme_table", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    monkeypatch.undo()


def timed(name: str, milliseconds: float) -> Measurement:
    return Measurement(name, error=1e-7, threads=2, times=[milliseconds / 1e3])


def test_table(readme_table: ModuleType) -> None:
    rows = results.rows(
        [
            timed("channels_last", 20),
            timed("openvino", 16),
            timed("frozen", 10),
            Measurement("fused", status="failed"),
            Measurement("ncnn", status="unavailable"),
        ],
        subject="resnet50",
        batch=4,
        dtype="float32",
        size=224,
        threads=2,
        environment={
            "device": "a processor",
            "commit": "abc",
            "versions": {"torch": "2", "fused_resnet": "1"},
        },
    )
    text = readme_table.section([("cpu-a.json", rows)])
    assert "a processor; torch 2; fused_resnet 1 at abc" in text
    assert "| resnet50 | 2 | 4 | OpenVINO, 250.0 | 400.0 (1.60) |  | failed | - / - |" in text
    fewer = [{**row, "threads": 1} for row in rows if row["provider"] in ("openvino", "frozen")]
    text = readme_table.section([("cpu-a.json", [*rows, *fewer])])
    assert "| resnet50 | 1 | 4 | OpenVINO of 1, 250.0 | 400.0 (1.60) |  |  | - / - |" in text
    assert "| resnet50 | 2 | 4 | OpenVINO, 250.0 |" in text


def test_without_results_the_table_says_so(readme_table: ModuleType) -> None:
    assert readme_table.section([]) == readme_table.NOTHING
    with pytest.raises(SystemExit, match="markers"):
        readme_table.replaced("a README without markers", "benchmarks", "")


def test_coverage_table(readme_table: ModuleType) -> None:
    """A row a family, its networks added up, reasons by how often they come."""
    rows = [
        {"family": "a", "network": "a:1", "groups": 5, "fused": 4, "left": {"why": 1}},
        {"family": "b", "network": "b:1", "groups": 3, "fused": 3, "left": {}},
        {"family": "a", "network": "a:2", "groups": 9, "fused": 2, "left": {"other": 6, "why": 1}},
    ]
    document = {
        "command": "fused-resnet coverage --json",
        "commit": "abc",
        "versions": {"torch": "2", "timm": None},
        "networks": [{**row, "operations": {}} for row in rows],
    }
    lines = readme_table.coverage_section(document).splitlines()
    assert lines[0] == "`fused-resnet coverage --json`, fused_resnet at abc; torch 2."
    assert lines[4:] == ["| a | 2 | 14 | 6 | 6: other; 2: why |", "| b | 1 | 3 | 3 |  |"]


def test_summary(readme_table: ModuleType) -> None:
    """The ratio to the best other of each case; cases without one do not count."""
    rows = [
        {**case, "provider": provider, "images_per_s": speed, "status": "ok"}
        for case, speeds in (
            ({"batch": 1}, {"ncnn": 10, "openvino": 20, "frozen": 30, "fused": 5}),
            ({"batch": 16}, {"openvino": 20, "frozen": 19}),
            ({"batch": 32}, {"frozen": 19}),
        )
        for provider, speed in speeds.items()
    ]
    named = [{**row, "dtype": "float32", "subject": "a", "size": 224, "threads": 1} for row in rows]
    text = readme_table.summary([("cpu-a.json", named)])
    assert "(OpenVINO)" in text
    assert text.endswith("in float32 0.95 to 1.50 times, median 1.23 (2 cases, 1 of them slower).")


def test_picture(readme_table: ModuleType) -> None:
    """A bar for each provider of a panel that was timed, as long as its speed."""
    about = {"dtype": "float32", "threads": 2, "device": "a & b", "status": "ok"}
    rows = [
        {**about, "subject": subject, "batch": batch, "provider": provider, "images_per_s": speed}
        for subject in ("resnet18", "resnet50")
        for batch in (1, 16)
        for provider, speed in (("frozen", 100.0), ("openvino", 50.0))
    ]
    svg = readme_table.picture([*rows, {**rows[0], "provider": "ncnn", "status": "failed"}])
    ElementTree.fromstring(svg)
    assert "2 threads of a &amp; b" in svg
    assert "ncnn" not in svg
    widths = [float(w) for w in re.findall(r'width="([0-9.]+)" height="14"', svg)]
    assert widths == [widths[0], widths[0] / 2] * 4


def test_readme_and_pages_show_the_recorded_results(readme_table: ModuleType) -> None:
    for path, text in readme_table.written().items():
        assert (ROOT / path).read_text() == text, f"{path}: run benchmarks/readme_table.py"


def test_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 150


def test_links_of_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", README.read_text())
    paths = [path for pair in links for path in pair if path and not path.startswith("https:")]
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []
