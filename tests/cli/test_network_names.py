"""One grammar of networks in every command: names, near misses, and frozen files in their place."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

import fused_resnet as fr
from fused_resnet.cli import _common, main
from fused_resnet.models import sources

Capture = pytest.CaptureFixture[str]


def code_of(*arguments: str) -> int:
    try:
        return main(list(arguments))
    except SystemExit as stopped:
        return int(stopped.code or 0)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "served.safetensors"
    torch.manual_seed(0)
    fr.save_frozen(fr.cifar_resnet(20), path, labels=[f"label {i}" for i in range(10)])
    return path


def test_every_listed_name_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    names = [name for group in listed.values() for name in group]
    assert len(names) > 40
    assert [sources.parse(name) for name in names] == names
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in names)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["bench", "resnt50"], "did you mean resnet50"),
        (["tune", "hf:microsoft/resnet50"], "did you mean hf:microsoft/resnet-50"),
        (["classify", "p.png", "--model", "cifar_resnet55"], "did you mean cifar_resnet56"),
        (["freeze", "tochvision:resnet50", "--weights", "w", "--out", "f"], "unknown source"),
        (["roofline", "cifar_resnet20"], "'cifar_resnet20' is not one of this command's: resnet18"),
        (["verify", "--models", "resnet5O"], "did you mean resnet50"),
        (["tune", "none.safetensors"], "frozen file 'none.safetensors': there is no such file"),
        (["bench", "resnet18", "--dtype", "bfloat"], "did you mean bfloat16?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_near_misses(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert named in err
    assert err.count("\n") == 1


def test_a_file_stands_for_its_network(served: Path) -> None:
    file = _common.network_or_file(str(served))
    assert (file.network, file.classes) == ("cifar_resnet20", 10)
    assert _common.network_or_file("torchvision:resnet50").network == "resnet50"
    assert _common.own_network("torchvision:resnet50") == "resnet50"
    with pytest.raises(argparse.ArgumentTypeError, match="no such file"):
        _common.network_or_file("folder/none.pt")


@pytest.mark.thorough
def test_commands_take_a_file(
    served: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    image = pytest.importorskip("PIL.Image", reason="photographs")
    pytest.importorskip("torchvision", reason="transforms")
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(tmp_path / "tuning.json"))
    image.new("RGB", (40, 40), (200, 30, 40)).save(tmp_path / "p.png")
    assert main(["classify", str(tmp_path / "p.png"), "--model", str(served)]) == 0
    assert "label " in capsys.readouterr().out
    assert main(["tune", str(served), "--threads", "1"]) == 0
    assert "1x16x32x32" in capsys.readouterr().out
    quick = ["--batch", "1", "--rounds", "1", "--threads", "1", "--providers", "frozen"]
    assert main(["bench", str(served), *quick]) == 0
    assert "cifar_resnet20" in capsys.readouterr().out
