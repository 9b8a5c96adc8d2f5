"""What the command prints where there is no terminal, or a narrow one; and doubts on numbers."""

from __future__ import annotations

import re

import pytest
from rich.table import Table

from fused_resnet.bench import results
from fused_resnet.cli import _output
from fused_resnet.cli._common import console, progress

Capture = pytest.CaptureFixture[str]


def row(provider: str = "channels_last", **changes: object) -> results.Row:
    numbers = {"median_ms": 1234.5, "p20_ms": 1200.25, "p80_ms": 1300.75, "images_per_s": 12345.6}
    about = {"subject": "resnet50", "provider": provider, "batch": 16, "status": "ok", "threads": 2}
    rest = {"error": 3.1e-7, "ratio": 10.25, "ratio_to_best_peer": 10.25, "peak_mib": 12345.0}
    more = {"cores": 2.0, "baseline": "channels_last", "best_peer": "onnxruntime"}
    machine = {"load": 0.5, "processors": 2, "dtype": "float32", "size": 224}
    return numbers | about | rest | more | machine | changes


def printed(capsys: Capture, *objects: object) -> list[str]:
    capsys.readouterr()
    for thing in objects:
        console().print(thing)
    return capsys.readouterr().out.split("\n")


def test_a_table_of_results_fits_80_columns(capsys: Capture) -> None:
    lines = printed(capsys, results.table([row(), row("frozen_direct")], "a title"))
    assert max(map(len, lines)) <= 80
    assert all(line == line.rstrip() for line in lines)
    line = next(line for line in lines if "frozen_direct" in line)
    for number in ("16", "1234", "1200-1301", "12345.6", "10.25", "3.1e-07", "12345", "2.00"):
        assert number in line.split()


def test_digits_are_never_cut(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that needs more columns than there are gets them; words wrap."""
    monkeypatch.setenv("COLUMNS", "30")
    table = Table("words", *(f"n{i}" for i in range(8)))
    table.add_row("a few words that wrap", *(f"{1234.5678 * (i + 1):.4f}" for i in range(8)))
    text = "\n".join(printed(capsys, table))
    assert "…" not in text
    for i in range(8):
        assert f"{1234.5678 * (i + 1):.4f}" in text
    assert max(map(len, printed(capsys, "word " * 40))) <= 30


def test_without_a_terminal_there_is_no_colour(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("COLUMNS", raising=False)
    text = "\n".join(printed(capsys, "[bold red]FAIL[/]", Table("a", title="[green]b[/]")))
    assert "FAIL" in text
    assert not re.search("\x1b\\[[0-9;]*3[0-9]", text)


def test_progress_is_said_now_and_then(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(_output.time, "monotonic", lambda: now[0])
    with progress() as bar:
        task = bar.add_task("resnet50: eager", total=40)
        for step in range(40):
            now[0] = step * 1.0
            bar.update(task, advance=1, description=f"resnet50: round {step}")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        f"fused-resnet: resnet50: round {step} ({step + 1}/40)" for step in (10, 20, 30)
    ]


def test_doubts() -> None:
    assert results.doubts([row(), row("frozen")]) == []
    (line,) = results.doubts([row(), row("frozen", load=14.8)])
    assert line == "the machine was loaded (load 14.8 on 2 processors): measure again"
    (line,) = results.doubts([row(), row("frozen", p80_ms=1500.0), row("fused", status="failed")])
    assert line == "times spread widely, p20 to p80 over 20% of the median: frozen"
