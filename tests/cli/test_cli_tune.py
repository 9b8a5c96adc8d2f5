"""``fused-resnet tune``, ``bench --explain`` and the tuner's line of ``info``."""

from __future__ import annotations

import json

import pytest
import torch

from fused_resnet import fuse, resnet18
from fused_resnet.cli import main
from fused_resnet.cli._choices import calls_of
from fused_resnet.tuning import cache as tuning_cache
from fused_resnet.tuning import tuner


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(tmp_path / "tuning.json"))
    monkeypatch.setenv("FUSED_RESNET_TUNE", "1")
    monkeypatch.setattr(tuner, "QUIET", 0)  # these ask what is stored, on a busy machine too
    threads = torch.get_num_threads()
    tuner.forget()
    yield
    tuner.forget()
    torch.set_num_threads(threads)


def test_calls_of_a_network():
    """The stem, and 19 convolutions: 2 kinds in stage 1, 4 in each other stage."""
    images = torch.zeros(1, 3, 64, 64).to(memory_format=torch.channels_last)
    model = fuse(resnet18().eval()).to(memory_format=torch.channels_last)
    calls = calls_of(model, images)
    assert sum(count for _, count in calls) == 20
    assert len(calls) == 15
    assert not tuning_cache.path().exists()


def test_tune_keeps_what_it_times(capsys, monkeypatch):
    assert main(["tune", "resnet18", "--size", "32", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "library, ms" in out
    assert "stored in" in out
    machine = tuner.machine_of(torch.device("cpu"))
    assert len(tuning_cache.load(machine)) > 5
    # A later process times nothing.
    tuner.forget()
    monkeypatch.setattr(tuner, "measure", lambda *arguments: pytest.fail("timed"))
    model = fuse(resnet18().eval()).to(memory_format=torch.channels_last)
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32).to(memory_format=torch.channels_last))
    assert main(["info", "--json"]) == 0
    known = json.loads(capsys.readouterr().out)["tuner"]
    (cpu, *_) = known["machines"]
    assert cpu["machine"] == machine
    assert len(cpu["calls"]) > 5
    assert all(entry["choice"] in entry["ms"] for entry in cpu["calls"])
    assert known["file"] == str(tuning_cache.path())
    assert main(["info"]) == 0
    short = capsys.readouterr().out
    assert "1x64x8x8" not in short
    assert main(["info", "--tuning"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"chosen on {machine}"[:40] in out
    assert "1x64x8x8 channels_last" in out
    assert len(short.splitlines()) < 30
    # Cleared, and timed again.
    assert main(["tune", "--clear", "--threads", "1"]) == 0
    assert f"removed {len(cpu['calls'])} calls" in capsys.readouterr().out
    assert tuning_cache.load(machine) == {}


def test_bench_explains(capsys):
    command = ["bench", "resnet18", "--batch", "1", "--size", "32", "--threads", "1"]
    command += ["--providers", "channels_last", "--rounds", "1", "--explain"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "the fused network's calls, batch 1" in out
    assert "runs on" in out
    assert "the frozen network's programs, batch 1" in out
    assert "1 program of 22 steps, micro-batches of 1 image, " in " ".join(out.split())
    assert "layer4.1.conv2" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--size", "8"], "--size: expected at least 32"),
        (["--dtype", "float64"], "unknown dtype 'float64'"),
    ],
)
def test_wrong_usage(flags, message, capsys):
    try:
        code = main(["tune", "resnet18", *flags])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert message in capsys.readouterr().err
