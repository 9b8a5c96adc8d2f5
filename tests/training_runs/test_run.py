"""A run: its numbers compared with a loop of plain PyTorch, and its files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_data
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import fused_resnet as fr
from fused_resnet import training
from fused_resnet.cli import main
from fused_resnet.models import sources
from fused_resnet.models.weights import load_weights
from fused_resnet.training import Settings, batches, checkpoint, data

pytest.importorskip("torchvision", reason="torchvision's transforms are what is run")
pytest.importorskip("yaml", reason="a run writes RUN/recipe.yaml")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_data.archive(tmp_path_factory.mktemp("data") / "tiny.npz")


def normal(settings: Settings, images: Tensor) -> Tensor:
    found = data.load(settings)
    mean, std = (
        torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (found.mean, found.std)
    )
    return (images.double() / 255 - mean) / std


def plain_loop(settings: Settings) -> tuple[list[float], torch.nn.Module]:
    """The mean loss of each epoch, in float64, of a network without fusing."""
    torch.manual_seed(settings.seed)
    model = sources.plain_model(settings.model, None, tiny_data.CLASSES).double().train()
    optimizer = torch.optim.SGD(
        model.parameters(), settings.lr, settings.momentum, weight_decay=settings.weight_decay
    )
    steps = tiny_data.COUNT["train"] // settings.batch
    total, losses, step = settings.epochs * steps, [], 0
    found = data.load(settings).train
    for epoch in range(settings.epochs):
        sums = []
        for keys in batches.TrainBatches(len(found), settings.batch, settings.seed, epoch, 0, 0, 1):
            images, labels = data.collate([found[key] for key in keys])
            for group in optimizer.param_groups:  # the cosine, in closed form
                group["lr"] = settings.lr * (1 + math.cos(math.pi * step / total)) / 2
            loss = F.cross_entropy(model(normal(settings, images)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sums.append(loss.item())
            step += 1
        losses.append(sum(sums) / len(sums))
    return losses, model


def test_a_run_is_the_loop_that_one_would_write(archive: str, tmp_path: Path) -> None:
    """Fused, in float64: the losses, the accuracy, and the weights that are kept."""
    settings = tiny_data.settings(archive, tmp_path / "run", dtype="float64")
    result = training.train(settings)
    losses, model = plain_loop(settings)
    assert [e["train_loss"] for e in result.history] == pytest.approx(losses, rel=1e-9)
    images, labels = tiny_data.pixels("val")
    x = normal(settings, torch.from_numpy(images).permute(0, 3, 1, 2))
    with torch.no_grad():
        logits = model.eval()(x)
    right = (logits.argmax(1) == torch.from_numpy(labels)).double().mean()
    assert result.history[-1]["val_accuracy"] == right
    loss = F.cross_entropy(logits, torch.from_numpy(labels))
    assert result.history[-1]["val_loss"] == pytest.approx(loss.item(), rel=1e-9)
    found = checkpoint.read(tmp_path / "run" / "last")["model"]
    for key, value in model.state_dict().items():
        torch.testing.assert_close(found[key], value, rtol=1e-8, atol=1e-10, msg=key)


def test_files_and_serving(archive: str, tmp_path: Path) -> None:
    """The frozen file of the best weights has the accuracy that the run says."""
    out = tmp_path / "run"
    settings = tiny_data.settings(archive, out, epochs=3)
    result = training.train(settings)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.history
    assert [e["step"] for e in lines] == [5, 10, 15]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    described = training.read_recipe(str(out / "recipe.yaml"))
    assert training.from_mapping(described) == settings
    assert "torch" in (out / "recipe.yaml").read_text()

    weights, file = str(out / "best.safetensors"), str(tmp_path / "served.safetensors")
    assert main(["freeze", settings.model, "--weights", weights, "--out", file]) == 0
    served = fr.load_frozen(file)
    assert list(served.labels) == data.load(settings).classes
    prepare = served.preprocessing
    images, labels = tiny_data.pixels("val")
    x = torch.stack([prepare(torch.from_numpy(image).permute(2, 0, 1)) for image in images])
    expected = normal(settings, torch.from_numpy(images).permute(0, 3, 1, 2)).float()
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)
    with torch.inference_mode():
        right = (served(x).argmax(1) == torch.from_numpy(labels)).double().mean()
    assert right == result.best_accuracy
    assert result.best_accuracy == max(e["val_accuracy"] for e in lines)


def test_files_are_served_as_they_were_validated(tmp_path: Path) -> None:
    """Of a folder of photographs: the size of the run, and the resize before the crop."""
    settings = tiny_data.settings(tiny_data.folder(tmp_path / "photos"), tmp_path / "run", size=32)
    training.train(settings)
    weights, file = str(tmp_path / "run" / "best.safetensors"), str(tmp_path / "served.safetensors")
    assert main(["freeze", settings.model, "--weights", weights, "--out", file]) == 0
    served, found = fr.load_frozen(file), data.load(settings)
    assert list(served.labels) == found.classes
    for index, path in enumerate(sorted((tmp_path / "photos" / "val").glob("*/*"))):
        pixels, label = found.val[0, index]
        with Image.open(path) as photo:
            got = served.preprocessing(photo.convert("RGB"))
        assert found.classes[label] == path.parent.name
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (found.mean, found.std))
        torch.testing.assert_close(got, (pixels / 255 - mean) / std, rtol=1e-5, atol=1e-5)


def test_metadata_that_is_not_of_the_weights(tmp_path: Path, capsys) -> None:
    state = sources.plain_model("cifar_resnet20", None, 3).state_dict()
    given = {"classes": '["a", "b", "c"]', "preprocessing": '{"resize": 8}'}
    for change, message in (
        ({"classes": '["a"]'}, "does not name 3 classes"),
        ({"classes": "["}, "not that of fused-resnet train"),
        ({}, "preprocessing is not resize, crop"),
    ):
        save_file(state, tmp_path / "w.safetensors", {**given, **change})
        arguments = ["--weights", str(tmp_path / "w.safetensors"), "--out", str(tmp_path / "o")]
        assert main(["freeze", "cifar_resnet20", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_unfused_is_pytorch_itself(archive: str, tmp_path: Path) -> None:
    """The same losses from the same seed, and no module of this package."""
    from fused_resnet.training import network
    from fused_resnet.training.engine import started

    runs = [
        training.train(
            tiny_data.settings(
                archive, tmp_path / f"{kind}-{unfused}", model=kind, unfused=unfused, epochs=1,
                dtype="float64", channels_last=not unfused,
            )
        ).history[0]["train_loss"]
        for kind in ("cifar_plain20", "cifar_resnet20")
        for unfused in (False, True)
    ]  # fmt: skip
    assert runs[0] == pytest.approx(runs[1], rel=1e-9)
    assert runs[2] == pytest.approx(runs[3], rel=1e-9)
    assert runs[0] != pytest.approx(runs[2], rel=1e-3)
    settings = tiny_data.settings(archive, tmp_path, unfused=True)
    with started(settings) as engine:
        model = network.build(settings, 3, engine, print)
    assert all(not hasattr(module, "fused_groups") for module in model.modules())


def test_the_averages_weights_are_what_is_judged(archive: str, tmp_path: Path) -> None:
    settings = tiny_data.settings(archive, tmp_path / "run", epochs=1, ema=0.5)
    result = training.train(settings)
    found = checkpoint.read(tmp_path / "run" / "last")
    state = load_weights(result.weights)
    for key, value in state.items():
        assert torch.equal(value, found["average"][f"module.{key}"]), key
    assert not torch.equal(state["conv1.weight"], found["model"]["conv1.weight"])


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"schedule": "constant"}, [1, 1, 1, 1]),
        ({"schedule": "steps"}, [1, 1, 0.1, 0.01]),
        ({"schedule": "steps", "drops": (0.25,), "warmup": 0.5}, [1, 0.1, 0.1, 0.1]),
        ({"schedule": "cosine"}, [(1 + math.cos(math.pi * s / 20)) / 2 for s in (4, 9, 14, 19)]),
    ],
    ids=["constant", "steps", "warm-up", "cosine"],
)
def test_learning_rates(more: dict[str, Any], expected: list[float]) -> None:
    """At the last step of each of 4 epochs of 5 steps."""
    from fused_resnet.training import optim

    settings = Settings(model="x", data="x", out="x", epochs=4, lr=2.0, **more)
    optimizer = optim.optimizer(settings, torch.nn.Linear(1, 1))
    scheduler = optim.schedule(settings, optimizer, 5)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[4::5] == pytest.approx([2 * value for value in expected])
    if settings.warmup:
        assert rates[0] == pytest.approx(0.02)
        assert rates[:3] == sorted(rates[:3])


def test_fine_tuning_makes_the_head_anew(archive: str, tmp_path: Path) -> None:
    """Seven classes' weights, a frozen backbone: only the head learns, and is said to be new."""
    from fused_resnet.training.report import Silent

    torch.manual_seed(5)
    trained = fr.cifar_resnet(20, num_classes=7).state_dict()
    torch.save(trained, tmp_path / "w.pth")
    notes: list[str] = []
    reporter = Silent()
    reporter.note = notes.append  # type: ignore[method-assign]
    settings = tiny_data.settings(
        archive, tmp_path / "run", epochs=1, weights=str(tmp_path / "w.pth"), freeze_backbone=True
    )
    result = training.train(settings, reporter)
    assert notes == ["The weights have 7 classes and the data 3: the head is made anew."]
    state = load_weights(result.weights)
    for key, value in trained.items():
        if not key.startswith("linear"):
            assert torch.equal(state[key], value), key
    assert state["linear.weight"].shape == (3, 64)

    settings = tiny_data.settings(
        archive, tmp_path / "again", epochs=1, weights=str(result.weights), lr=1e-9
    )
    training.train(settings, reporter)
    assert len(notes) == 1
    again = checkpoint.read(tmp_path / "again" / "last")["model"]
    torch.testing.assert_close(again["linear.weight"], state["linear.weight"])


def test_mixup_and_label_smoothing(archive: str, tmp_path: Path) -> None:
    """Both raise the least loss that is possible, so they show in the training loss."""
    losses = [
        training.train(
            tiny_data.settings(archive, tmp_path / str(i), epochs=1, lr=1e-6, **more)
        ).history[0]["train_loss"]
        for i, more in enumerate(({}, {"mixup": 1.0}, {"label_smoothing": 0.9}))
    ]
    assert len(set(losses)) == 3


def test_precisions(archive: str, tmp_path: Path) -> None:
    exact, rounded = (
        training.train(
            tiny_data.settings(archive, tmp_path / dtype, epochs=1, lr=1e-3, dtype=dtype)
        ).history[0]["train_loss"]
        for dtype in ("float32", "bfloat16")
    )
    assert rounded == pytest.approx(exact, rel=0.05)
    assert rounded != exact


def test_tensorboards_events(archive: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="its events are what is written")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = training.train(tiny_data.settings(archive, tmp_path, epochs=1))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (scalar,) = events.Scalars("val_accuracy")
    assert scalar.value == pytest.approx(result.history[0]["val_accuracy"])
