"""What goes wrong in a run is one line, and what was good stays."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_data
import torch
import warm_process

from fused_resnet import training
from fused_resnet.cli import main
from fused_resnet.training import checkpoint, run

pytest.importorskip("torchvision", reason="torchvision's transforms are what is run")
pytest.importorskip("yaml", reason="a run writes RUN/recipe.yaml")

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_data.archive(tmp_path_factory.mktemp("data") / "tiny.npz")


@pytest.fixture(scope="module")
def done(archive: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch."""
    out = tmp_path_factory.mktemp("done") / "run"
    training.train(tiny_data.settings(archive, out, epochs=1))
    return out


def complaint(capsys: Capture, *arguments: str, code: int = 2) -> str:
    """The one line of an error."""
    assert main(["train", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    line = err.splitlines()[-1]
    assert line.startswith("fused-resnet: ")
    assert "Traceback" not in err
    return line


def test_a_loss_that_is_not_finite(archive: str, tmp_path: Path, capsys: Capture) -> None:
    """A rate that overflows float32 in the second step, before anything was saved."""
    options = f"--data {archive} --out {tmp_path} --epochs 2 --batch 8 --device cpu"
    schedule = "--schedule constant --lr 1e38 --warmup 1"
    line = complaint(capsys, "cifar_resnet20", *options.split(), *schedule.split(), code=1)
    assert "the loss of step 2 is not finite: there is no checkpoint yet" in line
    assert not (tmp_path / "last").exists()


def test_divergence_keeps_the_last_good_checkpoint(archive: str, tmp_path: Path) -> None:
    """Weights of the second epoch become NaN; what the first one saved is still there."""

    class Spoiled(run.Run):
        def _epoch(self) -> None:
            if self.epoch == 1:
                with torch.no_grad():
                    self.model.conv1.weight[:] = torch.nan
            super()._epoch()

    settings = tiny_data.settings(archive, tmp_path)
    with (
        pytest.raises(training.DivergedError, match="step 6 is not finite: the last checkpoint"),
        run.started(settings) as engine,
    ):
        Spoiled(settings, engine, run.Silent()).go()
    found = checkpoint.read(tmp_path / "last")
    assert found["epoch"] == 1
    assert all(value.isfinite().all() for value in found["model"].values())


def test_weights_that_a_step_spoils_are_not_written(
    archive: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the last step of an epoch or before a checkpoint within one: no later loss would tell."""
    out = tmp_path / "run"
    options = f"--data {archive} --out {out} --batch 8 --epochs 2 --save-every 1"
    step, calls = run.train_step, []

    def spoiling(settings: Any, engine: Any, network: Any, *more: Any) -> Any:
        result = step(settings, engine, network, *more)
        calls.append(0)
        if len(calls) == 3:
            with torch.no_grad():
                next(network.parameters())[:] = torch.inf
        return result

    monkeypatch.setattr(run, "train_step", spoiling)
    line = complaint(capsys, "cifar_resnet20", *options.split(), code=1)
    assert "the network after step 3 is not finite: the last checkpoint is of before" in line
    found = checkpoint.read(out / "last")
    assert found["step"] == 2
    assert all(value.isfinite().all() for value in found["model"].values())
    assert "lr: expected a finite number" in complaint(
        capsys, "cifar_resnet20", *options.split(), "--lr", "inf"
    )


def test_a_resumed_run_has_the_same_images(archive: str, tmp_path: Path, capsys: Capture) -> None:
    """The data may have moved; other data, or fewer images, are another run."""
    moved, other, fewer = (tmp_path / f"{name}.npz" for name in ("moved", "other", "fewer"))
    shutil.copy(archive, moved)
    arrays = dict(np.load(archive))
    np.savez(other, **{**arrays, "train_images": 255 - arrays["train_images"]})
    cut = {key: arrays[key][:-8] for key in ("train_images", "train_labels")}
    np.savez(fewer, **{**arrays, **cut})
    out = tmp_path / "run"
    options = f"--batch 8 --epochs 1 --out {out}"
    assert main(["train", "cifar_resnet20", *options.split(), "--data", archive]) == 0
    capsys.readouterr()
    for path in (other, fewer):
        line = complaint(capsys, "--out", str(out), "--resume", "--data", str(path))
        assert f"was made on other images than those of data {str(path)!r}" in line
    assert main(["train", "--out", str(out), "--resume", "--data", str(moved)]) == 0


def test_a_run_that_was_killed_before_its_first_checkpoint(archive: str, tmp_path: Path) -> None:
    out, whole = tmp_path / "run", tmp_path / "whole"
    options = f"--data {archive} --batch 8 --epochs 1"
    for place in (out, whole):
        assert main(["train", "cifar_resnet20", *options.split(), "--out", str(place)]) == 0
    for name in ("last", "best.safetensors"):
        (out / name).unlink()
    (out / "last.0123abcd.part").write_bytes(b"half")
    assert main(["train", "--out", str(out), "--resume"]) == 0
    files = [(place / "best.safetensors").read_bytes() for place in (out, whole)]
    assert files[0] == files[1]
    assert not list(out.glob("*.part"))


def test_images_that_would_be_served_differently(tmp_path: Path, capsys: Capture) -> None:
    labels = np.arange(8) % 2
    for train, val in (((16, 20), (16, 20)), ((16, 16), (20, 20))):
        path = tmp_path / "images.npz"
        images = {
            f"{part}_images": np.zeros((8, *size, 3), "uint8")
            for part, size in (("train", train), ("val", val))
        }
        np.savez(path, **images, train_labels=labels, val_labels=labels)
        line = complaint(
            capsys, "cifar_resnet20", "--data", str(path), "--out", str(tmp_path / "run")
        )
        assert "expected square images, and of one size without --size" in line


def test_an_unreadable_image(tmp_path: Path, capsys: Capture) -> None:
    place = tiny_data.folder(tmp_path / "photos")
    (place / "train" / "class1" / "1.png").write_bytes(b"no picture")
    options = f"--data {place} --out {tmp_path / 'run'} --size 16 --epochs 1 --batch 40"
    for workers in ("0", "1"):
        line = complaint(capsys, "cifar_resnet20", *options.split(), "--workers", workers)
        assert "1.png': the file is damaged or no picture" in line
        assert line.startswith("fused-resnet: error: train: data: image '")


def test_a_full_disk(archive: str, done: Path, tmp_path: Path) -> None:
    """A limit on the size of files, which the checkpoint exceeds and all other files do not."""
    out = tmp_path / "run"
    out.mkdir()
    for name in ("last", "recipe.yaml"):
        (out / name).write_bytes((done / name).read_bytes())
    before = (out / "last").read_bytes()
    limit = 100_000
    assert len(before) > limit

    code = (
        "import dataclasses, resource, sys; from fused_resnet import cli, training; "
        "from fused_resnet.training import checkpoint\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "try: checkpoint.write(__import__('pathlib').Path(sys.argv[1]) / 'last', "
        "{'model': __import__('torch').zeros(100_000)})\n"
        "except training.TrainingError as error: print(error)"
    )
    ended = warm_process.run(["-c", code, str(out)])
    assert ended.returncode == 0, ended.stderr
    assert "last': File too large; the last checkpoint is whole, and --resume" in ended.stdout
    assert (out / "last").read_bytes() == before
    assert sorted(path.name for path in out.iterdir()) == ["last", "recipe.yaml"]


def test_checkpoints_of_something_else(
    archive: str, done: Path, tmp_path: Path, capsys: Capture
) -> None:
    options = f"--data {archive} --out {done} --epochs 1 --batch 8 --lr 0.05 --device cpu"
    train = ["cifar_resnet20", *options.split()]
    assert "has a run already" in complaint(capsys, *train)
    for more, words in (
        (["--lr", "0.1"], "was made with lr 0.05, got 0.1"),
        (["--unfused"], "was made with unfused False, got True"),
    ):
        assert words in complaint(capsys, *train, *more, "--resume")
    longer = complaint(capsys, *train, "--epochs", "2", "--resume")
    assert "was made with epochs 1, got 2; the schedule depends on it" in longer
    assert f"--weights {done / 'best.safetensors'}" in longer
    other = ["cifar_resnet32", *options.split(), "--resume"]
    assert "was made with model 'cifar_resnet20', got 'cifar_resnet32'" in complaint(capsys, *other)

    empty = tmp_path / "empty"
    line = complaint(capsys, "--out", str(empty), "--resume")
    assert "there is no run to resume" in line
    options = f"--data {archive} --out {empty} --resume"
    line = complaint(capsys, "cifar_resnet20", *options.split())
    assert "there is no such file, so there is nothing to resume" in line


@pytest.mark.parametrize("damage", ["truncated", "one bit", "another file", "a part"])
def test_damaged_checkpoints(damage: str, done: Path, tmp_path: Path) -> None:
    content = bytearray((done / "last").read_bytes())
    if damage == "truncated":
        del content[len(content) // 2 :]
    elif damage == "one bit":
        content[len(content) // 2] ^= 1
    else:
        found = checkpoint.read(done / "last")
        part = {key: found[key] for key in ("kind", "format", "settings", "classes")}
        torch.save({"a": 1} if damage == "another file" else part, tmp_path / "other")
        content = bytearray((tmp_path / "other").read_bytes())
    (tmp_path / "last").write_bytes(content)
    with pytest.raises(training.TrainingError, match="damaged, or not a checkpoint"):
        checkpoint.read(tmp_path / "last")


def test_mistakes_of_the_command(archive: str, tmp_path: Path, capsys: Capture) -> None:
    out = ["--out", str(tmp_path / "run")]
    data = ["--data", archive]
    tiny = ["cifar_resnet20", *data, *out, "--batch", "8"]
    for arguments, words in (
        ([*data, *out], "expected MODEL"),
        (["resnet18", *out], "expected --data"),
        (["resnet18", *data, *out, "--batch", "0"], "batch: expected at least 1, got 0"),
        ([*tiny, "--size", "1"], "size: expected at least 8, got 1"),
        (["resnet18", *data, *out, "--batch", "64"], "batch 64: more than the 40 training images"),
        ([*tiny, "--weights", "none.pth"], "none.pth': there is no such file"),
        ([*tiny, "--device", "cuda"], "device 'cuda': PyTorch finds no GPU"),
        (["resnet18", *data, *out, "--recipe", "none.yaml"], "recipe 'none.yaml': No such file"),
        ([*tiny, "--out", f"{archive}/run"], "Not a directory"),
    ):
        if "cuda" not in arguments or not torch.cuda.is_available():
            assert words in complaint(capsys, *arguments)
