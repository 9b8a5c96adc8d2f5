"""The paper's story: which networks are trained, what goes on, and what is drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_data

from fused_resnet.cli import main
from fused_resnet.models.sources import our_model
from fused_resnet.training import curves, story

pytest.importorskip("torchvision", reason="torchvision's transforms are what is run")
pytest.importorskip("yaml", reason="a run writes RUN/recipe.yaml")


def test_the_story(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two networks; the same command again trains nothing; another network is added."""
    archive = tiny_data.archive(tmp_path / "tiny.npz")
    out = tmp_path / "story"
    options = ["story", "--data", archive, "--out", str(out), "--epochs", "1", "--batch", "20"]
    assert main([*options, "--networks", "plain-20,residual-20"]) == 0
    printed, log = capsys.readouterr()
    assert log.count("images/s") == 2
    document = json.loads((out / "story.json").read_text())
    assert [n["network"] for n in document["networks"]] == ["plain-20", "residual-20"]
    assert document["settings"]["lr"] == 0.1
    assert document["command"].startswith("fused-resnet story --data")
    assert {"device", "versions", "commit", "isa"} <= document.keys()
    for network in document["networks"]:
        (entry,) = network["history"]
        assert network["train_error"] == pytest.approx(
            100 * (1 - entry["train_accuracy"]), abs=0.01
        )
        assert network["test_error"] == pytest.approx(100 * (1 - entry["val_accuracy"]), abs=0.01)
        assert f"{network['test_error']:.2f}" in printed
        lines = (out / network["network"] / "metrics.jsonl").read_text()
        assert json.loads(lines) == entry
    assert (out / "story.png").read_bytes().startswith(b"\x89PNG")

    assert main([*options, "--networks", "plain-20,residual-20"]) == 0
    assert "images/s" not in capsys.readouterr().err
    again = json.loads((out / "story.json").read_text())
    assert again["networks"] == document["networks"]

    assert main([*options, "--networks", "plain-20", "--seed", "1"]) == 2
    assert "was made with seed 0, got 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*options, "--networks", "plain-21"])
    assert "unknown network 'plain-21'" in capsys.readouterr().err


def test_plain_networks_are_residual_ones_without_shortcuts() -> None:
    for depth in (20, 32):
        plain, residual = (our_model(f"cifar_{kind}{depth}") for kind in ("plain", "resnet"))
        assert plain.state_dict().keys() == residual.state_dict().keys()
        assert not any(getattr(m, "residual", False) for m in plain.modules())
        convolutions = [key for key in plain.state_dict() if "conv" in key]
        assert len(convolutions) == depth - 1


def test_the_figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Plain left, residual right; training dashed, test solid; error in % against iterations."""
    pytest.importorskip("matplotlib", reason="it draws them")
    kept = []
    monkeypatch.setattr(curves, "_write", lambda figure, path: kept.append(figure))
    history = [
        {"step": step, "train_accuracy": a, "val_accuracy": b}
        for step, a, b in ((78, 0.25, 0.5), (156, 0.5, 0.625))
    ]
    histories = {(kind, depth): history for kind in ("plain", "residual") for depth in (20, 56)}
    histories.pop(("residual", 56))
    curves.save_story(tmp_path / "story.png", histories)
    left, right = kept[0].axes
    for axes, names in ((left, ["plain-20", "plain-56"]), (right, ["residual-20"])):
        assert [t.get_text() for t in axes.get_legend().get_texts()] == names
        assert axes.get_xlabel() == "iterations"
        assert axes.get_ylabel() == "error, %"
        dashed, solid = axes.lines[:2]
        assert (dashed.get_linestyle(), solid.get_linestyle()) == ("--", "-")
        assert list(dashed.get_xdata()) == [78, 156]
        assert list(dashed.get_ydata()) == [75, 50]
        assert list(solid.get_ydata()) == [50, 37.5]
    assert story.final_errors(history) == {
        "train_error": 50,
        "test_error": 37.5,
        "best_test_error": 37.5,
    }


def test_help_has_the_defaults_of_the_story(capsys: pytest.CaptureFixture[str]) -> None:
    """The paper's epochs and a warm-up, where `fused-resnet train` has others."""
    with pytest.raises(SystemExit):
        main(["story", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "passes over the training images (default: 164)" in words
    assert "epochs of linear warm-up (default: 1)" in words
    assert "(default: 128)" in words
