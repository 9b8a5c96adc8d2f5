"""``fused-resnet bench --training``: what is compared, and that a wrong step is not timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fused_resnet.bench import training, training_layers
from fused_resnet.bench.networks import LIMITS
from fused_resnet.cli import main
from fused_resnet.models import sources


@pytest.fixture(scope="module")
def problem(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("problem")
    training.write_problem(folder, "cifar_resnet20", batch=4, size=32)
    return str(folder)


@pytest.mark.parametrize("provider", ["eager", "channels_last", "fused"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_the_first_step_agrees_with_float64(problem, provider, dtype):
    subject = training.build(provider, "cifar_resnet20", dtype, problem)
    assert subject.training
    assert subject.error() <= LIMITS[dtype]


@pytest.mark.parametrize("provider", ["channels_last", "fused"])
def test_fine_tuning_trains_what_is_named(tmp_path, provider):
    training.write_problem(tmp_path, "cifar_resnet20", 4, 32, ["layer3", "linear"])
    subject = training.build(provider, "cifar_resnet20", "float64", str(tmp_path))
    assert subject.error() <= LIMITS["float64"]
    step = subject.call
    assert isinstance(step, training.Step)
    before = {name: t.clone() for name, t in step.model.state_dict().items()}
    step()
    changed = {n for n, t in step.model.state_dict().items() if not torch.equal(t, before[n])}
    parts = {name.partition(".")[0] for name in changed}
    assert parts == {"layer3", "linear"}
    assert not any("running" in name for name in changed)


def test_a_part_that_is_not_there(capsys):
    command = "bench cifar_resnet20 --training --batch 1 --trainable layer9"
    assert main(command.split()) == 2
    assert "--trainable: unknown part 'layer9'; expected of conv1, bn1" in capsys.readouterr().err


def test_parts_without_training(capsys):
    assert main(["bench", "cifar_resnet20", "--trainable", "layer3"]) == 2
    assert "--trainable: needs --training" in capsys.readouterr().err


def test_a_step_with_a_wrong_gradient_is_not_timed(problem):
    subject = training.build("eager", "cifar_resnet20", "float32", problem)
    step = subject.call
    assert isinstance(step, training.Step)
    for parameter in step.model.parameters():
        parameter.register_hook(lambda gradient: gradient * 1.5)
    assert subject.error() > LIMITS["float32"]


def test_a_step_trains_and_its_phases_are_timed(problem):
    subject = training.build("fused", "cifar_resnet20", "float32", problem)
    step = subject.call
    assert isinstance(step, training.Step)
    before = [p.detach().clone() for p in step.model.parameters()]
    step()
    assert not any(map(torch.equal, before, step.model.parameters()))
    assert subject.details is not None
    assert set(subject.details()) == {"forward", "backward", "optimizer"}


def test_the_command_writes_rows(tmp_path: Path, capsys):
    out = tmp_path / "rows.json"
    command = "bench cifar_resnet20 --training --batch 2 --rounds 1 --threads 1"
    assert main([*command.split(), "--providers", "channels_last,fused", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert [row["provider"] for row in rows] == ["channels_last", "fused"]
    for row in rows:
        assert row["status"] == "ok"
        assert row["mode"] == "training"
        assert row["cores"] < 1.5  # measured on one thread, whatever the machine has
        assert row["forward"] > 0
        assert row["backward"] > 0
    assert "img/s" in capsys.readouterr().out


def test_providers_of_inference_are_refused(capsys):
    assert main(["bench", "resnet18", "--training", "--providers", "frozen"]) == 2
    assert "unknown provider 'frozen'" in capsys.readouterr().err


def test_layers_are_counted_by_their_geometry():
    """ResNet-18 has 20 convolutions of 11 geometries; only the first has no data gradient."""
    model = sources.plain_model("resnet18")
    layers = training_layers.layers_of(model, torch.zeros(1, 3, 64, 64))
    assert sum(layers.values()) == sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 20
    assert len(layers) == 11
    assert [layer.x[1] for layer in layers if not layer.needs_input] == [3]


@pytest.mark.parametrize("name", ["3 to 16, 3x3, 32x32", "16 to 32, 3x3, 32x32, stride 2"])
def test_every_direction_is_measured(name):
    layers = training_layers.layers_of(
        sources.plain_model("cifar_resnet20"), torch.zeros(2, 3, 32, 32)
    )
    (layer,) = (layer for layer in layers if str(layer) == name)
    times = training_layers.measure(layer, torch.float32)
    expected = [d for d in training_layers.DIRECTIONS if layer.needs_input or d[:4] != "data"]
    assert list(times) == expected
    assert all(ms > 0 for both in times.values() for ms in both.values())
